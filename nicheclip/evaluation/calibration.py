"""After training: one temperature, when to say "not sure", and which classes to name together.

All of it is fitted on the calibration split, which neither training nor the choice of the epoch has
seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from nicheclip.evaluation.intervals import resample_groups
from nicheclip.evaluation.metrics import expected_calibration_error

TEMPERATURE_BOUNDS = (0.02, 50.0)
FEW_ERRORS = 20  # with fewer, the temperature is hardly known
Objective = Literal["nll", "ece"]


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats. logits (N, C) float, labels (N,) int."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


@dataclass(frozen=True)
class Temperature:
    """`value` divides the logits.

    `low` and `high` bound its 95 % bootstrap interval. `warning` may be empty.
    """

    value: float
    low: float
    high: float
    objective: Objective
    warning: str = ""


def fit_temperature(logits: np.ndarray, labels: np.ndarray, objective: Objective = "nll") -> float:
    """The temperature T that minimises the NLL, or the ECE, of softmax(logits / T) (Guo et al. 2017).

    A bounded search over log T, where the NLL has one minimum. The ECE has several, so the best of
    a grid is refined.

    Args:
        logits: (N, C) float.
        labels: (N,) int.

    Raises:
        ValueError: if the images can't identify T: none, all right, or all wrong.
    """
    right = logits.argmax(axis=1) == labels
    if len(labels) == 0 or right.all() or not right.any():
        state = (
            "there are none"
            if len(labels) == 0
            else f"all {len(labels)} are {'right' if right.all() else 'wrong'}"
        )
        raise ValueError(
            f"the calibration images can't identify a temperature: {state}; "
            "give the calibration split more images (splits.calibration in the domain file)"
        )

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        if objective == "nll":
            return nll(scaled, labels)
        return expected_calibration_error(softmax(scaled, axis=1).max(axis=1), right)

    low, high = np.log(TEMPERATURE_BOUNDS)
    if objective == "ece":
        grid = np.linspace(low, high, 100)
        best = int(np.argmin([loss(log_t) for log_t in grid]))
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    return float(
        np.exp(
            minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x
        )
    )


def calibrate_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    objective: Objective = "nll",
    resamples: int = 200,
) -> Temperature:
    """`fit_temperature` with its bootstrap interval over near-duplicate groups (N,), and a warning where it is needed.

    Where all images are right there is nothing to fit: T stays 1, with a warning.

    Raises:
        ValueError: if there are no images, or all are wrong.
    """
    wrong = int((logits.argmax(axis=1) != labels).sum())
    remedy = "give the calibration split more images (splits.calibration in the domain file)"
    if len(labels) and wrong == 0:
        return Temperature(
            1.0,
            1.0,
            1.0,
            objective,
            f"all {len(labels)} calibration images are right, so T stays 1; {remedy}",
        )
    value = fit_temperature(logits, labels, objective)
    found = []
    for chosen in resample_groups(groups, resamples):
        errors = (logits[chosen].argmax(axis=1) != labels[chosen]).sum()
        if 0 < errors < len(chosen):
            found.append(fit_temperature(logits[chosen], labels[chosen], objective))
    low, high = np.percentile(found, [2.5, 97.5])
    warning = ""
    if wrong < FEW_ERRORS:
        warning = (
            f"T rests on {wrong} errors among {len(labels)} images, so it is hardly known; {remedy}"
        )
    elif np.isclose(np.log(value), np.log(TEMPERATURE_BOUNDS), atol=1e-3).any():
        warning = f"T is {value:.3g}, at the end of what is searched: the logits do not look like those of this model"
    return Temperature(value, float(low), float(high), objective, warning)


@dataclass(frozen=True)
class Abstention:
    """Predictions with a confidence below `threshold` are "not sure".

    It aims at `target`, a share of right answers (`aim` is "selective_accuracy") or of answers
    ("coverage"); `selective_accuracy` and `coverage` are what it gives on the images that it was
    chosen on.
    """

    threshold: float
    aim: Literal["selective_accuracy", "coverage"]
    target: float
    target_reached: bool
    selective_accuracy: float
    coverage: float


def fit_abstention(
    probabilities: np.ndarray,
    labels: np.ndarray,
    selective_accuracy: float,
    coverage: float | None = None,
    min_coverage: float = 0.5,
) -> Abstention:
    """The lowest threshold whose answers are right often enough; or, with `coverage`, that which answers so many.

    Where no threshold that answers at least `min_coverage` of the images reaches the accuracy, the
    one with the best is taken and `target_reached` is False.

    Args: probabilities (N, C) float, calibrated, and labels (N,) int of the calibration split.
    """
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(labels) + 1)
    selective = np.cumsum((probabilities.argmax(axis=1) == labels)[order]) / answered
    # Equal confidences are answered together: only the last of them is a possible threshold.
    possible = np.append(np.diff(confidence[order]) < 0, True)
    if coverage is not None:
        reached = np.flatnonzero(possible & (answered >= coverage * len(labels)))[:1]
    else:
        possible &= answered >= min_coverage * len(labels)
        reached = np.flatnonzero(possible & (selective >= selective_accuracy))[-1:]
    chosen = (
        reached[0] if len(reached) else np.flatnonzero(possible)[np.argmax(selective[possible])]
    )
    return Abstention(
        threshold=float(confidence[order][chosen]),
        aim="selective_accuracy" if coverage is None else "coverage",
        target=selective_accuracy if coverage is None else coverage,
        target_reached=bool(len(reached)),
        selective_accuracy=float(selective[chosen]),
        coverage=float(answered[chosen] / len(labels)),
    )


@dataclass(frozen=True)
class Conformal:
    """A class belongs to the prediction set if the classes above it hold at most `quantile` of the probability.

    Sets made so contain the label of `coverage` of all images like those of the calibration split,
    or more. Where the model alone is right that often, the quantile is 0 and every set is the best
    class alone.
    """

    coverage: float
    quantile: float


def fit_conformal(probabilities: np.ndarray, labels: np.ndarray, coverage: float) -> Conformal:
    """Split-conformal, adaptive prediction sets (Romano et al. 2020, arXiv:2006.02544), without their random part.

    The score of a class is the probability above it, not up to and with it: so no set is empty, and
    no draw decides.

    Args: probabilities (N, C) float and labels (N,) int of the calibration split.
    """
    scores = np.sort(_mass_above(probabilities)[np.arange(len(labels)), labels])
    # (N + 1): the new image counts as one of them
    rank = int(np.ceil((len(labels) + 1) * coverage))
    return Conformal(coverage, float(scores[rank - 1]) if rank <= len(labels) else 1.0)


def prediction_sets(probabilities: np.ndarray, conformal: Conformal) -> np.ndarray:
    """(N, C) -> (N, C) bool, never an empty row."""
    return _mass_above(probabilities) <= conformal.quantile


def _mass_above(probabilities: np.ndarray) -> np.ndarray:
    """The probability of all classes that are more probable, (N, C); 0 for the best."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    falling = np.take_along_axis(probabilities, order, axis=1)
    above = np.empty_like(probabilities)
    np.put_along_axis(above, order, np.cumsum(falling, axis=1) - falling, axis=1)
    return above
