"""What data_prep tells of its own work: the contents of report.json and review.csv."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypedDict

import pandas as pd

from data_prep.duplicates import Fingerprints
from data_prep.review import Suspicion
from nicheclip.domain import Domain
from nicheclip.run import SPLITS

LEAST_LIKELY = 24  # images, and
MOST_ALIKE = 12  # pairs, for a person to look at
SMALL_EXAM = 10  # test images of a class; with fewer, its own accuracy says next to nothing
Entry = dict[str, Any]  # an image of the report: source_id, label, sha256 and more


class Report(TypedDict):
    """report.json: what went in, what came out, and what someone should look at.

    Entries that are `quarantined` have a kind, `other` (the image that it is about) and `detail`
    as well, and `suspects` a suspected_label, a score and their outcome.
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


def entries(images: pd.DataFrame, *columns: str) -> list[Entry]:
    """How report.json names images, and more `columns` of them."""
    return images[["source_id", "label", "sha256", *columns]].round(5).to_dict("records")


def suspects(images: pd.DataFrame) -> list[Entry]:
    """The training images whose label is doubted, and what becomes of them."""
    doubted = images[images.outcome.notna()].sort_values("score", kind="stable")
    return entries(doubted, "suspected_label", "score", "outcome")


def least_likely_kept(kept: pd.DataFrame) -> list[Entry]:
    """Those of train whose label is the least likely."""
    train = kept[kept.split == "train"].sort_values("score", kind="stable")
    return entries(train.head(LEAST_LIKELY), "suspected_label", "score")


def counts(images: pd.DataFrame, kept: pd.DataFrame, quarantined: list[Entry], read: int) -> Entry:
    """How many images went which way.

    Raises:
        RuntimeError: if any image is unaccounted for.
    """
    dropped = int((images.outcome == "dropped").sum())
    if read != len(kept) + len(quarantined) + dropped:
        raise RuntimeError(
            f"{read} images read; {len(kept)} kept, {len(quarantined)} quarantined, {dropped} "
            "dropped"
        )
    sizes = kept.split.value_counts()
    return {
        "read": read,
        "quarantined": dict(Counter(entry["kind"] for entry in quarantined)),
        "dropped_by_filter": dropped,
        "kept": {name: int(sizes[name]) for name in SPLITS},
        "train_samples_per_epoch": int(kept.repeats[kept.split == "train"].sum()),
    }


def classes(
    domain: Domain, images: pd.DataFrame, kept: pd.DataFrame, quarantined: list[Entry]
) -> list[Entry]:
    """The same of each class."""
    pool = images[images.split == "train"]
    judged = pool[["wanted", "suspect"]].assign(images=1, dropped=pool.outcome == "dropped")
    filtered = judged.astype(int).groupby(pool.label).sum().to_dict("index")
    sizes = pd.crosstab(kept.label, kept.split)[list(SPLITS)].to_dict("index")
    samples = kept.repeats[kept.split == "train"].groupby(kept.label).sum().to_dict()
    aside = Counter(entry["label"] for entry in quarantined)
    return [
        {
            "name": name,
            **sizes[name],
            "quarantined": aside[name],
            "samples": samples[name],
            "filter": filtered[name],
        }
        for name in domain.class_names
    ]


def warnings(
    classes: list[Entry],
    images: pd.DataFrame,
    decided: dict[tuple[str, str], Suspicion],
    alike: list[Entry],
    fingerprints: Fingerprints,
) -> list[str]:
    """What someone should look at before training."""
    found = []
    for entry in classes:
        wanted, pool, taken = (entry["filter"][key] for key in ("wanted", "images", "suspect"))
        if wanted > taken:
            found.append(
                f"{entry['name']}: the filter wanted {wanted} of {pool} images "
                f"({wanted / pool:.0%}); this is rather a class that the base model does not "
                f"know, not noise, and the cap held the filter to {taken}"
            )
    small = [f"{e['name']} ({e['test']})" for e in classes if e["test"] < SMALL_EXAM]
    if small:
        found.append(
            f"fewer than {SMALL_EXAM} test images, so that the class's own accuracy will say next "
            f"to nothing: {', '.join(small)}; add images, or merge it with a class that it is like"
        )
    present = set(zip(images.sha256, images.label, strict=True))
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


def near_duplicates(kept: pd.DataFrame) -> list[list[dict[str, str]]]:
    """The members of each group of near-duplicates that are kept, the largest group first."""
    several = kept[kept.duplicated("group_id", keep=False)]
    members = several[["source_id", "label", "split"]].groupby(several.group_id, sort=False)
    return sorted((group.to_dict("records") for _, group in members), key=len, reverse=True)


def alike_across_splits(images: pd.DataFrame, fingerprints: Fingerprints) -> list[Entry]:
    """The pairs of pictures in different splits that the base model finds most alike."""
    parts = images.split.to_numpy(dtype=str)
    return [
        {
            "source_ids": images.source_id[pair].tolist(),
            "splits": images.split[pair].tolist(),
            "cosine": round(cosine, 4),
        }
        for *pair, cosine in fingerprints.most_alike_across(parts, MOST_ALIKE)
    ]


def suspicions(quarantined: list[Entry], suspects: list[Entry]) -> list[Suspicion]:
    """The lines of review.csv: conflicts, and suspects of the filter."""
    lines = []
    for entry in quarantined:
        if entry["kind"] == "conflict":
            image = entry["source_id"], entry["label"], entry["sha256"]
            reason = f"conflict: {entry['detail']} ({entry['other']})"
            lines.append(Suspicion(*image, reason, outcome="set aside"))
    for entry in suspects:
        told = {"score": f"{entry['score']:.5f}", "reason": "wrong label?"}
        lines.append(Suspicion(**entry | told))
    return lines
