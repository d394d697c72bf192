"""Which split each image belongs to: by group, evenly over the classes, the same in every run."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from nicheclip.domain import Splits

HELD_OUT = ("test", "calibration", "validation")


def assign_splits(
    labels: np.ndarray, groups: list[str], splits: Splits, names: tuple[str, ...] = HELD_OUT
) -> list[str]:
    """Deals out the groups of each class in the order of their hashes: first test, then calibration, then validation.

    Args:
        labels: (N,) class of each image; a group counts towards the class of its first image.
        groups: (N,) group of each image; a group goes to one split as a whole.
        splits: counts (1 or more) or shares of each class.
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
    assigned = ["train"] * len(labels)
    for label_groups in of_class.values():
        waiting = sorted(label_groups, key=lambda group: hashlib.sha256(group.encode()).digest())
        size = sum(len(members[group]) for group in waiting)
        for name in names:
            asked = getattr(splits, name)
            wanted = round(asked if asked >= 1 else asked * size)
            taken = 0
            while waiting and taken < wanted:
                for index in members[group := waiting.pop(0)]:
                    assigned[index] = name
                taken += len(members[group])
    return assigned
