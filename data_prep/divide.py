"""Which image goes where: contradictions are set aside, near-duplicates stay in one split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import datasets
import numpy as np

from data_prep.duplicates import Fingerprints, connected_groups
from data_prep.splits import HELD_OUT, assign_splits
from nicheclip.domain import Domain

PRECEDENCE = (*HELD_OUT, "train")
Decisions = dict[tuple[str, str], str]  # "keep" or "drop" by sha256 and class name


@dataclass(frozen=True)
class Reason:
    """Why an image is set aside: a kind, the other image that it is about, and particulars."""

    kind: str
    other: str | None = None
    detail: str | None = None


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
        return {
            "source_id": self.source_ids[index],
            "label": self.class_names[index],
            "sha256": self.sha256[index],
        }

    def rank(self, index: int) -> int:
        """The lower, the more an image is worth: one of test rather than its copy in train."""
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
    reasons: dict[int, Reason]


def divide(
    catalogue: Catalogue, fingerprints: Fingerprints, domain: Domain, decisions: Decisions
) -> Division:
    """Sets copies and contradictions aside, and deals groups of near-duplicates to the splits.

    Args:
        decisions: for images that a person has looked at.

    Raises:
        ValueError: if a split would have no image of a class.
    """
    keys = zip(catalogue.sha256, catalogue.class_names, strict=True)
    decided = [decisions.get(key, "") for key in keys]
    dropped = (index for index, decision in enumerate(decided) if decision == "drop")
    reasons = {index: Reason("dropped by hand") for index in dropped}
    _set_copies_aside(catalogue, decided, reasons)
    pairs = fingerprints.near_duplicates()
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
        labels, own = catalogue.labels[pool], groups[pool].tolist()
        parts[pool] = assign_splits(labels, own, domain.splits, to_fill)
    owners: dict[str, int] = {}  # the first image of each group, in the split that keeps it
    for name in PRECEDENCE:
        for index in np.flatnonzero(parts == name).tolist():
            owner = owners.setdefault(groups[index], index)
            if parts[owner] != name:
                kept_in = str(parts[owner])
                reasons[index] = Reason("leak", catalogue.source_ids[owner], kept_in)
    parts[list(reasons)] = ""
    _check_every_class(catalogue, parts, domain.class_names)
    return Division(parts, groups, reasons)


def _set_copies_aside(catalogue: Catalogue, decided: list[str], reasons: dict[int, Reason]) -> None:
    """The same file is used once; under two labels never, unless a person has kept one of them."""
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
                other = next(i for i in same if i != index)
                told = f"the same file under {' and '.join(labels)}"
                reasons[index] = Reason("conflict", catalogue.source_ids[other], told)
            elif index != usable[0]:
                reasons[index] = Reason("exact duplicate", catalogue.source_ids[usable[0]])


def _set_contradiction_aside(
    catalogue: Catalogue, index: int, other: int, decided: list[str], reasons: dict[int, Reason]
) -> None:
    """The same picture under two labels tells nothing; that of an exam is rather believed."""
    if decided[index] == "keep" or catalogue.rank(index) < catalogue.rank(other):
        return
    settled = other in reasons and reasons[other].kind in ("dropped by hand", "exact duplicate")
    if index not in reasons and not settled:
        told = f"a near-duplicate of it is under {catalogue.class_names[other]}"
        reasons[index] = Reason("conflict", catalogue.source_ids[other], told)


def _group_names(sha256: list[str], pairs: np.ndarray) -> np.ndarray:
    """A group is called after its smallest hash, which stays when most others come or go."""
    smallest: dict[int, str] = {}
    numbers = connected_groups(pairs, len(sha256)).tolist()
    for number, name in zip(numbers, sha256, strict=True):
        smallest[number] = min(name[:16], smallest.get(number, name))
    return np.array([smallest[number] for number in numbers])


def _check_every_class(catalogue: Catalogue, parts: np.ndarray, class_names: list[str]) -> None:
    for split in PRECEDENCE:
        present = {catalogue.class_names[index] for index in np.flatnonzero(parts == split)}
        if empty := [name for name in class_names if name not in present]:
            raise ValueError(
                f"the {split} split has no image of: {', '.join(empty)}; add images, merge "
                "classes, or change splits in the domain file"
            )
