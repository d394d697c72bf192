"""What `benchmarks.baselines` and `benchmarks.ablations` share: recipes trained and read on test.

Each recipe and seed has a folder of its own under OUT with a result.json, so that an interrupted
benchmark goes on where it was, and the same command started twice shares the work: a process passes
over what another is at. These benchmarks read the test split, which is theirs to name: nothing is
chosen by it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from scipy.special import softmax
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

import train
from benchmarks.comparison import OURS
from data_prep.prepare import DATA_SETTINGS, prepare
from data_prep.sources import retention_rows
from nicheclip.clip import encode_images, encode_texts, image_side, load_clip
from nicheclip.domain import Domain
from nicheclip.evaluation import metrics
from nicheclip.evaluation.calibration import fit_temperature
from nicheclip.evaluation.ood import PER_KIND, ood_pictures
from nicheclip.evaluation.predictions import DomainClassifier
from nicheclip.evaluation.probe import STRENGTHS, fit_probe
from nicheclip.evaluation.robustness import retention_accuracy
from nicheclip.files import read_json, write_json
from nicheclip.run import load_prepared
from nicheclip.training.callbacks import TrainingInterrupted
from nicheclip.training.wise_ft import choose_alpha, interpolate

VERSION = 1  # of what result.json holds; another one is made anew


def options(description: str | None) -> argparse.ArgumentParser:
    """What baselines and ablations are both asked."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "domain", nargs="?", default="domains/facades", help="a domain file or its folder"
    )
    parser.add_argument(
        "--images", help="class folders or a dataset to read instead of the domain's own source"
    )
    parser.add_argument(
        "--base", help="a Hub id or a folder, instead of the domain's own base model"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[701, 702, 703])
    parser.add_argument(
        "--out", type=Path, help="where the runs lie; both benchmarks can share one folder"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="run these only; the table shows all that is there",
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    return parser


def prepared(
    domain: Domain,
    images: str | Path | None,
    seed: int,
    out: Path,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """OUT/data-SEED, a run directory that holds the prepared data and the domain as it is now.

    Prepared anew only if what the data depends on has changed. Photos are verified and encoded once
    for all seeds.

    Args:
        overrides: top-level keys of the domain that make other data; it then lies in a folder named
            after them.
    """
    ours, domain = identity(domain), with_overrides(domain, overrides or {})
    name = "-".join(["data", str(seed), *(overrides or {})])
    run = out / name
    made_of = domain.model_dump(
        mode="json", include={"base", "source", "classes", "clusters", *DATA_SETTINGS}
    )
    made_of |= {"images": images and str(images), "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".prepare.lock"):
        record = run / "made_of.json"
        if not (record.is_file() and read_json(record, "") == made_of):
            print(f"{name}: preparing …", flush=True)
            record.unlink(missing_ok=True)
            if images is not None:
                _link(run / "cache", out / "cache")
            with _logged(run / "log.txt"):
                prepare(domain, run, images, seed)
            write_json(record, made_of)
        if Domain.load(run) != domain:  # stages and settings may have changed since
            domain.save(run / "domain.yaml")
        write_json(run / "ours.json", ours)
    return run


def identity(domain: Domain) -> str:
    """A digest of all of a domain."""
    return _digest(domain.model_dump(mode="json"))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, content], sort_keys=True).encode()).hexdigest()[:16]


def with_overrides(domain: Domain, overrides: dict[str, Any]) -> Domain:
    """The domain with top-level keys replaced, checked again."""
    return Domain.model_validate(domain.model_dump(mode="json") | overrides)


def training_of(domain: Domain, **changes: Any) -> dict[str, Any]:
    """The override that changes some training arguments and leaves the domain's others."""
    return {"training": domain.training | changes}


def run_recipe(
    data_run: Path,
    name: str,
    overrides: dict[str, Any],
    seed: int,
    out: Path,
    keep_model: bool = False,
) -> dict[str, Any]:
    """Trains OUT/NAME-SEED on the data of `data_run`, with `overrides` of the domain, and reads it on test.

    Args:
        overrides: top-level keys of the domain, replaced as they stand; none that data_prep depends
            on.
        keep_model: else it is deleted after it was read, as checkpoints always are.

    Raises:
        ValueError: if the overrides would need other data.
    """
    if wrong := sorted(DATA_SETTINGS & set(overrides)):
        raise ValueError(
            f"recipe '{name}' overrides {wrong[0]}, which needs data of its own: give it to "
            "`prepared`"
        )
    domain = with_overrides(Domain.load(data_run), overrides)

    def work(run: Path) -> dict[str, Any]:
        _link(run / "data", data_run / "data")
        domain.save(run / "domain.yaml")
        train.train([str(run), "--seed", str(seed)])
        trained = read_json(run / "training.json", "")
        result = evaluate_model(*load_clip(run / "model"), domain, data_run)
        shutil.rmtree(run / "checkpoints")
        # not there if no stage leaves the first blocks frozen
        shutil.rmtree(run / "cache", ignore_errors=True)
        if not keep_model:
            shutil.rmtree(run / "model")
        return result | {
            "seconds": trained["seconds"],
            "best_epoch": trained["best_epoch"],
            "epochs": len(trained["epochs"]),
            "overrides": overrides,
        }

    return _once(data_run, name, domain.model_dump(mode="json"), seed, out, work)


def wise_ft(data_run: Path, seed: int, out: Path) -> dict[str, Any]:
    """The trained model of "ours" mixed with the base as validation likes it best.

    Nothing is trained.
    """
    domain = Domain.load(data_run)
    ours = run_recipe(data_run, OURS, {}, seed, out, keep_model=True)

    def work(run: Path) -> dict[str, Any]:
        started = time.perf_counter()
        base, processor = load_clip(domain.base)
        tuned, _ = load_clip(out / f"{OURS}-{seed}" / "model")
        validation = load_prepared(data_run)["validation"]
        alpha, _ = choose_alpha(
            base, tuned, processor, validation, domain.canonical_prompts, progress=False
        )
        base.load_state_dict(interpolate(base.state_dict(), tuned.state_dict(), alpha))
        seconds = ours["seconds"] + time.perf_counter() - started
        return evaluate_model(base, processor, domain, data_run) | {
            "seconds": round(seconds, 1),
            "alpha": alpha,
        }

    return _once(data_run, "wise_ft", {"of": ours["recipe"]}, seed, out, work)


def zero_shot(data_run: Path, ensemble: bool, seed: int, out: Path) -> dict[str, Any]:
    """The base as it is, with the canonical prompt of each class or the mean of its normalised prompt embeddings."""
    domain = Domain.load(data_run)

    def work(run: Path) -> dict[str, Any]:
        model, processor = load_clip(domain.base)
        prompts, classes = domain.prompt_bank
        prototypes = None
        if ensemble:
            embeds = encode_texts(model, processor, prompts)  # (P, D)
            of_class = torch.tensor(classes, device=embeds.device)
            means = [embeds[of_class == c].mean(dim=0) for c in range(len(domain.classes))]
            prototypes = normalize(torch.stack(means), dim=-1)  # (C, D)
        return evaluate_model(model, processor, domain, data_run, prototypes) | {"seconds": 0.0}

    name = "zero_shot_ensemble" if ensemble else "zero_shot"
    recipe = domain.model_dump(mode="json", include={"base", "classes", "clusters", "retention"})
    return _once(data_run, name, recipe, seed, out, work)


def probe(data_run: Path, seed: int, out: Path) -> dict[str, Any]:
    """A linear probe: logistic regression on the base's frozen image_embeds, its settings chosen on validation."""
    domain = Domain.load(data_run)

    def work(run: Path) -> dict[str, Any]:
        started = time.perf_counter()
        model, processor = load_clip(domain.base)
        splits = load_prepared(data_run)
        labels = {name: np.array(split["label"]) for name, split in splits.items()}

        def embed(name: str) -> np.ndarray:
            rows = splits[name]
            return encode_images(
                model, processor, (row["image"] for row in rows), len(rows), progress=False
            )

        validation_embeds = embed("validation")
        validation = validation_embeds, labels["validation"]
        fitted = fit_probe((embed("train"), labels["train"]), validation, len(domain.classes))
        accuracy = metrics.correct(fitted.logits(validation_embeds), labels["validation"]).mean()
        seconds = time.perf_counter() - started
        logits = {name: fitted.logits(embed(name)) for name in ("calibration", "test")}
        temperature = _temperature(logits["calibration"], labels["calibration"])
        return _read(logits["test"], temperature, splits["test"]) | {
            "validation_accuracy": float(accuracy),
            "seconds": round(seconds, 1),
            "chosen": {"C": fitted.fitted.C, "class_weight": fitted.fitted.class_weight},
        }

    return _once(
        data_run, "linear_probe", {"base": domain.base, "strengths": STRENGTHS}, seed, out, work
    )


def evaluate_model(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    data_run: Path,
    prototypes: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What a model is worth on the test split, its temperature fitted on calibration.

    Args:
        prototypes: (C, D), instead of the embeddings of the canonical prompts.
    """
    splits = load_prepared(data_run)
    classifier = DomainClassifier(model, processor, domain, "evaluated")
    if prototypes is not None:
        classifier.prototypes = prototypes
    embeds = {
        name: classifier.embed_rows(splits[name], name)
        for name in ("validation", "calibration", "test")
    }
    logits = {name: classifier.logits(of_split) for name, of_split in embeds.items()}
    labels = {name: np.array(splits[name]["label"]) for name in embeds}
    temperature = _temperature(logits["calibration"], labels["calibration"])
    margin = metrics.hard_negative_margin(
        embeds["test"] @ classifier.prompt_embeds.T,
        classifier.prompt_classes,
        labels["test"],
        np.array(domain.class_clusters),
    )
    judged = margin[np.isfinite(margin)]
    noise = classifier.embed(
        ood_pictures("noise", image_side(processor), seed=0), PER_KIND, "noise"
    )
    on_noise = softmax(classifier.logits(noise) / temperature, axis=1).max(axis=1)
    result = _read(logits["test"], temperature, splits["test"]) | {
        "validation_accuracy": float(
            metrics.correct(logits["validation"], labels["validation"]).mean()
        ),
        "hard_negative_pass_rate": float((judged > 0).mean()) if len(judged) else None,
        "noise_confidence_p95": float(np.percentile(on_noise, 95)),
        "retention": None,
    }
    if domain.retention is not None:
        rows, prompts = retention_rows(domain), domain.retention.canonical_prompts
        images, retention_labels = (row["image"] for row in rows), np.array(rows["label"])
        result["retention"] = retention_accuracy(
            model, processor, images, retention_labels, prompts, progress=False
        ).value
    return result


def _read(logits: np.ndarray, temperature: float, test: datasets.Dataset) -> dict[str, Any]:
    """The measures that any classifier has; which test images are right, to pool and pair them."""
    labels = np.array(test["label"])
    raw, calibrated = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    right = metrics.correct(calibrated, labels)
    return {
        "accuracy": float(right.mean()),
        "macro_f1": metrics.macro_f1(calibrated.argmax(axis=1), labels, calibrated.shape[1]),
        "ece_before_calibration": metrics.expected_calibration_error(raw.max(axis=1), right),
        "ece": metrics.expected_calibration_error(calibrated.max(axis=1), right),
        "temperature": temperature,
        "test": {
            "image": [digest[:16] for digest in test["sha256"]],
            "group": list(test["group_id"]),
            "right": right.astype(int).tolist(),
        },
    }


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """1 if the images can't identify it."""
    try:
        return fit_temperature(logits, labels)
    except ValueError:
        return 1.0


def _once(
    data_run: Path,
    name: str,
    recipe: Any,
    seed: int,
    out: Path,
    work: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """The result of OUT/NAME-SEED, worked out if it is not there or was made of another recipe or other data.

    Raises:
        Timeout: if another process is at it.
    """
    run = out / f"{name}-{seed}"
    made_of = {
        "recipe": recipe,
        "data": read_json(data_run / "data" / "report.json", "")["fingerprint"],
    }
    made_for = {
        "name": name,
        "seed": seed,
        "recipe": _digest(made_of),
        "ours": read_json(data_run / "ours.json", ""),
    }
    with FileLock(out / f".{name}-{seed}.lock", timeout=0):
        path = run / "result.json"
        found = read_json(path, "") if path.is_file() else {"recipe": None}
        # the domain may have changed where this recipe does not look
        if found["recipe"] == made_for["recipe"]:
            if found["ours"] != made_for["ours"]:
                write_json(path, found | made_for)
            return found | made_for
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        with _logged(run / "log.txt"):
            result = made_for | work(run)
        write_json(path, result)
    print(
        f"{name}, seed {seed}: accuracy {result['accuracy']:.1%}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result


def stored(out: Path, name: str, seeds: Iterable[int], domain: Domain) -> list[dict[str, Any]]:
    """The results that are there and were made for the domain as it is now."""
    paths = [out / f"{name}-{seed}" / "result.json" for seed in seeds]
    results = [read_json(path, "") for path in paths if path.is_file()]
    return [result for result in results if result["ours"] == identity(domain)]


def run_jobs(jobs: Sequence[tuple[str, Callable[[], Any]]]) -> int:
    """Runs all; what another process is at is left for the end, and a failure does not keep the others back.

    Returns:
        how many failed.
    """
    failures = 0
    waiting = list(jobs)
    while waiting:
        busy = []
        for title, job in waiting:
            try:
                job()
            except Timeout:
                busy.append((title, job))
            # Ctrl-C ends the benchmark; that run begins afresh
            except TrainingInterrupted as interrupted:
                sys.exit(128 + interrupted.signal)
            except Exception as error:  # hours of other runs should not be lost with it
                failures += 1
                print(f"{title}: failed: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
        if len(busy) == len(waiting):  # all that is left, others are at
            print(
                f"waiting for another process: {', '.join(title for title, _ in busy)}", flush=True
            )
            time.sleep(20)
        waiting = busy
    if failures:
        print(
            f"{failures} runs failed; the same command tries them again",
            file=sys.stderr,
            flush=True,
        )
    return failures


def _link(link: Path, target: Path) -> None:
    """A relative symbolic link to a folder, whatever link was there before.

    A folder of its own stays.
    """
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        return
    link.unlink(missing_ok=True)
    link.symlink_to(
        os.path.relpath(target.resolve(), link.parent.resolve()), target_is_directory=True
    )


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What is printed goes to a file: the benchmark prints a line a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
