"""Which split each image belongs to: by group, evenly over the classes, stable when some come."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from nicheclip.domain import Splits

HELD_OUT = ("test", "calibration", "validation")


def assign_splits(
    labels: np.ndarray, groups: list[str], splits: Splits, names: tuple[str, ...] = HELD_OUT
) -> list[str]:
    """Puts each group into a split by a hash of its name: later images don't move earlier ones.

    A share of a class is met on average: of 100 images at 0.25, between 17 and 33 in 95 % of the
    cases. A count is met as nearly as groups allow, for which an added image may push one out.
    Every class gets at least one group in every split asked for, so in classes of a handful an
    added image may move one, too. A near-duplicate that is added may change the name of its group,
    and so its split.

    Args:
        labels: (N,) class of each image; a group counts towards the class of its first image.
        groups: (N,) group of each image; a group goes to one split as a whole.
        splits: counts (1 or more) or shares of each class; beside counts, shares are of what the
            counts leave.
        names: which of the held-out splits to fill.

    Returns:
        (N,) "train", "validation", "calibration" or "test".
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    of_class = defaultdict(list)
    for group, indices in members.items():
        of_class[labels[indices[0]]].append(group)
    asked = {name: getattr(splits, name) for name in names}
    by_count = sorted(asked, key=lambda name: asked[name] < 1)  # counts first
    assigned = ["train"] * len(labels)
    for waiting in of_class.values():
        left = 1.0
        for number, name in enumerate(by_count, start=1):
            place = {group: _hash(name, group) for group in waiting}
            waiting = sorted(waiting, key=place.__getitem__)
            if asked[name] < 1:
                fair = sum(place[group] < asked[name] / left for group in waiting)
                # the splits that still need a group, train among them
                others = len(by_count) - number + 1
                taken = waiting[: max(1, min(fair, len(waiting) - others))]
                left -= asked[name]
            else:
                sizes = np.cumsum([len(members[group]) for group in waiting])
                taken = waiting[: int(np.searchsorted(sizes, asked[name])) + 1]
            for group in taken:
                for index in members[group]:
                    assigned[index] = name
            waiting = waiting[len(taken) :]
    return assigned


def _hash(name: str, group: str) -> float:
    """A number in [0, 1) that depends on the two names alone, and is another one for each split."""
    return int.from_bytes(hashlib.sha256(f"{name} {group}".encode()).digest()[:7]) / 2**56
