"""What data_prep tells of its own work: the contents of report.json and review.csv."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import datasets
import numpy as np

from data_prep.divide import Catalogue, Division
from data_prep.duplicates import Fingerprints
from data_prep.quality import Verdict
from data_prep.report import SMALL_EXAM
from data_prep.review import Suspicion
from nicheclip.domain import Domain
from nicheclip.run import SPLITS

LEAST_LIKELY = 24  # images, and
MOST_ALIKE = 12  # pairs, for a person to look at


def counts(
    splits: dict[str, datasets.Dataset], quarantined: list[dict[str, str]], dropped: int, read: int
) -> dict[str, Any]:
    """How many images went which way.

    Raises:
        RuntimeError: if any image is unaccounted for.
    """
    kept = {name: len(rows) for name, rows in splits.items()}
    if read != sum(kept.values()) + len(quarantined) + dropped:
        raise RuntimeError(
            f"{read} images read; {kept} kept, {len(quarantined)} quarantined, {dropped} dropped"
        )
    return {
        "read": read,
        "quarantined": dict(Counter(entry["reason"].split(":")[0] for entry in quarantined)),
        "dropped_by_filter": dropped,
        "kept": kept,
        "train_samples_per_epoch": int(np.sum(splits["train"]["repeats"][:])),
    }


def classes(
    domain: Domain,
    splits: dict[str, datasets.Dataset],
    quarantined: list[dict[str, str]],
    suspects: list[dict[str, Any]],
    verdict: Verdict,
) -> list[dict[str, Any]]:
    """The same of each class."""
    sizes = {name: Counter(rows["label"][:]) for name, rows in splits.items()}
    aside = Counter(entry.get("label") for entry in quarantined)
    dropped = Counter(entry["label"] for entry in suspects if entry["outcome"] == "dropped")
    train = splits["train"]
    samples = (
        np.bincount(train["label"][:], train["repeats"][:], len(domain.classes))
        .astype(int)
        .tolist()
    )
    return [
        {
            "name": name,
            **{split: sizes[split][index] for split in SPLITS},
            "quarantined": aside[name],
            "samples": samples[index],
            "filter": verdict.classes[index] | {"dropped": dropped[name]},
        }
        for index, name in enumerate(domain.class_names)
    ]


def class_warnings(classes: list[dict[str, Any]]) -> list[str]:
    """Classes whose filter the cap held back, and those with too few test images."""
    warnings = []
    for entry in classes:
        wanted, images = entry["filter"]["wanted"], entry["filter"]["images"]
        if wanted > entry["filter"]["suspect"]:
            warnings.append(
                f"{entry['name']}: the filter wanted {wanted} of {images} images "
                f"({wanted / images:.0%}); this is rather a class that the base model does not "
                f"know, not noise, and the cap held the filter to {entry['filter']['suspect']}"
            )
    small = [
        f"{entry['name']} ({entry['test']})" for entry in classes if entry["test"] < SMALL_EXAM
    ]
    if small:
        warnings.append(
            f"fewer than {SMALL_EXAM} test images, so that the class's own accuracy will say next "
            f"to nothing: {', '.join(small)}; add images, or merge it with a class that it is like"
        )
    return warnings


def unused_decisions(catalogue: Catalogue, decided: dict[tuple[str, str], Suspicion]) -> list[str]:
    """Decisions whose picture is gone, or now lies under another label."""
    present = set(zip(catalogue.sha256, catalogue.class_names, strict=True))
    unused = [line.source_id for key, line in decided.items() if key not in present]
    return (
        [f"{len(unused)} decisions in review.csv match no image, the first is {unused[0]}"]
        if unused
        else []
    )


def alike_warning(alike: list[dict[str, Any]], fingerprints: Fingerprints) -> list[str]:
    """What the audit can't tell for certain: it asks the hash first, and a crop changes that soon."""
    striking = sum(pair["cosine"] >= fingerprints.cosines[-1] for pair in alike)
    if not striking:
        return []
    number = f"{striking}{' or more' if striking == len(alike) else ''}"
    return [
        f"{number} pairs of pictures in different splits are as alike to the base model as a "
        "picture and its copy; look at them under “most alike across splits”"
    ]


def suspects(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict
) -> list[dict[str, Any]]:
    """The suspected training images, the most suspect first, and what becomes of them."""
    outcome = {"drop": "dropped", "flag": "flagged"}[domain.quality_filter.action]
    order = np.argsort(verdict.scores, kind="stable")
    return [
        _judged(domain, catalogue, train, verdict, position) | {"outcome": outcome}
        for position in order[verdict.suspect[order]]
    ]


def _judged(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict, position: int
) -> dict[str, Any]:
    return {
        **catalogue.name(train[position]),
        "sha256": catalogue.sha256[train[position]],
        "suspected_label": domain.class_names[verdict.suspected_labels[position]],
        "score": round(float(verdict.scores[position]), 5),
    }


def least_likely_kept(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict, dropped: set[str]
) -> list[dict[str, Any]]:
    """The train images with the lowest scores among those that are kept."""
    order = np.argsort(verdict.scores, kind="stable")
    kept = [position for position in order if catalogue.source_ids[train[position]] not in dropped]
    return [
        _judged(domain, catalogue, train, verdict, position) for position in kept[:LEAST_LIKELY]
    ]


def near_duplicates(
    splits: dict[str, datasets.Dataset], class_names: list[str]
) -> list[list[dict[str, str]]]:
    """The members of each group of near-duplicates that are kept, the largest group first."""
    members = defaultdict(list)
    for name, rows in splits.items():
        for group, source_id, label in zip(
            rows["group_id"], rows["source_id"], rows["label"], strict=True
        ):
            members[group].append(
                {"source_id": source_id, "label": class_names[label], "split": name}
            )
    return sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)


def alike_across_splits(
    catalogue: Catalogue, division: Division, fingerprints: Fingerprints
) -> list[dict[str, Any]]:
    """The pairs of pictures in different splits that the base model finds most alike."""
    used = np.flatnonzero(division.parts != "")
    pairs = fingerprints.take(used).most_alike_across(division.parts[used], MOST_ALIKE)
    return [
        {
            "source_ids": [catalogue.source_ids[used[index]] for index in pair],
            "splits": [str(division.parts[used[index]]) for index in pair],
            "cosine": round(cosine, 4),
        }
        for *pair, cosine in pairs
    ]


def suspicions(report: dict[str, Any]) -> list[Suspicion]:
    """The lines of review.csv: conflicts, and suspects of the filter."""
    conflicts = [
        Suspicion(
            entry["source_id"],
            entry["label"],
            entry["sha256"],
            entry["reason"],
            outcome="set aside",
        )
        for entry in report["quarantined"]
        if entry["reason"].startswith("conflict")
    ]
    wrong = [
        Suspicion(**entry | {"score": f"{entry['score']:.5f}", "reason": "wrong label?"})
        for entry in report["suspects"]
    ]
    return conflicts + wrong
