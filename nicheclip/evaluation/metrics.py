"""What the scorecard measures: pure functions, and the `evaluate.Metric` of the trainer.

Of N images, C classes and P prompts: `labels` and `predicted` (N,) int, `probabilities` (N, C)
float, `confidence` (N,) float, the highest probability of each image, and `right` (N,) bool.
Definitions follow the recipe in the article that NicheCLIP grew from, unless a docstring names
another source.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

N_BINS = 15


def correct(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the most probable class is the label, (N,) bool."""
    return probabilities.argmax(axis=1) == labels


def top_k_correct(probabilities: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label is among the k most probable classes, (N,) bool; ties count against it."""
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities >= own[:, None]).sum(axis=1) <= k


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int, rows: labels, columns: predictions."""
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_scores(
    predicted: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, ...]:
    """Precision, recall and F1 of each class, (C,) float each.

    NaN where there is nothing to judge: no prediction, no image, neither of them.
    """
    matrix = confusion_matrix(predicted, labels, num_classes)
    right, of_label, of_prediction = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return right / of_prediction, right / of_label, 2 * right / (of_label + of_prediction)


def worst_share(hits: np.ndarray, labels: np.ndarray) -> float:
    """The share of hits (N,) bool in the class where it is lowest."""
    counts = np.bincount(labels)
    return float((np.bincount(labels, hits)[counts > 0] / counts[counts > 0]).min())


def reliability(
    confidence: np.ndarray, right: np.ndarray, equal_mass: bool = False
) -> tuple[np.ndarray, ...]:
    """Confidence against accuracy in bins of the confidence (Guo et al. 2017, arXiv:1706.04599).

    Args:
        equal_mass: bins that hold equally many images (Nixon et al. 2019, arXiv:1904.01685), not
            equally wide ones.

    Returns:
        mean confidence, accuracy and count of each bin, each (N_BINS,); 0 where a bin is empty.
    """
    if equal_mass:
        bins = np.argsort(np.argsort(confidence, kind="stable")) * N_BINS // len(confidence)
    else:
        bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    counts = np.bincount(bins, minlength=N_BINS)
    sums = (np.bincount(bins, weights, N_BINS) for weights in (confidence, right))
    mean_confidence, accuracy = (each / np.maximum(counts, 1) for each in sums)
    return mean_confidence, accuracy, counts


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, equal_mass: bool = False
) -> float:
    """Mean distance of confidence and accuracy over the bins of `reliability`, lower is better."""
    mean_confidence, accuracy, counts = reliability(confidence, right, equal_mass)
    return float((np.abs(mean_confidence - accuracy) * counts).sum() / counts.sum())


def ece_of_perfect(confidence: np.ndarray, draws: int = 1000) -> np.ndarray:
    """The ECE that a perfectly calibrated model of this confidence shows by chance, (draws,).

    Its answers are right as often as its confidence says; each draw decides anew which (consistency
    resampling, Bröcker and Smith 2007, doi:10.1175/WAF993.1).
    """
    rng = np.random.default_rng(0)
    drawn = (rng.random(len(confidence)) < confidence for _ in range(draws))
    return np.array([expected_calibration_error(confidence, right) for right in drawn])


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance to the label over all classes, (N,) in [0, 2] (Brier 1950)."""
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities**2).sum(axis=1) - 2 * own + 1


def aurc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve (Geifman et al. 2019, arXiv:1805.08206).

    The share of errors among the k most confident, averaged over k; lower is better.
    """
    wrong = ~right[np.argsort(-confidence, kind="stable")]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The chance that an in-domain score (N,) is above one from outside (M,); ties count half."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)].sum()
    return float((ranks - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of outside scores (M,) accepted where 95 % of the in-domain ones (N,) are."""
    return float((outside >= np.quantile(inside, 0.05, method="lower")).mean())


def image_retrieval(
    image_embeds: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each of image_embeds (N, D) asks for the others, but for its near-duplicate group's (N,).

    Returns:
        the rank of the first one found that has the label, from 1 (R@k is the share of ranks up to
        k), and the average precision, (N,) float each; NaN where no other image has the label.
    """
    similarity = image_embeds @ image_embeds.T
    rank, precision = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for query in range(len(labels)):
        others = np.flatnonzero(groups != groups[query])
        order = np.argsort(-similarity[query, others], kind="stable")
        places = 1 + np.flatnonzero(labels[others[order]] == labels[query])
        if len(places):
            rank[query] = places[0]
            precision[query] = (np.arange(1, len(places) + 1) / places).mean()
    return rank, precision


def hard_negative_margin(
    similarity: np.ndarray,
    prompt_classes: np.ndarray,
    labels: np.ndarray,
    class_clusters: np.ndarray,
) -> np.ndarray:
    """Best cosine with the own prompts minus the best with those of the cluster's other classes.

    Args: similarity (N, P) with each prompt; prompt_classes (P,); class_clusters (C,).

    Returns:
        (N,) float; an image passes if it is above 0; NaN where a class is alone in its cluster.
    """
    own = prompt_classes == labels[:, None]  # (N, P)
    rival = (class_clusters[prompt_classes] == class_clusters[labels][:, None]) & ~own
    best_own, best_rival = (
        np.where(those, similarity, -np.inf).max(axis=1) for those in (own, rival)
    )
    return np.where(np.isfinite(best_rival), best_own - best_rival, np.nan)


def semantic_rank(
    similarity: np.ndarray, prompt_classes: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """The best rank (from 1) of an own prompt among all; ties count against it; (N,) int.

    Args: as `hard_negative_margin`. R@k is the share of ranks up to k, MRR the mean of 1/rank.
    """
    own = prompt_classes == labels[:, None]
    best_own = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best_own) & ~own).sum(axis=1)


class ZeroShotMetrics(evaluate.Metric):
    """`accuracy`, `macro_f1` and `ece` of class probabilities (N, C) and class indices (N,).

    A subclass here, because `evaluate.load(name)` would fetch a script from the Hub.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(self.__doc__, "", datasets.Features(features))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        probabilities, labels = np.array(predictions), np.array(references)
        right = correct(probabilities, labels)
        f1 = class_scores(probabilities.argmax(axis=1), labels, probabilities.shape[1])[2]
        return {
            "accuracy": float(right.mean()),
            "macro_f1": float(np.nanmean(f1)),  # of classes that occur or are predicted
            "ece": expected_calibration_error(probabilities.max(axis=1), right),
        }
