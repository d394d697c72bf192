"""Which image goes where: contradictions are set aside, near-duplicates stay in one split."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from data_prep.duplicates import connected_groups
from nicheclip.domain import SPLITS, Domain, Splits

PRECEDENCE = SPLITS[::-1]  # an image of test is worth more than its copy in train
HELD_OUT = PRECEDENCE[:-1]


class Reason(NamedTuple):
    """Why an image is set aside: a kind, the other image that it is about, and particulars."""

    kind: str | None = None
    other: str | None = None
    detail: str | None = None


def divide(images: pd.DataFrame, pairs: np.ndarray, domain: Domain) -> pd.DataFrame:
    """Sets copies and contradictions aside, and deals groups of near-duplicates to the parts.

    Args:
        images: (N rows) source_id, label, sha256, given (the split that the source decides, or
            None), decision ("keep", "drop" or "", of a person who has looked at it), and group (of
            what must stay together for another reason, or None).
        pairs: (P, 2) rows of near-duplicates.

    Returns:
        the images with their split (one of `domain.parts`; "" if set aside), group_id (which
        near-duplicates share), and the kind, other and detail of the `Reason` for which they are
        set aside.

    Raises:
        ValueError: if a split would have no image of a class, or all of its images lie in one fold;
            or if the source has an exam of its own, and folds are asked for.
    """
    cross_fit = domain.evaluation == "cross_fit"
    if cross_fit and (own := set(images.given) & set(HELD_OUT)):
        raise ValueError(
            f"the source has a {min(own)} split of its own, which `evaluation: cross_fit` would "
            "train on; write `evaluation: holdout` into the domain file"
        )
    images = images.assign(rank=[PRECEDENCE.index(split or "train") for split in images.given])
    # A group is called after its smallest hash, which stays when most others come or go.
    connected = connected_groups(np.concatenate([pairs, _of_one_group(images)]), len(images))
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
    if len(pool):
        labels, groups = domain.indices(pool.label), pool.group_id.tolist()
        if cross_fit:
            parts[pool.index] = np.array(domain.parts)[assign_folds(labels, groups, domain.folds)]
        elif to_fill:
            parts[pool.index] = assign_splits(labels, groups, domain.splits, to_fill)
    owners: dict[str, int] = {}  # the first image of each group, in the split that keeps it
    for name in PRECEDENCE if not cross_fit else ():  # a fold has whole groups
        for index in np.flatnonzero(parts == name).tolist():
            owner = owners.setdefault(image[index].group_id, index)
            if parts[owner] != name:
                reasons[index] = Reason("leak", image[owner].source_id, str(parts[owner]))
    parts[list(reasons)] = ""
    _check_classes(images.label.to_numpy(), parts, domain)
    told = [reasons.get(index, Reason()) for index in images.index]
    return images.assign(split=parts).join(pd.DataFrame(told, dtype=object))


def _of_one_group(images: pd.DataFrame) -> np.ndarray:
    """Pairs (P, 2) that connect the images of each group that the source gives."""
    rows = images.groupby("group").indices.values()
    chains = [np.column_stack([own[:-1], own[1:]]) for own in rows]
    return np.concatenate([np.empty((0, 2), np.int64), *chains])


def _check_classes(labels: np.ndarray, parts: np.ndarray, domain: Domain) -> None:
    if domain.evaluation == "cross_fit":
        lone = [name for name in domain.class_names if len(set(parts[labels == name]) - {""}) < 2]
        if lone:
            raise ValueError(
                f"all images of one fold: {', '.join(lone)}; a model that is to be examined on "
                "them would have seen none of the class: add images that are no near-duplicates"
            )
        return
    for name in PRECEDENCE:
        if empty := [each for each in domain.class_names if each not in labels[parts == name]]:
            raise ValueError(
                f"the {name} split has no image of: {', '.join(empty)}; add some, or change splits"
            )


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
    """Deals the groups of each class to the splits, in an order that a hash of their names makes.

    So an added image moves few others. Shares and counts are met as well as whole groups allow; but
    each split has at least one group of a class, and train a quarter of them.

    Args:
        labels: (N,) class of each image; a group counts towards the class of its first image.
        groups: (N,) group of each image; a group goes to one split as a whole.
        splits: counts (1 or more) or shares of each class, of what the counts leave.
        names: which of the held-out splits to fill.

    Returns:
        (N,) "train", "validation", "calibration" or "test".
    """
    asked = splits.model_dump(include=set(names))
    counted = sum(each for each in asked.values() if each >= 1)
    home: dict[str, Any] = {}
    for waiting in _by_hash(labels, groups):
        shared, floor = sum(waiting.values()) - counted, max(1, len(waiting) // 4)
        for number, name in enumerate(names, start=1):
            needed = asked[name] if asked[name] >= 1 else asked[name] * shared
            sizes = np.cumsum(list(waiting.values()))
            nearest = int(np.abs(sizes - needed).argmin()) + 1
            others = len(names) - number  # each of which needs a group as well
            take = max(1, min(nearest, len(waiting) - others - floor))
            home |= dict.fromkeys(list(waiting)[:take], name)
            waiting = dict(list(waiting.items())[take:])
    return [home.get(group, "train") for group in groups]


def assign_folds(labels: np.ndarray, groups: list[str], folds: int) -> np.ndarray:
    """The fold of each image, (N,) int: of each class as many in each as whole groups allow.

    Groups in the order of a hash of their names, cut into equal parts: an added image moves few
    others. Each class begins with a fold of its own, so that what is left over is spread.

    Args: as those of `assign_splits`.
    """
    home: dict[str, Any] = {}
    for number, of_class in enumerate(_by_hash(labels, groups)):
        sizes = np.array(list(of_class.values()))
        middle = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        home |= dict(
            zip(of_class, (np.floor(middle * folds).astype(int) + number) % folds, strict=True)
        )
    return np.array([home[group] for group in groups])


def _by_hash(labels: np.ndarray, groups: list[str]) -> list[dict[str, int]]:
    """Of each class the sizes of its groups, by name, in an order that depends on the names."""
    images = pd.DataFrame({"label": labels, "group": groups})
    sizes = images.groupby("group", sort=False).label.agg(["first", "size"])
    sizes["place"] = [hashlib.sha256(name.encode()).hexdigest() for name in sizes.index]
    ordered = sizes.sort_values("place").groupby("first")["size"]
    return [of_class.to_dict() for _, of_class in ordered]
