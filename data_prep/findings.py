"""What data_prep tells of its own work: the contents of report.json and review.csv."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import datasets
import numpy as np

from data_prep.divide import Catalogue, Division
from data_prep.duplicates import Fingerprints
from data_prep.quality import Verdict
from data_prep.review import Suspicion
from nicheclip.domain import Domain
from nicheclip.run import SPLITS

LEAST_LIKELY = 24  # images, and
MOST_ALIKE = 12  # pairs, for a person to look at
SMALL_EXAM = 10  # test images of a class; with fewer, its own accuracy says next to nothing
Entry = dict[str, Any]  # an image of the report: source_id, label, sha256 and more


def counts(
    splits: dict[str, datasets.Dataset], quarantined: list[Entry], dropped: int, read: int
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
        "quarantined": dict(Counter(entry["kind"] for entry in quarantined)),
        "dropped_by_filter": dropped,
        "kept": kept,
        "train_samples_per_epoch": int(np.sum(splits["train"]["repeats"][:])),
    }


def classes(
    domain: Domain,
    splits: dict[str, datasets.Dataset],
    quarantined: list[Entry],
    suspects: list[Entry],
    verdict: Verdict,
) -> list[Entry]:
    """The same of each class."""
    sizes = {name: Counter(rows["label"][:]) for name, rows in splits.items()}
    aside = Counter(entry["label"] for entry in quarantined)
    dropped = Counter(entry["label"] for entry in suspects if entry["outcome"] == "dropped")
    samples: Counter[int] = Counter()
    for label, repeats in zip(splits["train"]["label"], splits["train"]["repeats"], strict=True):
        samples[label] += repeats
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


def warnings(
    classes: list[Entry],
    catalogue: Catalogue,
    decided: dict[tuple[str, str], Suspicion],
    alike: list[Entry],
    fingerprints: Fingerprints,
) -> list[str]:
    """What someone should look at before training."""
    found = []
    for entry in classes:
        wanted, images, taken = (entry["filter"][key] for key in ("wanted", "images", "suspect"))
        if wanted > taken:
            found.append(
                f"{entry['name']}: the filter wanted {wanted} of {images} images "
                f"({wanted / images:.0%}); this is rather a class that the base model does not "
                f"know, not noise, and the cap held the filter to {taken}"
            )
    small = [f"{e['name']} ({e['test']})" for e in classes if e["test"] < SMALL_EXAM]
    if small:
        found.append(
            f"fewer than {SMALL_EXAM} test images, so that the class's own accuracy will say next "
            f"to nothing: {', '.join(small)}; add images, or merge it with a class that it is like"
        )
    present = set(zip(catalogue.sha256, catalogue.class_names, strict=True))
    if unused := [line.source_id for key, line in decided.items() if key not in present]:
        found.append(
            f"{len(unused)} decisions in review.csv match no image, the first is {unused[0]}"
        )
    # The search asks the hash first, and a crop changes that soon.
    if striking := sum(pair["cosine"] >= fingerprints.cosines[-1] for pair in alike):
        number = f"{striking}{' or more' if striking == len(alike) else ''}"
        found.append(
            f"{number} pairs of pictures in different splits are as alike to the base model as a "
            "picture and its copy; look at them under “most alike across splits”"
        )
    return found


def judged(
    domain: Domain, catalogue: Catalogue, train: np.ndarray, verdict: Verdict
) -> tuple[list[Entry], list[Entry]]:
    """The suspected training images and what becomes of them; the least likely of those kept."""
    drop = domain.quality_filter.action == "drop"
    suspects: list[Entry] = []
    kept: list[Entry] = []
    for position in np.argsort(verdict.scores, kind="stable"):
        entry = {
            **catalogue.name(train[position]),
            "suspected_label": domain.class_names[verdict.suspected_labels[position]],
            "score": round(float(verdict.scores[position]), 5),
        }
        if verdict.suspect[position]:
            suspects.append(entry | {"outcome": "dropped" if drop else "flagged"})
        if not (verdict.suspect[position] and drop) and len(kept) < LEAST_LIKELY:
            kept.append(entry)
    return suspects, kept


def near_duplicates(
    splits: dict[str, datasets.Dataset], class_names: list[str]
) -> list[list[dict[str, str]]]:
    """The members of each group of near-duplicates that are kept, the largest group first."""
    members = defaultdict(list)
    for name, rows in splits.items():
        columns = (rows[column][:] for column in ("group_id", "source_id", "label"))
        for group, source_id, label in zip(*columns, strict=True):
            entry = {"source_id": source_id, "label": class_names[label], "split": name}
            members[group].append(entry)
    return sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)


def alike_across_splits(
    catalogue: Catalogue, division: Division, fingerprints: Fingerprints
) -> list[Entry]:
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


def suspicions(quarantined: list[Entry], suspects: list[Entry]) -> list[Suspicion]:
    """The lines of review.csv: conflicts, and suspects of the filter."""
    conflicts = [
        Suspicion(
            entry["source_id"],
            entry["label"],
            entry["sha256"],
            f"conflict: {entry['detail']} ({entry['other']})",
            outcome="set aside",
        )
        for entry in quarantined
        if entry["kind"] == "conflict"
    ]
    wrong = [
        Suspicion(**entry | {"score": f"{entry['score']:.5f}", "reason": "wrong label?"})
        for entry in suspects
    ]
    return conflicts + wrong
