"""Which image goes where: copies and contradictions are set aside, and near-duplicates stay in one split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import datasets
import numpy as np

from data_prep.duplicates import Fingerprints, connected_groups
from data_prep.splits import HELD_OUT, assign_splits
from nicheclip.domain import Domain

PRECEDENCE = (*HELD_OUT, "train")


@dataclass(frozen=True)
class Catalogue:
    """The columns of the readable images that decide where they go; all (N,)."""

    source_ids: list[str]
    class_names: list[str]
    labels: np.ndarray  # of int
    sha256: list[str]
    given: list[str | None]  # the split that the source decides

    @classmethod
    def of(cls, rows: datasets.Dataset, domain: Domain) -> Catalogue:
        """Of the rows of a source once they are verified."""
        source_ids, class_names, sha256, given = (
            rows[name][:] for name in ("source_id", "class_name", "sha256", "split")
        )
        return cls(source_ids, class_names, domain.indices(class_names), sha256, given)

    def __len__(self) -> int:
        return len(self.source_ids)

    def name(self, index: int) -> dict[str, str]:
        """How report.json names an image."""
        return {"source_id": self.source_ids[index], "label": self.class_names[index]}

    def rank(self, index: int) -> int:
        """The lower, the more an image is worth: one of the test is used rather than its copy in train."""
        return PRECEDENCE.index(self.given[index] or "train")


@dataclass(frozen=True)
class Division:
    """Where each image went.

    Attributes:
        parts: (N,) the split, or "" for an image that is set aside.
        groups: (N,) the name of its group of near-duplicates.
        reasons: why images are set aside, by index.
    """

    parts: np.ndarray
    groups: np.ndarray
    reasons: dict[int, str]


def divide(
    catalogue: Catalogue,
    fingerprints: Fingerprints,
    domain: Domain,
    decisions: dict[tuple[str, str], str],
    seed: int = 0,
) -> Division:
    """Sets copies and contradictions aside, groups the near-duplicates, and deals the groups out to the splits.

    Args:
        decisions: "keep" or "drop" by sha256 and class name, for images that a person has looked
            at.

    Raises:
        ValueError: if a split would have no image of a class.
        RuntimeError: if the final audit, which compares all pairs of splits, finds a picture on
            both sides.
    """
    decided = [
        decisions.get(key, "") for key in zip(catalogue.sha256, catalogue.class_names, strict=True)
    ]
    reasons = {
        index: "dropped by hand" for index, decision in enumerate(decided) if decision == "drop"
    }
    _set_copies_aside(catalogue, decided, reasons)
    pairs = fingerprints.near_duplicates(seed)
    while True:  # what the search has missed and the audit finds is grouped in the next round
        division = _place(catalogue, pairs, domain, decided, dict(reasons))
        missed = leaks(division, fingerprints)
        fresh = {tuple(pair) for pair in missed.tolist()} - {tuple(pair) for pair in pairs.tolist()}
        if not fresh:
            break
        pairs = np.concatenate([pairs, np.array(sorted(fresh))])
    if len(missed):
        first, second = (catalogue.source_ids[index] for index in missed[0])
        raise RuntimeError(
            f"{len(missed)} pictures lie on both sides of a split, the first is '{first}', a "
            f"near-duplicate of '{second}'; drop one of each pair in review.csv, and please "
            "report this"
        )
    _check_every_class(catalogue, division.parts, domain.class_names)
    return division


def leaks(division: Division, fingerprints: Fingerprints) -> np.ndarray:
    """The pairs of the same picture in different splits, (P, 2) int; compares all of them."""
    used = np.flatnonzero(division.parts != "")
    return used[fingerprints.take(used).across(division.parts[used])]


def _set_copies_aside(catalogue: Catalogue, decided: list[str], reasons: dict[int, str]) -> None:
    """The same file twice is used once.

    Under two labels not at all, unless a person has kept one of them.
    """
    members = defaultdict(list)
    for index, sha256 in enumerate(catalogue.sha256):
        if index not in reasons:
            members[sha256].append(index)
    for same in members.values():
        labels = sorted({catalogue.class_names[index] for index in same})
        chosen = {catalogue.class_names[index] for index in same if decided[index] == "keep"}
        right = labels if len(labels) == 1 else sorted(chosen) if len(chosen) == 1 else []
        usable = sorted(
            (index for index in same if catalogue.class_names[index] in right), key=catalogue.rank
        )
        for index in same:
            if index not in usable:
                reasons[index] = f"conflict: the same file under {' and '.join(labels)}"
            elif index != usable[0]:
                reasons[index] = f"exact duplicate: of {catalogue.source_ids[usable[0]]}"


def _place(
    catalogue: Catalogue,
    pairs: np.ndarray,
    domain: Domain,
    decided: list[str],
    reasons: dict[int, str],
) -> Division:
    groups = _group_names(catalogue.sha256, pairs)
    for first, second in pairs.tolist():
        if catalogue.class_names[first] != catalogue.class_names[second]:
            _set_contradiction_aside(catalogue, first, second, decided, reasons)
            _set_contradiction_aside(catalogue, second, first, decided, reasons)
    parts = np.array([split or "train" for split in catalogue.given], dtype="<U11")
    parts[list(reasons)] = ""
    to_fill = tuple(name for name in HELD_OUT if name not in catalogue.given)
    pool = np.flatnonzero(parts == "train")
    if to_fill and len(pool):
        parts[pool] = assign_splits(
            catalogue.labels[pool], groups[pool].tolist(), domain.splits, to_fill
        )
    owners: dict[str, int] = {}  # the first image of each group, in the split that keeps it
    for name in PRECEDENCE:
        for index in np.flatnonzero(parts == name).tolist():
            owner = owners.setdefault(groups[index], index)
            if parts[owner] != name:
                reasons[index] = (
                    f"leak: near-duplicate of {catalogue.source_ids[owner]}, which is in "
                    f"{parts[owner]}"
                )
    parts[list(reasons)] = ""
    return Division(parts, groups, reasons)


def _group_names(sha256: list[str], pairs: np.ndarray) -> np.ndarray:
    """A group is called after the smallest hash among its files, which stays when most others come or go."""
    smallest: dict[int, str] = {}
    numbers = connected_groups(pairs, len(sha256)).tolist()
    for number, name in zip(numbers, sha256, strict=True):
        smallest[number] = min(name[:16], smallest.get(number, name))
    return np.array([smallest[number] for number in numbers])


def _set_contradiction_aside(
    catalogue: Catalogue, index: int, other: int, decided: list[str], reasons: dict[int, str]
) -> None:
    """The same picture under two labels tells nothing.

    That of an exam is believed rather than that of train.
    """
    if decided[index] == "keep" or catalogue.rank(index) < catalogue.rank(other):
        return
    if index not in reasons and not reasons.get(other, "").startswith(("dropped by hand", "exact")):
        reasons[index] = (
            f"conflict: near-duplicate of {catalogue.source_ids[other]}, which is under "
            f"{catalogue.class_names[other]}"
        )


def _check_every_class(catalogue: Catalogue, parts: np.ndarray, class_names: list[str]) -> None:
    for split in PRECEDENCE:
        present = {catalogue.class_names[index] for index in np.flatnonzero(parts == split)}
        empty = [name for name in class_names if name not in present]
        if empty:
            raise ValueError(
                f"the {split} split has no image of: {', '.join(empty)}; add images, merge "
                "classes, or change splits in the domain file"
            )
