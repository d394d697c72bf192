"""python -m benchmarks.recipes [DOMAIN] [--images FOLDER] [--base MODEL] [--seeds 701 702 703]

What our recipe is worth beside simpler ones (the base as it is, a linear probe, all weights at
once, the article's), and what each choice in it is worth: variants with one change each. All on the
same data and the same test images. Writes the domain's table into docs/ablations.md, with a
picture.

Each recipe and seed has a folder of its own under OUT with a result.json: an interrupted benchmark
goes on where it was. It reads the test split, which is its to name: nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import softmax
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

import train
from benchmarks.comparison import OURS, draw, footnote, markdown_table, summary, write_docs
from data_prep.prepare import DATA_SETTINGS, prepare
from nicheclip.clip import encode_images, encode_texts, image_side, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation import metrics
from nicheclip.evaluation.calibration import fit_temperature
from nicheclip.evaluation.ood import PER_KIND, ood_pictures
from nicheclip.evaluation.probe import fit_probe
from nicheclip.evaluation.robustness import retention_accuracy
from nicheclip.files import read_json, write_json
from nicheclip.run import load_prepared, load_retention
from nicheclip.training.arguments import StagedTrainingArguments

ROOT = Path(__file__).parents[1]
ARTICLE = ROOT / "domains" / "architecture" / "article.yaml"
ARTICLE_RATES = (5e-6, 5e-7)
FULL_RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # of all weights at once; validation chooses
Result = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        overrides: top-level keys of the domain that are replaced; those that the data depends on
            get data of their own.
        run: what gives the result if nothing is trained: (data run, domain) -> result.
    """

    title: str
    overrides: dict[str, Any] = field(default_factory=dict)
    run: Callable[[Path, Domain], Result] | None = None


def recipes(domain: Domain) -> dict[str, Recipe]:
    """All recipes of a domain, ours among them; those that would be ours again are left out."""
    stages = [stage.model_dump(mode="json") for stage in domain.stages]
    first, last = stages[0], stages[-1]
    epochs = sum(stage["epochs"] for stage in stages)
    article = Domain.load(ARTICLE).model_dump(mode="json", include={"stages", "training"})
    no_filter = domain.quality_filter.model_dump(mode="json") | {"mode": "none", "threshold": None}
    batch = {k: v for k, v in domain.training.items() if k == "per_device_train_batch_size"}
    plain = {"training": batch | {"loss": "multi_positive", "cluster_share": 0.0}}

    def one_stage(like: dict[str, Any], rate: float) -> dict[str, Any]:
        return {"stages": [like | {"name": "all", "epochs": epochs, "learning_rate": rate}]}

    def rates(rate: Callable[[int, float], float]) -> dict[str, Any]:
        changed = [
            stage | {"learning_rate": rate(index, stage["learning_rate"])}
            for index, stage in enumerate(stages)
        ]
        return {"stages": changed}

    def setting(name: str, value: Any) -> dict[str, Any]:
        default = StagedTrainingArguments.__dataclass_fields__[name].default
        if domain.training.get(name, default) == value:
            return {}
        return {"training": domain.training | {name: value}}

    variants = {
        "no_filter": Recipe("no quality filter", {"quality_filter": no_filter}),
        "one_stage": Recipe("one stage", one_stage(last, last["learning_rate"])),
        "reversed": Recipe("stages in reverse order", {"stages": stages[::-1]}),
        "first_only": Recipe("first stage only", one_stage(first, first["learning_rate"])),
        **{
            f"cluster_{share}": Recipe(f"cluster share {share}", setting("cluster_share", share))
            for share in (0.0, 0.5, 0.8)
        },
        **{
            loss: Recipe(f"loss {loss}", setting("loss", loss))
            for loss in ("multi_positive", "info_nce", "class_prompts")
        },
        "smoothing_0": Recipe("label smoothing 0", setting("label_smoothing_factor", 0.0)),
        "rates_third": Recipe("learning rates × 1/3", rates(lambda _, rate: rate / 3)),
        "rates_triple": Recipe("learning rates × 3", rates(lambda _, rate: rate * 3)),
        "rates_article": Recipe(
            "learning rates 5e-6 and 5e-7", rates(lambda index, _: ARTICLE_RATES[min(index, 1)])
        ),
        **{
            f"views_{count}": Recipe(f"{count or 'fresh'} views", setting("cached_views", count))
            for count in (0, 2, 4, 8)
        },
        "wise_ft": Recipe("WiSE-FT auto", setting("wise_ft", "auto")),
    }
    return {
        "zero_shot": Recipe("zero-shot, one prompt a class", run=zero_shot),
        "zero_shot_ensemble": Recipe(
            "zero-shot, prompt ensemble", run=partial(zero_shot, ensemble=True)
        ),
        "linear_probe": Recipe("linear probe", run=probe),
        **{
            f"full_{rate:g}": Recipe(
                f"all weights at once, {rate:g}",
                one_stage({"train": ["*"]}, rate) | plain,
            )
            for rate in FULL_RATES
        },
        "article": Recipe("the article's recipe", article),
        OURS: Recipe("ours"),
        **{name: recipe for name, recipe in variants.items() if recipe.overrides},
    }


def zero_shot(data_run: Path, domain: Domain, ensemble: bool = False) -> Result:
    """The base as it is, with the canonical prompts or the mean of each class's prompts."""
    model, processor = load_clip(domain.base)
    prompts, classes = domain.prompt_bank
    prototypes = None
    if ensemble:
        embeds = encode_texts(model, processor, prompts)  # (P, D)
        of_class = torch.tensor(classes, device=embeds.device)
        means = [embeds[of_class == c].mean(dim=0) for c in range(len(domain.classes))]
        prototypes = normalize(torch.stack(means), dim=-1)  # (C, D)
    return evaluate(model, processor, domain, data_run, prototypes)


def probe(data_run: Path, domain: Domain) -> Result:
    """Logistic regression on the base's frozen image_embeds, its settings chosen on validation."""
    model, processor = load_clip(domain.base)
    splits = load_prepared(data_run)
    embeds = {name: _embed(model, processor, rows) for name, rows in splits.items()}
    labels = {name: np.array(rows["label"]) for name, rows in splits.items()}
    train_set, validation = ((embeds[n], labels[n]) for n in ("train", "validation"))
    fitted = fit_probe(train_set, validation, len(domain.classes))
    logits = {name: fitted.logits(of_split) for name, of_split in embeds.items()}
    return _measures(logits, labels, splits["test"])


def fine_tune(recipe_run: Path, data_run: Path, domain: Domain, seed: int) -> Result:
    """Trains on the data of `data_run` with the stages and settings of `domain`."""
    (recipe_run / "data").symlink_to((data_run / "data").resolve(), target_is_directory=True)
    domain.save(recipe_run / "domain.yaml")
    train.train([str(recipe_run), "--seed", str(seed)])
    trained = read_json(recipe_run / "training.json", "")
    result = evaluate(*load_clip(recipe_run / "model"), domain, data_run)
    for large in ("checkpoints", "cache", "model"):
        shutil.rmtree(recipe_run / large, ignore_errors=True)
    return result | {"best_epoch": trained["best_epoch"], "alpha": trained["wise_ft"]["alpha"]}


def evaluate(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    data_run: Path,
    prototypes: torch.Tensor | None = None,
) -> Result:
    """What a model is worth on the test split, its temperature fitted on calibration.

    Args:
        prototypes: (C, D), instead of the embeddings of the canonical prompts.
    """
    splits = load_prepared(data_run)
    if prototypes is None:
        prototypes = encode_texts(model, processor, domain.canonical_prompts)
    embeds = {
        name: _embed(model, processor, splits[name])
        for name in ("validation", "calibration", "test")
    }
    logits = {name: zero_shot_logits(model, embeds[name], prototypes) for name in embeds}
    labels = {name: np.array(splits[name]["label"]) for name in embeds}
    result = _measures(logits, labels, splits["test"])

    prompts, prompt_classes = domain.prompt_bank
    bank = encode_texts(model, processor, prompts).cpu().numpy()  # (P, D)
    margin = metrics.hard_negative_margin(
        embeds["test"] @ bank.T,
        np.array(prompt_classes),
        labels["test"],
        np.array(domain.class_clusters),
    )
    if np.isfinite(margin).any():
        result["hard_negative_pass_rate"] = float((margin[np.isfinite(margin)] > 0).mean())
    noise = ood_pictures("noise", image_side(processor), seed=0)
    on_noise = encode_images(model, processor, noise, PER_KIND, progress=False)
    scaled = zero_shot_logits(model, on_noise, prototypes) / result["temperature"]
    result["noise_confidence_p95"] = float(np.percentile(softmax(scaled, axis=1).max(axis=1), 95))
    rows = load_retention(data_run)
    if rows is not None and domain.retention is not None:
        images, asked = (row["image"] for row in rows), domain.retention.canonical_prompts
        told = retention_accuracy(
            model, processor, images, np.array(rows["label"]), asked, progress=False
        )
        result["retention"] = told.value
    return result


def _embed(model: CLIPModel, processor: CLIPProcessor, rows: datasets.Dataset) -> np.ndarray:
    images = (row["image"] for row in rows)
    return encode_images(model, processor, images, len(rows), progress=False)


def _measures(
    logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], test: datasets.Dataset
) -> Result:
    """What any classifier has; which test images are right, to pool and pair them."""
    try:
        temperature = fit_temperature(logits["calibration"], labels["calibration"])
    except ValueError:  # all right or all wrong: the images can't identify it
        temperature = 1.0
    raw = softmax(logits["test"], axis=1)
    calibrated = softmax(logits["test"] / temperature, axis=1)
    right = metrics.correct(calibrated, labels["test"])
    predicted, classes = calibrated.argmax(axis=1), calibrated.shape[1]
    on_validation = metrics.correct(logits["validation"], labels["validation"])
    return {
        "accuracy": float(right.mean()),
        "validation_accuracy": float(on_validation.mean()),
        "macro_f1": metrics.macro_f1(predicted, labels["test"], classes),
        "ece_before_calibration": metrics.expected_calibration_error(raw.max(axis=1), right),
        "ece": metrics.expected_calibration_error(calibrated.max(axis=1), right),
        "temperature": temperature,
        "test": {
            "image": [digest[:16] for digest in test["sha256"]],
            "group": list(test["group_id"]),
            "right": right.astype(int).tolist(),
        },
    }


def prepared(domain: Domain, images: str | None, seed: int, out: Path, name: str) -> Path:
    """OUT/NAME-SEED, a run directory that holds the prepared data; made anew if it would differ."""
    run = out / f"{name}-{seed}"
    keys = {"base", "source", "classes", "clusters", "retention", *DATA_SETTINGS}
    made_of = domain.model_dump(mode="json", include=keys) | {"images": images, "seed": seed}
    record = run / "made_of.json"
    if not (record.is_file() and read_json(record, "") == made_of):
        print(f"{run.name}: preparing …", flush=True)
        record.unlink(missing_ok=True)
        prepare(domain, run, images, seed)
        write_json(record, made_of)
    return run


def result_of(name: str, recipe: Recipe, domain: Domain, seed: int, args: Any) -> Result:
    """The result of a recipe with one seed: what lies there, if it was made of the same."""
    domain = Domain.model_validate(domain.model_dump(mode="json") | recipe.overrides)
    own_data = sorted(set(recipe.overrides) & DATA_SETTINGS)
    data_run = prepared(domain, args.images, seed, args.out, "-".join(["data", *own_data]))
    data = read_json(data_run / "data" / "report.json", "")["fingerprint"]
    made_of = json.loads(json.dumps({"domain": domain.model_dump(mode="json"), "data": data}))
    run = args.out / f"{name}-{seed}"
    if (run / "result.json").is_file():
        found = read_json(run / "result.json", "")
        if found["made_of"] == made_of:
            return found
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    started = time.perf_counter()
    with (run / "log.txt").open("w", encoding="utf-8") as log:
        with redirect_stdout(log), redirect_stderr(log):
            if recipe.run is not None:
                result = recipe.run(data_run, domain)
            else:
                result = fine_tune(run, data_run, domain, seed)
    seconds = round(time.perf_counter() - started, 1)
    result |= {"name": name, "seed": seed, "seconds": seconds, "made_of": made_of}
    write_json(run / "result.json", result)
    print(f"{name}, seed {seed}: accuracy {result['accuracy']:.1%}, {seconds:.0f} s", flush=True)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domain", nargs="?", default="domains/facades", help="a domain file")
    parser.add_argument("--images", help="class folders or a dataset instead of the domain's own")
    parser.add_argument("--base", help="a Hub id or a folder instead of the domain's own base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[701, 702, 703])
    parser.add_argument("--out", type=Path, help="where the runs lie")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these recipes only")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where ablations.md lies")
    args = parser.parse_args()
    domain = Domain.load(args.domain, base=args.base)
    args.out = args.out or Path("runs/benchmarks") / f"recipes-{domain.name}"
    listed = recipes(domain)
    if unknown := sorted(set(args.only or []) - set(listed)):
        parser.error(f"--only {unknown[0]}: expected of {', '.join(listed)}")
    found: dict[str, list[Result]] = {}
    failures = 0
    for name in args.only or listed:
        for seed in args.seeds:
            try:
                result = result_of(name, listed[name], domain, seed, args)
                found.setdefault(name, []).append(result)
            except train.TrainingInterrupted as interrupted:
                sys.exit(128 + interrupted.signal)
            except Exception as error:  # hours of other runs should not be lost with it
                failures += 1
                print(f"{name}, seed {seed}: failed: {error}", flush=True)
                traceback.print_exc()
    ours = found.get(OURS, [])
    rows = {listed[name].title: summary(results, ours) for name, results in found.items()}
    if rows:
        note = footnote(rows, domain)
        print("\n\n".join(["", markdown_table(rows), note]))
        write_json(args.out / "recipes.json", {"domain": domain.name, "rows": rows, "note": note})
    if ours and not args.only:
        draw(domain, rows, args.docs / "images")
        write_docs(args.docs / "ablations.md", domain, markdown_table(rows), note)
    if failures:
        sys.exit(f"{failures} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
