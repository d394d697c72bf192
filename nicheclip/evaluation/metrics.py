"""What the scorecard measures: pure functions, and three `evaluate.Metric` for the Trainer.

These subclass `evaluate.Metric` here because `evaluate.load(name)` would fetch a script from the
Hub. Definitions follow the article that NicheCLIP grew from, unless a docstring names a source.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

N_BINS = 15


def correct(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the most probable class is the label. (N, C) float, (N,) int -> (N,) bool."""
    return probabilities.argmax(axis=1) == labels


def top_k_correct(probabilities: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label is among the k most probable classes.

    Ties count against it. (N, C), (N,) -> (N,) bool.
    """
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities >= own[:, None]).sum(axis=1) <= k


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) int, (N,) int -> (C, C) int, rows: labels, columns: predictions."""
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


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


def macro_f1(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Unweighted mean of the classes' F1, over classes that occur or are predicted.

    (N,) int, (N,) int.
    """
    return float(np.nanmean(class_scores(predicted, labels, num_classes)[2]))


def balanced_accuracy(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Unweighted mean of the classes' recall, over classes that occur. (N,) int, (N,) int."""
    return float(np.nanmean(class_scores(predicted, labels, num_classes)[1]))


def worst_f1(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The F1 of the class that has the lowest. (N,) int, (N,) int."""
    return float(np.nanmin(class_scores(predicted, labels, num_classes)[2]))


def reliability(
    confidence: np.ndarray, right: np.ndarray, n_bins: int = N_BINS, equal_mass: bool = False
) -> tuple[np.ndarray, ...]:
    """Confidence against accuracy in bins of the confidence (Guo et al. 2017, arXiv:1706.04599).

    Args:
        confidence: (N,) float, the highest probability of each image.
        right: (N,) bool.
        equal_mass: bins that hold equally many images (Nixon et al. 2019, arXiv:1904.01685), not
            equally wide ones.

    Returns:
        mean confidence, accuracy and count of each bin, each (n_bins,); the first two are 0 where a
        bin is empty.
    """
    return _binned(confidence, right, _bins(confidence, n_bins, equal_mass), n_bins)


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, n_bins: int = N_BINS, equal_mass: bool = False
) -> float:
    """Mean distance between confidence and accuracy over bins, in [0, 1].

    Lower is better. Args: as `reliability`.
    """
    return _ece(*reliability(confidence, right, n_bins, equal_mass))


def ece_of_perfect(
    confidence: np.ndarray, n_bins: int = N_BINS, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """The ECE that a perfectly calibrated model shows by chance: (draws,), equal-width bins.

    Its answers are right as often as its confidence says; each draw decides anew which (consistency
    resampling, Bröcker and Smith 2007, doi:10.1175/WAF993.1).

    Args:
        confidence: (N,) of the model that is judged.
    """
    rng, bins = np.random.default_rng(seed), _bins(confidence, n_bins, equal_mass=False)
    drawn = (rng.random(len(confidence)) < confidence for _ in range(draws))
    return np.array([_ece(*_binned(confidence, right, bins, n_bins)) for right in drawn])


def _bins(confidence: np.ndarray, n_bins: int, equal_mass: bool) -> np.ndarray:
    if equal_mass:
        places = np.empty(len(confidence), dtype=int)
        places[np.argsort(confidence, kind="stable")] = np.arange(len(confidence))
        return places * n_bins // len(confidence)
    return np.minimum((confidence * n_bins).astype(int), n_bins - 1)


def _binned(
    confidence: np.ndarray, right: np.ndarray, bins: np.ndarray, n_bins: int
) -> tuple[np.ndarray, ...]:
    counts = np.bincount(bins, minlength=n_bins)
    filled = np.maximum(counts, 1)
    mean_confidence = np.bincount(bins, weights=confidence, minlength=n_bins) / filled
    return mean_confidence, np.bincount(bins, weights=right, minlength=n_bins) / filled, counts


def _ece(mean_confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray) -> float:
    return float((np.abs(mean_confidence - accuracy) * counts).sum() / counts.sum())


def brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Squared distance to the label, (N, C), (N,) -> (N,) in [0, 2] (Brier 1950)."""
    own = probabilities[np.arange(len(labels)), labels]
    return (probabilities**2).sum(axis=1) - 2 * own + 1


def aurc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Area under the risk-coverage curve (Geifman et al. 2019, arXiv:1805.08206).

    The share of errors among the k most confident, averaged over k; in [0, 1], lower is better.
    Args: (N,) float, (N,) bool.
    """
    wrong = ~right[np.argsort(-confidence, kind="stable")]
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The chance that an in-domain image scores above one from outside.

    Ties count half. (N,), (M,) float.
    """
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)].sum()
    return float((ranks - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """The share of outside images that are accepted where 95 % of in-domain images are.

    Lower is better.
    """
    return float((outside >= np.quantile(inside, 0.05, method="lower")).mean())


def image_retrieval(
    image_embeds: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each image as a query among the others, but for its own near-duplicates.

    Args:
        image_embeds: (N, D) unit length.
        labels: (N,) int; images of the same class are what should be found.
        groups: (N,) near-duplicate group of each image.

    Returns:
        the rank of the first one found that has the label, from 1 (R@k is the share of ranks up to
        k), and the average precision, (N,) float each; NaN where no other image has the label.
    """
    similarity = image_embeds @ image_embeds.T
    rank, precision = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for query in range(len(labels)):
        others = np.flatnonzero(groups != groups[query])
        found = (
            labels[others[np.argsort(-similarity[query, others], kind="stable")]] == labels[query]
        )
        if found.any():
            rank[query] = found.argmax() + 1
            precision[query] = (np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean()
    return rank, precision


def hard_negative_margin(
    similarity: np.ndarray,
    prompt_classes: np.ndarray,
    labels: np.ndarray,
    class_clusters: np.ndarray,
) -> np.ndarray:
    """Best cosine with the own class's prompts minus the best with its cluster's other classes.

    Args:
        similarity: (N, P) cosine of each image with each prompt of the bank.
        prompt_classes: (P,) class of each prompt.
        labels: (N,) int.
        class_clusters: (C,) cluster of each class.

    Returns:
        (N,) float; an image passes if it is above 0; NaN where a class is alone in its cluster.
    """
    own = prompt_classes[None, :] == labels[:, None]  # (N, P)
    rival = (class_clusters[prompt_classes][None, :] == class_clusters[labels][:, None]) & ~own
    best_own = np.where(own, similarity, -np.inf).max(axis=1)
    best_rival = np.where(rival, similarity, -np.inf).max(axis=1)
    return np.where(np.isfinite(best_rival), best_own - best_rival, np.nan)


def semantic_rank(
    similarity: np.ndarray, prompt_classes: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """The best rank (from 1) of a prompt of the own class among all; ties count against it.

    Args: as `hard_negative_margin`. Returns: (N,) int; R@k is the share of ranks up to k, MRR the
    mean of 1 / rank.
    """
    own = prompt_classes[None, :] == labels[:, None]
    best_own = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best_own) & ~own).sum(axis=1)


class _Metric(evaluate.Metric):
    """`compute(predictions=…, references=…)` of probabilities (N, C) and class indices (N,)."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: (N, C) float; references: (N,) class indices",
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        return self._measure(np.asarray(predictions), np.asarray(references))


class Accuracy(_Metric):
    """`accuracy`: share of images whose most probable class is the label, in [0, 1]."""

    def _measure(self, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(correct(probabilities, labels).mean())}


class MacroF1(_Metric):
    """`macro_f1`: unweighted mean of the classes' F1, in [0, 1]."""

    def _measure(self, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"macro_f1": macro_f1(probabilities.argmax(1), labels, probabilities.shape[1])}


class ExpectedCalibrationError(_Metric):
    """`ece`: mean distance of confidence and accuracy over bins, in [0, 1]; lower is better."""

    def _measure(self, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        right = correct(probabilities, labels)
        return {"ece": expected_calibration_error(probabilities.max(axis=1), right)}
