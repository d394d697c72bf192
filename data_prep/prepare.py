"""The way from images to `RUN/data`: every image read is kept, quarantined or dropped, and counted."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from PIL import Image
from scipy.special import softmax

from data_prep.divide import Catalogue, Division, divide
from data_prep.duplicates import Fingerprints
from data_prep.encode import encode_rows, fast_dtype
from data_prep.quality import Verdict, judge, out_of_fold_probabilities, visits_per_epoch
from data_prep.report import write_report
from data_prep.review import Suspicion, read_decisions, write_review
from data_prep.shards import map_shards, processes
from data_prep.sources import fetch_images, planted_faults, read_source
from data_prep.sources.facades import found_faults
from data_prep.sources.rows import check_classes
from data_prep.verify import verify_rows
from nicheclip.data import SPLITS, features, quiet_datasets
from nicheclip.domain import Domain
from nicheclip.results import replaced_folder, write_json
from nicheclip.zero_shot import encode_images, encode_texts, load_clip, zero_shot_logits

SMALL_EXAM = 10  # test images of a class; with fewer, its own accuracy says next to nothing


def prepare(
    domain: Domain, run: str | Path, images: str | Path | None = None, seed: int = 0, contact: str | None = None
) -> dict[str, Any] | None:
    """Makes `run`/data (a DatasetDict, report.json and report.html), `run`/review.csv and `run`/domain.yaml.

    A killed run goes on where it was: finished shards of verified and encoded images lie in `run`/cache, which also
    makes the next run quick and may be removed. Under `accelerate launch` the processes share the shards.

    Args:
        images: class folders or a dataset to read instead of the domain's own source.
        seed: of the painter and of all random choices.
        contact: how to reach who runs this, for Wikimedia Commons.

    Returns:
        the report, as in report.json; None in all processes but the main one.

    Raises:
        ValueError: if a split would have no image of a class, or the images don't fit the domain.
        RuntimeError: if after all a picture lies on both sides of a split.
    """
    run = Path(run)
    if (run / "data").exists() and not (run / "data" / "dataset_dict.json").is_file():
        raise ValueError(f"'{run / 'data'}' is not prepared data and would be overwritten; choose another --run")
    state = processes()
    decided = read_decisions(run / "review.csv")
    fetched = [fetch_images(domain, run, images, seed, contact) if state.is_main_process else None]
    location = broadcast_object_list(fetched)[0]
    with quiet_datasets():
        listed, unplaced = read_source(domain, location, own=images is None)
        rows, unreadable = _verify(listed, domain, run / "cache" / "verified")
        model, processor = load_clip(domain.base)
        image_embeds = encode_rows(model, processor, rows, run / "cache" / "encoded", "encoding with the base model")
        if not state.is_main_process:
            return None
        pictures = rows.select_columns("image").cast_column("image", datasets.Image())
        catalogue = Catalogue.of(rows)
        fingerprints = Fingerprints.make(
            rows["phash"][:],
            image_embeds,
            picture=lambda index: pictures[index]["image"],
            encode=lambda copies: encode_images(
                model, processor, copies, len(copies), dtype=fast_dtype(model.device), progress=False
            ),
        )
        decisions = {key: line.decision for key, line in decided.items()}
        division = divide(catalogue, fingerprints, domain, decisions, seed)

        text_embeds = encode_texts(model, processor, domain.canonical_prompts)
        zero_shot = softmax(zero_shot_logits(model, image_embeds, text_embeds), axis=1)  # (N, C)
        train = np.flatnonzero(division.parts == "train")
        verdict = _judge_train(domain, catalogue, division, train, image_embeds, zero_shot, seed)
        suspects = _suspects(domain, catalogue, train, verdict, decisions)
        dropped = {entry["source_id"] for entry in suspects if entry["outcome"] == "dropped"}
        splits = _splits(rows, domain, catalogue, division, dropped, zero_shot, seed)

        aside = [
            {"source_id": catalogue.source_ids[index], "label": catalogue.class_names[index], "reason": reason}
            for index, reason in sorted(division.reasons.items())
        ]
        report = {
            "domain": domain.name,
            "base": domain.base,
            "images": str(location),
            "seed": seed,
            "fingerprint": fingerprint(splits),
            "near_duplicate_cosines": [round(cosine, 4) for cosine in fingerprints.cosines],
            **_counts(domain, splits, unplaced + unreadable + aside, suspects, verdict, len(listed) + len(unplaced)),
            "mended": dict(Counter(what for note in rows["mended"][:] if note for what in note.split("; "))),
            "quarantined": unplaced + unreadable + aside,
            "suspects": suspects,
            "least_likely_kept": _least_likely_kept(domain, catalogue, train, verdict, dropped),
            "near_duplicates": _near_duplicates(splits),
            "alike_across_splits": _alike_across_splits(catalogue, division, fingerprints),
        }
        if truth := planted_faults(location):
            report["planted_faults"] = found_faults(
                truth, report, dict(zip(catalogue.source_ids, division.groups.tolist(), strict=True))
            )
        index_of = {source_id: index for index, source_id in enumerate(catalogue.source_ids)}
        _save(splits, report, domain, run, lambda source_id: pictures[index_of[source_id]]["image"])
        write_review(run / "review.csv", _suspicions(report), decided)
    return report


def _verify(listed: datasets.Dataset, domain: Domain, cache: Path) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """The readable rows with their stored image, hashes and what was mended; and why the others are not."""
    sides = {"stored_short_side": domain.stored_short_side, "smallest_side": domain.smallest_side}
    identity = [" ".join(pair) for pair in zip(listed["source_id"], listed["version"], strict=True)]
    verified = map_shards(
        listed, partial(verify_rows, **sides), identity, f"1 {sides}", cache, "verifying images", parallel=True
    )
    rows = datasets.concatenate_datasets([listed.remove_columns(["image", "version"]), verified], axis=1)
    errors = rows["error"][:]
    unreadable = [
        {"source_id": source_id, "label": label, "reason": error}
        for source_id, label, error in zip(rows["source_id"], rows["class_name"], errors, strict=True)
        if error is not None
    ]
    readable = rows.select([index for index, error in enumerate(errors) if error is None])
    check_classes(set(readable["class_name"]), domain.class_names, f"the {len(readable)} readable images")
    return readable, unreadable


def _judge_train(
    domain: Domain,
    catalogue: Catalogue,
    division: Division,
    train: np.ndarray,
    image_embeds: np.ndarray,
    zero_shot: np.ndarray,
    seed: int,
) -> Verdict:
    labels = domain.indices(catalogue.class_names)[train]
    if domain.quality_filter.mode == "linear_probe":
        probabilities = out_of_fold_probabilities(
            image_embeds[train], labels, division.groups[train], len(domain.classes), seed
        )
    else:
        probabilities = zero_shot[train]
    return judge(probabilities, labels, domain.quality_filter)


def _suspects(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict, decisions: dict[tuple[str, str], str]
) -> list[dict[str, Any]]:
    """The suspected training images, the most suspect first, and what becomes of each."""
    suspects = []
    for position in np.flatnonzero(verdict.suspect)[np.argsort(verdict.scores[verdict.suspect], kind="stable")]:
        entry = _judged(domain, catalogue, train, verdict, position)
        by_hand = decisions.get((entry["source_id"], entry["label"])) == "keep"
        drop = domain.quality_filter.action == "drop"
        suspects.append(entry | {"outcome": "kept by hand" if by_hand else "dropped" if drop else "flagged"})
    return suspects


def _judged(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict, position: int
) -> dict[str, Any]:
    return {
        "source_id": catalogue.source_ids[train[position]],
        "label": catalogue.class_names[train[position]],
        "suspected_label": domain.class_names[verdict.suspected_labels[position]],
        "score": round(float(verdict.scores[position]), 5),
    }


def _least_likely_kept(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict, dropped: set[str], count: int = 24
) -> list[dict[str, Any]]:
    order = np.argsort(verdict.scores, kind="stable")
    kept = [position for position in order if catalogue.source_ids[train[position]] not in dropped]
    return [_judged(domain, catalogue, train, verdict, position) for position in kept[:count]]


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
    labels = domain.indices(catalogue.class_names)
    rows = rows.select_columns(["image", "source_id", "sha256", "attribution"])
    splits = {}
    for name in SPLITS:
        own = np.flatnonzero(division.parts == name)
        if name == "train":
            own = np.array([index for index in own if catalogue.source_ids[index] not in dropped])
            repeats = visits_per_epoch(labels[own], domain.samples_per_class, np.random.default_rng(seed))
        added = {
            "label": labels[own],
            "group_id": division.groups[own],
            "zero_shot_score": zero_shot[own, labels[own]] if name == "train" else [None] * len(own),
            "repeats": repeats if name == "train" else np.ones(len(own)),
        }
        columns = datasets.Dataset.from_dict(added, features=datasets.Features({key: schema[key] for key in added}))
        split = datasets.concatenate_datasets([rows.select(own), columns], axis=1)
        splits[name] = split.select_columns(list(schema)).cast(schema)
    return splits


def _counts(
    domain: Domain,
    splits: dict[str, datasets.Dataset],
    quarantined: list[dict[str, str]],
    suspects: list[dict[str, Any]],
    verdict: Verdict,
    read: int,
) -> dict[str, Any]:
    """How many images went which way, in all and of each class.

    Raises:
        RuntimeError: if any image is unaccounted for.
    """
    kept = {name: len(rows) for name, rows in splits.items()}
    dropped = Counter(entry["label"] for entry in suspects if entry["outcome"] == "dropped")
    if read != sum(kept.values()) + len(quarantined) + dropped.total():
        raise RuntimeError(f"{read} images read; {kept} kept, {len(quarantined)} aside, {dropped.total()} dropped")
    sizes = {name: Counter(rows["label"][:]) for name, rows in splits.items()}
    aside = Counter(entry.get("label") for entry in quarantined)
    train = splits["train"]
    visits = np.bincount(train["label"][:], train["repeats"][:], len(domain.classes)).astype(int).tolist()
    classes = []
    for index, name in enumerate(domain.class_names):
        entry = {"name": name, **{split: sizes[split][index] for split in SPLITS}}
        entry |= {"quarantined": aside[name], "visits": visits[index]}
        classes.append(entry | {"filter": verdict.classes[index] | {"dropped": dropped[name]}})
    return {
        "counts": {
            "read": read,
            "quarantined": dict(Counter(entry["reason"].split(":")[0] for entry in quarantined)),
            "dropped_by_filter": dropped.total(),
            "kept": kept,
            "train_visits_per_epoch": sum(visits),
        },
        "filter": domain.quality_filter.model_dump(),
        "classes": classes,
        "warnings": _warnings(classes),
    }


def _warnings(classes: list[dict[str, Any]]) -> list[str]:
    """What a person should know before training, in words."""
    warnings = []
    for entry in classes:
        wanted, images = entry["filter"]["wanted"], entry["filter"]["images"]
        if wanted > entry["filter"]["suspect"]:
            warnings.append(
                f"{entry['name']}: the filter wanted {wanted / images:.0%} of it; that is a class which the base "
                "model does not know, not noise, so the cap held it back"
            )
        if entry["test"] < SMALL_EXAM:
            warnings.append(
                f"{entry['name']}: only {entry['test']} test images, so its own accuracy will say next to nothing; "
                "add images, or merge it with a class that it is like"
            )
    return warnings


def fingerprint(splits: dict[str, datasets.Dataset]) -> str:
    """Which images lie in which split under which label; later stages compare it."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for sha256, label in sorted(zip(splits[name]["sha256"], splits[name]["label"], strict=True)):
            digest.update(f"{name} {sha256} {label}\n".encode())
    return digest.hexdigest()


def _near_duplicates(splits: dict[str, datasets.Dataset]) -> list[list[str]]:
    """The source_ids of each group of near-duplicates that are kept, the largest group first."""
    members = defaultdict(list)
    for rows in splits.values():
        for group, source_id in zip(rows["group_id"], rows["source_id"], strict=True):
            members[group].append(source_id)
    return sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)


def _alike_across_splits(
    catalogue: Catalogue, division: Division, fingerprints: Fingerprints, count: int = 12
) -> list[dict[str, Any]]:
    """The pairs of pictures in different splits that the base model finds most alike."""
    used = np.flatnonzero(division.parts != "")
    pairs = fingerprints.take(used).most_alike_across(np.unique(division.parts[used], return_inverse=True)[1], count)
    return [
        {
            "source_ids": [catalogue.source_ids[used[index]] for index in pair],
            "splits": [str(division.parts[used[index]]) for index in pair],
            "cosine": round(cosine, 4),
        }
        for *pair, cosine in pairs
    ]


def _suspicions(report: dict[str, Any]) -> list[Suspicion]:
    conflicts = [
        Suspicion(entry["source_id"], entry["label"], entry["reason"], outcome="set aside")
        for entry in report["quarantined"]
        if entry["reason"].startswith("conflict")
    ]
    wrong = [
        Suspicion(**entry | {"score": f"{entry['score']:.5f}", "reason": "wrong label?"})
        for entry in report["suspects"]
    ]
    return conflicts + wrong


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
