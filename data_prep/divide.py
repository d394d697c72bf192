"""Which image goes where: contradictions are set aside, near-duplicates stay in one split."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from data_prep.duplicates import connected_groups
from nicheclip.domain import Domain, Splits

HELD_OUT = ("test", "calibration", "validation")
PRECEDENCE = (*HELD_OUT, "train")  # an image of test is worth more than its copy in train


class Reason(NamedTuple):
    """Why an image is set aside: a kind, the other image that it is about, and particulars."""

    kind: str | None = None
    other: str | None = None
    detail: str | None = None


def divide(images: pd.DataFrame, pairs: np.ndarray, domain: Domain) -> pd.DataFrame:
    """Sets copies and contradictions aside, and deals groups of near-duplicates to the splits.

    Args:
        images: (N rows) source_id, label, sha256, given (the split that the source decides, or
            None) and decision ("keep", "drop" or "", of a person who has looked at it).
        pairs: (P, 2) rows of near-duplicates.

    Returns:
        the images with their split ("" if set aside), group_id (which near-duplicates share), and
        the kind, other and detail of the `Reason` for which they are set aside.

    Raises:
        ValueError: if a split would have no image of a class.
    """
    images = images.assign(rank=[PRECEDENCE.index(split or "train") for split in images.given])
    # A group is called after its smallest hash, which stays when most others come or go.
    connected = connected_groups(pairs, len(images))
    images["group_id"] = images.sha256.str[:16].groupby(connected).transform("min")
    dropped = images.index[images.decision == "drop"]
    reasons = {index: Reason("dropped by hand") for index in dropped}
    _set_copies_aside(images.drop(dropped), reasons)
    image = list(images.itertuples())
    for first, second in pairs.tolist():
        if image[first].label != image[second].label:
            _set_contradiction_aside(image[first], image[second], reasons)
            _set_contradiction_aside(image[second], image[first], reasons)
    parts = np.array([split or "train" for split in images.given], dtype="<U11")
    parts[list(reasons)] = ""
    to_fill = tuple(name for name in HELD_OUT if name not in set(images.given))
    pool = images[parts == "train"]
    if to_fill and len(pool):
        labels, groups = domain.indices(pool.label), pool.group_id.tolist()
        parts[pool.index] = assign_splits(labels, groups, domain.splits, to_fill)
    owners: dict[str, int] = {}  # the first image of each group, in the split that keeps it
    for name in PRECEDENCE:
        for index in np.flatnonzero(parts == name).tolist():
            owner = owners.setdefault(image[index].group_id, index)
            if parts[owner] != name:
                reasons[index] = Reason("leak", image[owner].source_id, str(parts[owner]))
    parts[list(reasons)] = ""
    for name in PRECEDENCE:
        present = set(images.label[parts == name])
        if empty := [label for label in domain.class_names if label not in present]:
            raise ValueError(
                f"the {name} split has no image of: {', '.join(empty)}; add some, or change splits"
            )
    told = [reasons.get(index, Reason()) for index in images.index]
    return images.assign(split=parts).join(pd.DataFrame(told, dtype=object))


def _set_copies_aside(images: pd.DataFrame, reasons: dict[int, Reason]) -> None:
    """The same file is used once; under two labels never, unless a person has kept one of them."""
    copies = images[images.duplicated("sha256", keep=False)].sort_values("rank", kind="stable")
    for _, same in copies.groupby("sha256"):
        labels, chosen = sorted(set(same.label)), set(same.label[same.decision == "keep"])
        right = chosen if len(labels) > 1 else set(labels)
        usable = same[same.label.isin(right)] if len(right) == 1 else same[:0]
        for image in same.itertuples():
            if image.label not in set(usable.label):
                other = same.source_id[same.index != image.Index].iloc[0]
                detail = f"the same file under {' and '.join(labels)}"
                reasons[image.Index] = Reason("conflict", other, detail)
            elif image.Index != usable.index[0]:
                reasons[image.Index] = Reason("exact duplicate", usable.source_id.iloc[0])


def _set_contradiction_aside(image: Any, other: Any, reasons: dict[int, Reason]) -> None:
    """The same picture under two labels tells nothing; that of an exam is rather believed."""
    nothing = Reason()
    settled = reasons.get(other.Index, nothing).kind in ("dropped by hand", "exact duplicate")
    believed = image.decision == "keep" or image.rank < other.rank
    if not (believed or settled or image.Index in reasons):
        detail = f"a near-duplicate of it is under {other.label}"
        reasons[image.Index] = Reason("conflict", other.source_id, detail)


def assign_splits(
    labels: np.ndarray, groups: list[str], splits: Splits, names: tuple[str, ...] = HELD_OUT
) -> list[str]:
    """Puts each group into a split by a hash of its name: later images don't move earlier ones.

    A share of a class is met on average: of 100 images at 0.25, between 17 and 33 in 95 % of the
    cases. An added image may move another to meet a count, or to give every class at least one
    group in every split; and a near-duplicate may change the name of its group, and so its split.

    Args:
        labels: (N,) class of each image; a group counts towards the class of its first image.
        groups: (N,) group of each image; a group goes to one split as a whole.
        splits: counts (1 or more) or shares of each class, of what the counts leave.
        names: which of the held-out splits to fill.

    Returns:
        (N,) "train", "validation", "calibration" or "test".
    """
    images = pd.DataFrame({"label": labels, "group": groups})
    sizes = images.groupby("group", sort=False).label.agg(["first", "size"])
    asked = splits.model_dump(include=set(names))
    by_count = sorted(names, key=lambda name: asked[name] < 1)  # counts first
    home = pd.Series("train", index=sizes.index)
    for _, waiting in sizes.groupby("first"):
        left = 1.0
        for number, name in enumerate(by_count, start=1):
            # a number in [0, 1) that depends on the two names alone
            hashes = [hashlib.sha256(f"{name} {group}".encode()) for group in waiting.index]
            place = [int.from_bytes(each.digest()[:7]) / 2**56 for each in hashes]
            waiting = waiting.assign(place=place).sort_values("place")
            if asked[name] < 1:
                fair = int((waiting.place < asked[name] / left).sum())
                # the splits that still need a group, train among them
                others = len(by_count) - number + 1
                take = max(1, min(fair, len(waiting) - others))
                left -= asked[name]
            else:
                take = int(waiting["size"].cumsum().searchsorted(asked[name])) + 1
            home[waiting.index[:take]] = name
            waiting = waiting[take:]
    return home.loc[groups].tolist()
