"""After training: one temperature, and the confidence below which the model says that it is not sure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

TEMPERATURE_BOUNDS = (0.02, 50.0)


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats. logits (N, C) float, labels (N,) int."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017, arXiv:1706.04599).

    A bounded search over log T, where the NLL has one minimum.

    Args:
        logits: (N, C) float, of images that neither training nor the choice of the epoch has seen.
        labels: (N,) int.

    Raises:
        ValueError: if the images can't identify T: none, all right, or all wrong.
    """
    right = logits.argmax(axis=1) == labels
    if len(labels) == 0 or right.all() or not right.any():
        state = (
            "there are none" if len(labels) == 0 else f"all {len(labels)} are {'right' if right.all() else 'wrong'}"
        )
        raise ValueError(
            f"the calibration images can't identify a temperature: {state}; "
            "give the calibration split more images (splits.calibration in the domain file)"
        )
    found = minimize_scalar(
        lambda log_t: nll(logits / np.exp(log_t), labels),
        bounds=np.log(TEMPERATURE_BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


@dataclass(frozen=True)
class Abstention:
    """Answers with a confidence below `threshold` are "not sure".

    `selective_accuracy` and `coverage` are what the threshold gives on the images it was chosen on.
    """

    threshold: float
    target_accuracy: float
    target_reached: bool
    selective_accuracy: float
    coverage: float


def fit_abstention(
    logits: np.ndarray, labels: np.ndarray, temperature: float, target_accuracy: float, min_coverage: float = 0.5
) -> Abstention:
    """The lowest threshold whose answers are right often enough.

    Where no threshold that answers at least `min_coverage` of the images reaches the target, the one with the best
    selective accuracy is taken and `target_reached` is False.

    Args: logits (N, C) float and labels (N,) int of the calibration split.
    """
    probabilities = softmax(logits / temperature, axis=1)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(labels) + 1)
    selective = np.cumsum((probabilities.argmax(axis=1) == labels)[order]) / answered
    # Equal confidences are answered together: only the last of them is a possible threshold.
    possible = np.append(np.diff(confidence[order]) < 0, True) & (answered >= min_coverage * len(labels))
    reached = np.flatnonzero(possible & (selective >= target_accuracy))
    chosen = reached[-1] if len(reached) else np.flatnonzero(possible)[np.argmax(selective[possible])]
    return Abstention(
        threshold=float(confidence[order][chosen]),
        target_accuracy=target_accuracy,
        target_reached=bool(len(reached)),
        selective_accuracy=float(selective[chosen]),
        coverage=float(answered[chosen] / len(labels)),
    )
