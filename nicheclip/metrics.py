"""What the scorecard measures: pure functions, and `evaluate.Metric` subclasses over them.

The metrics subclass `evaluate.Metric` here because `evaluate.load(name)` would fetch a script from the Hub.
Definitions follow the recipe in the article that NicheCLIP grew from, unless a docstring names another source.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


def correct(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the most probable class is the label. (N, C) float, (N,) int -> (N,) bool."""
    return probabilities.argmax(axis=1) == labels


def macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of the classes' F1, over classes that occur or are predicted. (N, C) float, (N,) int."""
    classes = np.arange(probabilities.shape[1])
    return float(f1_score(labels, probabilities.argmax(1), labels=classes, average="macro", zero_division=np.nan))


def class_f1(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """F1 of each class. (N, C) float, (N,) int -> (C,) float, NaN for a class that neither occurs nor is predicted."""
    classes = np.arange(probabilities.shape[1])
    return f1_score(labels, probabilities.argmax(1), labels=classes, average=None, zero_division=np.nan)


def reliability(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> tuple[np.ndarray, ...]:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv:1706.04599).

    Args:
        probabilities: (N, C) float, rows sum to 1.
        labels: (N,) int.

    Returns:
        mean confidence, accuracy and count of each bin, each (n_bins,); the first two are 0 where a bin is empty.
    """
    confidence = probabilities.max(axis=1)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    counts = np.bincount(bins, minlength=n_bins)
    filled = np.maximum(counts, 1)
    mean_confidence = np.bincount(bins, weights=confidence, minlength=n_bins) / filled
    accuracy = np.bincount(bins, weights=correct(probabilities, labels), minlength=n_bins) / filled
    return mean_confidence, accuracy, counts


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equal-width bins, in [0, 1]; lower is better."""
    mean_confidence, accuracy, counts = reliability(probabilities, labels, n_bins)
    return float((np.abs(mean_confidence - accuracy) * counts).sum() / counts.sum())


def hard_negative_margin(
    similarity: np.ndarray, prompt_classes: np.ndarray, labels: np.ndarray, class_clusters: np.ndarray
) -> np.ndarray:
    """Best cosine with the own class's prompts minus the best with those of the other classes in its cluster.

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


def semantic_rank(similarity: np.ndarray, prompt_classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The best rank (from 1) of a prompt of the image's own class among all prompts; ties count against it.

    Args: as `hard_negative_margin`. Returns: (N,) int. R@k is the share of ranks up to k, MRR the mean of 1/rank.
    """
    own = prompt_classes[None, :] == labels[:, None]
    best_own = np.where(own, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best_own) & ~own).sum(axis=1)


class _ProbabilityMetric(evaluate.Metric):
    """A metric of class probabilities (N, C) against labels (N,)."""

    description = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: (N, C) class probabilities; references: (N,) class indices",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )


class Accuracy(_ProbabilityMetric):
    """Share of images whose most probable class is the label, in [0, 1]."""

    description = "Top-1 accuracy"

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(correct(np.asarray(predictions), np.asarray(references)).mean())}


class MacroF1(_ProbabilityMetric):
    """Unweighted mean of the classes' F1, in [0, 1]."""

    description = "Macro-averaged F1"

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"macro_f1": macro_f1(np.asarray(predictions), np.asarray(references))}


class ExpectedCalibrationError(_ProbabilityMetric):
    """ECE over equal-width bins (Guo et al. 2017), in [0, 1]; lower is better."""

    description = "Expected calibration error, equal-width bins"

    def _compute(self, predictions: np.ndarray, references: np.ndarray, n_bins: int = 15) -> dict[str, float]:
        return {"ece": expected_calibration_error(np.asarray(predictions), np.asarray(references), n_bins)}
