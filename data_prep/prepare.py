"""The way from images to `RUN/data`: every image read is kept, quarantined or dropped, and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from PIL import Image
from scipy.special import softmax
from transformers import CLIPModel, CLIPProcessor

from data_prep import clusters, findings
from data_prep.divide import Catalogue, Division, divide
from data_prep.duplicates import Fingerprints
from data_prep.encode import encode_rows
from data_prep.quality import Verdict, judge, out_of_fold_probabilities, samples_per_epoch
from data_prep.report import write_report
from data_prep.review import read_decisions, write_review
from data_prep.sources import fetch_images, read_source
from data_prep.sources.facades import found_faults, planted_faults
from data_prep.sources.rows import check_classes
from data_prep.verify import VERIFY_VERSION, verify_rows
from nicheclip.cached_map import map_shards
from nicheclip.clip import encode_images, encode_texts, fast_dtype, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.files import quiet_datasets, replaced_folder, write_json
from nicheclip.processes import processes
from nicheclip.run import SPLITS, features, provenance, run_lock

DATA_SETTINGS = {
    "splits",
    "quality_filter",
    "samples_per_class",
    "smallest_side",
    "stored_short_side",
}


def prepare(
    domain: Domain,
    run: str | Path,
    images: str | Path | None = None,
    seed: int = 0,
    contact: str | None = None,
) -> dict[str, Any] | None:
    """Makes `run`/data (a DatasetDict, report.json and report.html), `run`/review.csv and `run`/domain.yaml.

    A killed run goes on where it was: finished shards of verified and encoded images lie in
    `run`/cache, which also makes the next run quick and may be removed. Under `accelerate launch`
    the processes share the shards.

    Args:
        images: class folders or a dataset to read instead of the domain's own source.
        seed: of the painter and of all random choices.
        contact: how to reach who runs this, for Wikimedia Commons.

    Returns:
        the report, as in report.json; None in all processes but the main one.

    Raises:
        ValueError: if a split would have no image of a class, or the images don't fit the domain.
        BlockingIOError: if another command is at work on the run.
        RuntimeError: if after all a picture lies on both sides of a split.
    """
    run = Path(run)
    if (run / "data").exists() and not (run / "data" / "dataset_dict.json").is_file():
        raise ValueError(
            f"'{run / 'data'}' is not prepared data and would be overwritten; choose another --run"
        )
    state = processes()
    with run_lock(run), quiet_datasets(), _uncached():
        # The second file is of calibrate.py's errors.html; where both decide, review.csv does.
        decided = read_decisions(run / "review_errors.csv") | read_decisions(run / "review.csv")
        fetched = [
            fetch_images(domain, run, images, seed, contact) if state.is_main_process else None
        ]
        location = broadcast_object_list(fetched)[0]
        listed, unplaced = read_source(domain, location, own=images is None)
        rows, unreadable = _verify(listed, domain, run / "cache" / "verified")
        model, processor = load_clip(domain.base)
        image_embeds = encode_rows(
            model, processor, rows, run / "cache" / "encoded", "encoding with the base model"
        )
        if not state.is_main_process:
            return None
        text_embeds = encode_texts(model, processor, domain.canonical_prompts)
        zero_shot = softmax(zero_shot_logits(model, image_embeds, text_embeds), axis=1)  # (N, C)
        pictures = rows.select_columns("image").cast_column("image", datasets.Image())
        fingerprints = _fingerprints(model, processor, rows, pictures, image_embeds)
        catalogue = Catalogue.of(rows, domain)
        decisions = {key: line.decision for key, line in decided.items()}
        division = divide(catalogue, fingerprints, domain, decisions, seed)
        train = np.flatnonzero(division.parts == "train")
        verdict = _judge_train(
            domain, catalogue, division, train, image_embeds, zero_shot, decisions, seed
        )
        suspects = findings.suspects(domain, catalogue, train, verdict)
        dropped = {entry["source_id"] for entry in suspects if entry["outcome"] == "dropped"}
        splits = _splits(rows, domain, catalogue, division, dropped, zero_shot, seed)

        aside = [
            {**catalogue.name(index), "sha256": catalogue.sha256[index], "reason": reason}
            for index, reason in sorted(division.reasons.items())
        ]
        quarantined: list[dict[str, Any]] = [*unplaced, *unreadable, *aside]
        for entry in quarantined:  # until the steps give data
            kind, _, detail = entry["reason"].partition(": ")
            kind = "no class" if kind in ("no label", "not in a class folder") else kind
            entry.update(kind=kind, other=None, detail=detail, label=entry.get("label"))
        alike = findings.alike_across_splits(catalogue, division, fingerprints)
        classes = findings.classes(domain, splits, quarantined, suspects, verdict)
        report = {
            "provenance": provenance(),
            "domain": domain.name,
            "base": domain.base,
            "images": str(location),
            "seed": seed,
            "settings": domain.model_dump(mode="json", include=DATA_SETTINGS),
            "fingerprint": fingerprint(splits, domain),
            "near_duplicate_cosines": [round(cosine, 4) for cosine in fingerprints.cosines],
            "counts": findings.counts(
                splits, quarantined, len(dropped), len(listed) + len(unplaced)
            ),
            "filter": domain.quality_filter.model_dump(),
            "classes": classes,
            "warnings": [
                *findings.class_warnings(classes),
                *findings.unused_decisions(catalogue, decided),
                *findings.alike_warning(alike, fingerprints),
            ],
            "mended": dict(
                Counter(what for note in rows["mended"][:] if note for what in note.split("; "))
            ),
            "quarantined": quarantined,
            "suspects": suspects,
            "least_likely_kept": findings.least_likely_kept(
                domain, catalogue, train, verdict, dropped
            ),
            "near_duplicates": findings.near_duplicates(splits, domain.class_names),
            "alike_across_splits": alike,
            "confusions": clusters.measure(
                domain, catalogue, division, dropped, image_embeds, zero_shot, seed
            ),
        }
        if truth := planted_faults(location):
            group_of = dict(zip(catalogue.source_ids, division.groups.tolist(), strict=True))
            report["planted_faults"] = found_faults(truth, report, group_of)
        index_of = {source_id: index for index, source_id in enumerate(catalogue.source_ids)}
        _save(splits, report, domain, run, lambda source_id: pictures[index_of[source_id]]["image"])
        write_review(run / "review.csv", findings.suspicions(report))
    return report


@contextmanager
def _uncached() -> Iterator[None]:
    """`datasets` would leave its intermediate tables beside the shards, or in the user's own dataset."""
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def _verify(
    listed: datasets.Dataset, domain: Domain, cache: Path
) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """The readable rows with their stored image, hashes and what was mended.

    And why the others are not.
    """
    sides = {"stored_short_side": domain.stored_short_side, "smallest_side": domain.smallest_side}
    identity = [" ".join(pair) for pair in zip(listed["source_id"], listed["version"], strict=True)]
    verified = map_shards(
        listed.select_columns("image"),
        partial(verify_rows, **sides),
        identity,
        f"{VERIFY_VERSION} {sides}",
        cache,
        "verifying images",
        parallel=True,
    )
    rows = datasets.concatenate_datasets(
        [listed.remove_columns(["image", "version"]), verified], axis=1
    )
    errors = rows["error"][:]
    unreadable = [
        {"source_id": source_id, "label": label, "reason": error}
        for source_id, label, error in zip(
            rows["source_id"], rows["class_name"], errors, strict=True
        )
        if error is not None
    ]
    readable = rows.select([index for index, error in enumerate(errors) if error is None])
    check_classes(
        set(readable["class_name"]), domain.class_names, f"the {len(readable)} readable images"
    )
    return readable, unreadable


def _fingerprints(
    model: CLIPModel,
    processor: CLIPProcessor,
    rows: datasets.Dataset,
    pictures: datasets.Dataset,
    image_embeds: np.ndarray,
) -> Fingerprints:
    dtype = fast_dtype(model.device)
    return Fingerprints.make(
        rows["phash"][:],
        rows["mirrored_phash"][:],
        image_embeds,
        picture=lambda index: pictures[index]["image"],
        encode=lambda copies: encode_images(
            model, processor, copies, len(copies), dtype=dtype, progress=False
        ),
    )


def _judge_train(
    domain: Domain,
    catalogue: Catalogue,
    division: Division,
    train: np.ndarray,
    image_embeds: np.ndarray,
    zero_shot: np.ndarray,
    decisions: dict[tuple[str, str], str],
    seed: int,
) -> Verdict:
    labels = catalogue.labels[train]
    kept_by_hand = [
        decisions.get((catalogue.sha256[i], catalogue.class_names[i])) == "keep" for i in train
    ]
    if domain.quality_filter.mode == "linear_probe":
        probabilities = out_of_fold_probabilities(
            image_embeds[train], labels, division.groups[train], len(domain.classes), seed
        )
    else:
        probabilities = zero_shot[train]
    return judge(probabilities, labels, domain.quality_filter, np.array(kept_by_hand, dtype=bool))


def _splits(
    rows: datasets.Dataset,
    domain: Domain,
    catalogue: Catalogue,
    division: Division,
    dropped: set[str],
    zero_shot: np.ndarray,
    seed: int,
) -> dict[str, datasets.Dataset]:
    schema = features(domain.class_names)
    labels = catalogue.labels
    rows = rows.select_columns(["image", "source_id", "sha256", "attribution"])
    rows = rows.cast_column("image", schema["image"])
    splits = {}
    for name in SPLITS:
        own = np.flatnonzero(division.parts == name)
        if name == "train":
            own = np.array([index for index in own if catalogue.source_ids[index] not in dropped])
            repeats = samples_per_epoch(
                labels[own], domain.samples_per_class, np.random.default_rng(seed)
            )
        added = {
            "label": labels[own],
            "group_id": division.groups[own],
            "zero_shot_score": zero_shot[own, labels[own]]
            if name == "train"
            else [None] * len(own),
            "repeats": repeats if name == "train" else np.ones(len(own)),
        }
        columns = datasets.Dataset.from_dict(
            added, features=datasets.Features({key: schema[key] for key in added})
        )
        split = datasets.concatenate_datasets([rows.select(own), columns], axis=1)
        splits[name] = split.select_columns(list(schema))
    return splits


def fingerprint(splits: dict[str, datasets.Dataset], domain: Domain) -> str:
    """What training and the exam see: which images, how large, under which label, how often.

    Later stages compare.
    """
    digest = hashlib.sha256(f"{domain.stored_short_side}\n".encode())
    for name in SPLITS:
        columns = (splits[name][column] for column in ("sha256", "label", "repeats"))
        for sha256, label, repeats in sorted(zip(*columns, strict=True)):
            digest.update(f"{name} {sha256} {label} {repeats}\n".encode())
    return digest.hexdigest()


def _save(
    splits: dict[str, datasets.Dataset],
    report: dict[str, Any],
    domain: Domain,
    run: Path,
    picture: Callable[[str], Image.Image],
) -> None:
    with replaced_folder(run / "data") as folder:
        datasets.DatasetDict(splits).save_to_disk(folder)
        write_json(folder / "report.json", report)
        write_report(folder / "report.html", report, domain, picture)
    domain.save(run / "domain.yaml")
