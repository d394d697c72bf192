"""Lets the base model filter train, and train only."""

from __future__ import annotations

import math

import numpy as np

from nicheclip.domain import QualityFilter


def choose_drops(scores: np.ndarray, labels: np.ndarray, how: QualityFilter, classes: int) -> tuple[np.ndarray, list]:
    """Which training images to drop.

    Args:
        scores: (N,) the base model's probability for each image's own label.
        labels: (N,) int.

    Returns:
        (N,) bool, True to drop; and for each class how many images the threshold wanted to drop, how many the cap
        let it, and the images in all: {"images", "wanted", "dropped"}.
    """
    drop = np.zeros(len(scores), dtype=bool)
    counts = []
    for label in range(classes):
        own = np.flatnonzero(labels == label)
        below = own[scores[own] < how.threshold] if how.mode == "zero_shot" else own[:0]
        allowed = math.floor(how.max_drop_share * len(own))
        chosen = below[np.argsort(scores[below], kind="stable")][:allowed]
        drop[chosen] = True
        counts.append({"images": len(own), "wanted": len(below), "dropped": len(chosen)})
    return drop, counts


def visits_per_epoch(labels: np.ndarray, samples_per_class: int, rng: np.random.Generator) -> np.ndarray:
    """How often an epoch visits each image, so that each class has `samples_per_class` visits; at least once.

    Args: labels (N,) int. Returns: (N,) int.
    """
    visits = np.ones(len(labels), dtype=np.int32)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        missing = max(0, samples_per_class - len(own))
        visits[own] += missing // len(own)
        visits[own[: missing % len(own)]] += 1
    return visits
