"""Which training images are suspected of a wrong label, and how often an epoch has the others."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from nicheclip.domain import QualityFilter

# sklearn's C, the inverse strength; the out-of-fold NLL picks one
REGULARIZATIONS = (1.0, 3.0, 10.0, 30.0)
DEFAULT_THRESHOLDS = {"linear_probe": 0.2, "zero_shot": 0.05, "none": 0.0}


def threshold_of(how: QualityFilter) -> float:
    """The score below which an image is suspect."""
    return DEFAULT_THRESHOLDS[how.mode] if how.threshold is None else how.threshold


def out_of_fold_probabilities(
    image_embeds: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, seed: int = 0
) -> np.ndarray:
    """What a linear probe says of each image that has not seen it, nor a near-duplicate of it.

    Args:
        image_embeds: (N, D) of unit length.
        labels: (N,) int; they may be wrong.
        groups: (N,) near-duplicates share one.

    Returns:
        (N, C) float, rows add up to 1. A class that a fold's training part lacks has probability 0
        there.
    """
    # Enough to choose the regularisation.
    few = np.random.default_rng(seed).permutation(len(labels))[:4000]
    losses = []
    with tqdm(
        total=len(REGULARIZATIONS) + 1,
        desc="judging labels with linear probes",
        unit="probe",
        leave=False,
    ) as progress:
        for strength in REGULARIZATIONS:
            own = _out_of_fold(image_embeds[few], labels[few], groups[few], classes, strength, seed)
            losses.append(-np.log(np.maximum(own[np.arange(len(few)), labels[few]], 1e-6)).mean())
            progress.update()
        best = REGULARIZATIONS[int(np.argmin(losses))]
        return _out_of_fold(image_embeds, labels, groups, classes, best, seed)


def _out_of_fold(
    image_embeds: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    classes: int,
    strength: float,
    seed: int,
) -> np.ndarray:
    present, own = np.unique(labels, return_inverse=True)
    probabilities = np.zeros((len(labels), classes))
    splits = min(5, len(np.unique(groups)), np.bincount(own).max())
    if splits < 2 or len(present) < 2:
        # There is nothing to learn from, so nobody is suspected.
        return np.full_like(probabilities, 1 / classes)
    # Threads would spend more time on waiting for each other than on matrices of this size.
    with threadpool_limits(1), warnings.catch_warnings():
        # A class may be smaller than the number of folds, or missing in one; and a probe that is
        # nearly converged is as good here.
        for message in ("The least populated class", "Number of classes in training fold"):
            warnings.filterwarnings("ignore", message)
        warnings.simplefilter("ignore", ConvergenceWarning)
        probabilities[:, present] = cross_val_predict(
            LogisticRegression(C=strength, tol=1e-3, max_iter=500),
            image_embeds,
            own,
            groups=groups,
            cv=StratifiedGroupKFold(splits, shuffle=True, random_state=seed),
            method="predict_proba",
        )
    return probabilities


@dataclass(frozen=True)
class Verdict:
    """What the filter makes of the training images.

    Attributes:
        scores: (N,) how well the own label fits: the lower, the more suspect. For `linear_probe`
            the probability of the own label over its mean in the class, for `zero_shot` the
            probability itself.
        suspected_labels: (N,) the likeliest other class.
        suspect: (N,) bool, below the threshold and within the cap.
        classes: for each class how many `images` it has, how many the threshold `wanted`, and how
            many are `suspect`.
    """

    scores: np.ndarray
    suspected_labels: np.ndarray
    suspect: np.ndarray
    classes: list[dict[str, int]]


def judge(
    probabilities: np.ndarray,
    labels: np.ndarray,
    how: QualityFilter,
    trusted: np.ndarray | None = None,
) -> Verdict:
    """Finds the images whose own label is unlikely, at most `how.max_drop_share` of a class.

    A threshold relative to the class keeps it from deleting a class of which the base model knows
    little: where all images of a class have a low probability, a low one is nothing suspicious.

    Args:
        probabilities: (N, C), out of fold for `linear_probe`, zero-shot for `zero_shot` and `none`.
        labels: (N,) int.
        trusted: (N,) bool, images that a person has kept; they are never suspected.
    """
    trusted = np.zeros(len(labels), dtype=bool) if trusted is None else trusted
    everyone = np.arange(len(labels))
    scores = probabilities[everyone, labels]
    others = probabilities.copy()
    others[everyone, labels] = -1
    if how.mode == "linear_probe":
        sizes = np.bincount(labels, minlength=probabilities.shape[1])
        mean = np.bincount(labels, scores, len(sizes)) / np.maximum(sizes, 1)
        # A class without any probability can't be judged: all of it is as good as its mean.
        scores = np.divide(scores, mean[labels], out=np.ones_like(scores), where=mean[labels] > 0)
    threshold = threshold_of(how)
    suspect = np.zeros(len(labels), dtype=bool)
    counts = []
    for label in range(probabilities.shape[1]):
        own = np.flatnonzero(labels == label)
        below = own[(scores[own] < threshold) & ~trusted[own]] if how.mode != "none" else own[:0]
        chosen = below[np.argsort(scores[below], kind="stable")][
            : math.floor(how.max_drop_share * len(own))
        ]
        suspect[chosen] = True
        counts.append({"images": len(own), "wanted": len(below), "suspect": len(chosen)})
    return Verdict(scores, others.argmax(axis=1), suspect, counts)


def samples_per_epoch(
    labels: np.ndarray, samples_per_class: int, rng: np.random.Generator
) -> np.ndarray:
    """How often an epoch samples each image, at least once: `samples_per_class` in each class.

    Args: labels (N,) int. Returns: (N,) int.
    """
    samples = np.ones(len(labels), dtype=np.int32)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        missing = max(0, samples_per_class - len(own))
        samples[own] += missing // len(own)
        samples[own[: missing % len(own)]] += 1
    return samples
