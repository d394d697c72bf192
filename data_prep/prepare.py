"""The way from images to `RUN/data`: each image read is kept, set aside or dropped, and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from scipy.special import softmax
from transformers import CLIPModel, CLIPProcessor

from data_prep import findings
from data_prep.clusters import measure
from data_prep.divide import Catalogue, Decisions, Division, divide
from data_prep.duplicates import Fingerprints
from data_prep.encode import encode_rows
from data_prep.quality import Verdict, judge, out_of_fold_probabilities, samples_per_epoch
from data_prep.report import write_report
from data_prep.review import read_decisions, write_review
from data_prep.sources import fetch_images, read_source, retention_rows
from data_prep.sources.rows import check_classes
from data_prep.verify import VERIFY_VERSION, verify_rows
from nicheclip.cached_map import map_shards
from nicheclip.clip import encode_images, encode_texts, fast_dtype, load_clip, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.files import quiet_datasets, replaced_folder, write_json
from nicheclip.processes import processes
from nicheclip.run import SPLITS, features, provenance, run_lock

# What a prepared run depends on; a change of it asks for data_prep again.
DATA_SETTINGS = set(
    "retention splits quality_filter samples_per_class smallest_side stored_short_side".split()
)
Entry = findings.Entry


class Report(TypedDict):
    """report.json: what went in, what came out, and what someone should look at.

    Entries of images have source_id, label and sha256. Those that are `quarantined` have a kind,
    `other` (the image that it is about) and `detail` as well, and `suspects` a suspected_label, a
    score and their outcome.
    """

    provenance: dict[str, Any]
    domain: str
    base: str
    images: str
    seed: int
    settings: dict[str, Any]  # of the domain, those that the data depends on
    fingerprint: str
    near_duplicate_cosines: list[float]
    counts: dict[str, Any]
    filter: dict[str, Any]
    classes: list[Entry]
    warnings: list[str]
    mended: dict[str, int]
    quarantined: list[Entry]
    suspects: list[Entry]
    least_likely_kept: list[Entry]
    near_duplicates: list[list[dict[str, str]]]
    alike_across_splits: list[Entry]
    confusions: dict[str, Any]


def prepare(
    domain: Domain,
    run: str | Path,
    images: str | Path | None = None,
    seed: int = 0,
    contact: str | None = None,
) -> Report | None:
    """Makes `run`/data (a DatasetDict, report.json and report.html), review.csv and domain.yaml.

    A killed run goes on where it was: finished shards of verified and encoded images lie in
    `run`/cache, which also makes the next run quick and may be removed. Under `accelerate launch`
    the processes share the shards.

    Args:
        images: class folders or a dataset to read instead of the domain's own source.
        seed: of a module that draws, and of all random choices.
        contact: how to reach who runs this, for Wikimedia Commons.

    Returns:
        the report; None in all processes but the main one.

    Raises:
        ValueError: if a split would have no image of a class, or the images don't fit the domain.
        BlockingIOError: if another command is at work on the run.
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
        decisions = {key: line.decision for key, line in decided.items()}
        fetched: list[str | Path | None] = [None]
        if state.is_main_process:
            fetched = [fetch_images(domain, run, images, seed, contact)]
        (location,) = broadcast_object_list(fetched)
        listed, unplaced = read_source(domain, location, own=images is None)
        rows, unreadable = _verify(listed, domain, run / "cache" / "verified")
        model, processor = load_clip(domain.base)
        image_embeds = encode_rows(model, processor, rows, run / "cache" / "encoded")
        if not state.is_main_process:
            return None
        prototypes = encode_texts(model, processor, domain.canonical_prompts)
        zero_shot = softmax(zero_shot_logits(model, image_embeds, prototypes), axis=1)  # (N, C)
        pictures = rows.select_columns("image").cast_column("image", datasets.Image())
        fingerprints = _fingerprints(model, processor, rows, pictures, image_embeds)
        catalogue = Catalogue.of(rows, domain)
        division = divide(catalogue, fingerprints, domain, decisions)
        train = np.flatnonzero(division.parts == "train")
        verdict = _judge(domain, catalogue, division, image_embeds, zero_shot, decisions, seed)
        suspects, least_likely = findings.judged(domain, catalogue, train, verdict)
        dropped = {entry["source_id"] for entry in suspects if entry["outcome"] == "dropped"}
        splits = _splits(rows, domain, catalogue, division, dropped, zero_shot, seed)

        aside = [
            {**catalogue.name(index), **vars(reason)}
            for index, reason in sorted(division.reasons.items())
        ]
        quarantined = unplaced + unreadable + aside
        alike = findings.alike_across_splits(catalogue, division, fingerprints)
        classes = findings.classes(domain, splits, quarantined, suspects, verdict)
        mended = (what for note in rows["mended"][:] if note for what in note.split("; "))
        read = len(listed) + len(unplaced)
        report = Report(
            provenance=provenance(),
            domain=domain.name,
            base=domain.base,
            images=str(location),
            seed=seed,
            settings=domain.model_dump(mode="json", include=DATA_SETTINGS),
            fingerprint=fingerprint(splits, domain),
            near_duplicate_cosines=[round(cosine, 4) for cosine in fingerprints.cosines],
            counts=findings.counts(splits, quarantined, len(dropped), read),
            filter=domain.quality_filter.model_dump(),
            classes=classes,
            warnings=findings.warnings(classes, catalogue, decided, alike, fingerprints),
            mended=dict(Counter(mended)),
            quarantined=quarantined,
            suspects=suspects,
            least_likely_kept=least_likely,
            near_duplicates=findings.near_duplicates(splits, domain.class_names),
            alike_across_splits=alike,
            confusions=measure(domain, catalogue, division, dropped, image_embeds, zero_shot, seed),
        )
        _save(splits, report, domain, run, catalogue, pictures)
        write_review(run / "review.csv", findings.suspicions(quarantined, suspects))
    return report


@contextmanager
def _uncached() -> Iterator[None]:
    """`datasets` would leave its intermediate tables beside the shards, or in the user's data."""
    enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_caching()


def _verify(
    listed: datasets.Dataset, domain: Domain, cache: Path
) -> tuple[datasets.Dataset, list[Entry]]:
    """The readable rows with their stored image, hashes and what was mended; and the others."""
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
    kept_columns = listed.remove_columns(["image", "version"])
    rows = datasets.concatenate_datasets([kept_columns, verified], axis=1)
    kinds = rows["error_kind"][:]
    broken = rows.select([index for index, kind in enumerate(kinds) if kind is not None])
    unreadable = [
        {
            "source_id": row["source_id"],
            "label": row["class_name"],
            "sha256": None,
            "kind": row["error_kind"],
            "other": None,
            "detail": row["error_detail"],
        }
        for row in broken.remove_columns("image")
    ]
    readable = rows.select([index for index, kind in enumerate(kinds) if kind is None])
    found = set(readable["class_name"])
    check_classes(found, domain.class_names, f"the {len(readable)} readable images")
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


def _judge(
    domain: Domain,
    catalogue: Catalogue,
    division: Division,
    image_embeds: np.ndarray,
    zero_shot: np.ndarray,
    decisions: Decisions,
    seed: int,
) -> Verdict:
    """What the filter makes of train, in the order of its rows; what a person has kept stays."""
    train = np.flatnonzero(division.parts == "train")
    labels, probabilities = catalogue.labels[train], zero_shot[train]
    if domain.quality_filter.mode == "linear_probe":
        groups = division.groups[train]
        probabilities = out_of_fold_probabilities(
            image_embeds[train], labels, groups, len(domain.classes), seed
        )
    keys = ((catalogue.sha256[index], catalogue.class_names[index]) for index in train)
    trusted = np.array([decisions.get(key) == "keep" for key in keys], dtype=bool)
    return judge(probabilities, labels, domain.quality_filter, trusted)


def _splits(
    rows: datasets.Dataset,
    domain: Domain,
    catalogue: Catalogue,
    division: Division,
    dropped: set[str],
    zero_shot: np.ndarray,
    seed: int,
) -> dict[str, datasets.Dataset]:
    schema, labels = features(domain.class_names), catalogue.labels
    rows = rows.select_columns(["image", "source_id", "sha256", "attribution"])
    rows = rows.cast_column("image", schema["image"])
    splits = {}
    for name in SPLITS:
        own = np.flatnonzero(division.parts == name)
        scores, repeats = [None] * len(own), np.ones(len(own))
        if name == "train":
            own = np.array([i for i in own if catalogue.source_ids[i] not in dropped])
            scores = zero_shot[own, labels[own]]
            rng = np.random.default_rng(seed)
            repeats = samples_per_epoch(labels[own], domain.samples_per_class, rng)
        added = {
            "label": labels[own],
            "group_id": division.groups[own],
            "zero_shot_score": scores,
            "repeats": repeats,
        }
        of_added = datasets.Features({key: schema[key] for key in added})
        columns = datasets.Dataset.from_dict(added, features=of_added)
        split = datasets.concatenate_datasets([rows.select(own), columns], axis=1)
        splits[name] = split.select_columns(list(schema))
    return splits


def fingerprint(splits: dict[str, datasets.Dataset], domain: Domain) -> str:
    """What training and the exam see: which images, how large, which label, how often."""
    digest = hashlib.sha256(f"{domain.stored_short_side}\n".encode())
    for name in SPLITS:
        columns = (splits[name][column] for column in ("sha256", "label", "repeats"))
        for sha256, label, repeats in sorted(zip(*columns, strict=True)):
            digest.update(f"{name} {sha256} {label} {repeats}\n".encode())
    return digest.hexdigest()


def _save(
    splits: dict[str, datasets.Dataset],
    report: Report,
    domain: Domain,
    run: Path,
    catalogue: Catalogue,
    pictures: datasets.Dataset,
) -> None:
    index_of = {source_id: index for index, source_id in enumerate(catalogue.source_ids)}
    with replaced_folder(run / "data") as folder:
        datasets.DatasetDict(splits).save_to_disk(folder)
        if domain.retention is not None:
            rows = retention_rows(domain, run / "retention_images")
            rows.save_to_disk(folder / "retention")
        write_json(folder / "report.json", report)
        write_report(
            folder / "report.html",
            dict(report),
            domain,
            picture=lambda source_id: pictures[index_of[source_id]]["image"],
        )
    domain.save(run / "domain.yaml")
