"""After training: one temperature, when to say "not sure", and which classes to name together.

All of it is fitted on the calibration split, which neither training nor the choice of the epoch has
seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import resample_groups
from nicheclip.head import mass_above, softmax

TEMPERATURE_BOUNDS = (0.02, 50.0)
FEW_ERRORS = 20  # with fewer, the temperature is hardly known
REMEDY = "give the calibration split more images (splits.calibration in the domain file)"


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats. logits (N, C) float, labels (N,) int."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


@dataclass(frozen=True)
class Temperature:
    """`value` divides the logits; `low` and `high` bound its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    warning: str = ""


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017).

    Args:
        logits: (N, C) float.
        labels: (N,) int.

    Raises:
        ValueError: if the images can't identify T: none, all right, or all wrong.
    """
    right = logits.argmax(axis=1) == labels
    if len(labels) == 0 or right.all() or not right.any():
        state = f"all {len(labels)} are {'right' if right.all() else 'wrong'}"
        raise ValueError(
            "the calibration images can't identify a temperature: "
            f"{state if len(labels) else 'there are none'}; {REMEDY}"
        )
    found = minimize_scalar(  # over log T, where the NLL has one minimum
        lambda log_t: nll(logits / np.exp(log_t), labels),
        bounds=np.log(TEMPERATURE_BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def calibrate_temperature(
    logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, resamples: int = 200
) -> Temperature:
    """`fit_temperature` with its bootstrap interval over near-duplicate groups (N,).

    Where all images are right there is nothing to fit: T stays 1, with a warning.

    Raises:
        ValueError: if there are no images, or all are wrong.
    """
    wrong = int((logits.argmax(axis=1) != labels).sum())
    if len(labels) and wrong == 0:
        warning = f"all {len(labels)} calibration images are right, so T stays 1; {REMEDY}"
        return Temperature(1.0, 1.0, 1.0, warning)
    value = fit_temperature(logits, labels)
    found = []
    for chosen in resample_groups(groups, resamples):
        errors = (logits[chosen].argmax(axis=1) != labels[chosen]).sum()
        if 0 < errors < len(chosen):
            found.append(fit_temperature(logits[chosen], labels[chosen]))
    low, high = np.percentile(found, [2.5, 97.5])
    warning = ""
    if wrong < FEW_ERRORS:
        warning = f"T rests on {wrong} errors among {len(labels)} images: hardly known; {REMEDY}"
    elif np.isclose(np.log(value), np.log(TEMPERATURE_BOUNDS), atol=1e-3).any():
        warning = f"T is {value:.3g}, at the end of what is searched: are these logits a CLIP's?"
    return Temperature(value, float(low), float(high), warning)


@dataclass(frozen=True)
class Abstention:
    """Answers with a confidence below `threshold` are "not sure".

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
    """The lowest threshold whose answers are right often enough, or that gives `coverage`.

    Where no threshold that answers at least `min_coverage` of the images reaches the accuracy, the
    one with the best is taken and `target_reached` is False.

    Args:
        probabilities: (N, C) float, calibrated, of the calibration split.
        labels: (N,) int.
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
    best = np.flatnonzero(possible)[np.argmax(selective[possible])]
    chosen = reached[0] if len(reached) else best
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
    """A class belongs to the prediction set if those above it hold at most `quantile`.

    Sets made so contain the label of `coverage` of all images like those of the calibration split,
    or more. Where the model alone is right that often, the quantile is 0 and every set is the best
    class alone.
    """

    coverage: float
    quantile: float


def fit_conformal(probabilities: np.ndarray, labels: np.ndarray, coverage: float) -> Conformal:
    """Split-conformal, adaptive prediction sets (Romano et al. 2020, arXiv:2006.02544).

    Without their random part: the score of a class is the probability above it, not up to and with
    it. So no set is empty, and no draw decides.

    Args:
        probabilities: (N, C) float, calibrated, of the calibration split.
        labels: (N,) int.
    """
    scores = np.sort(mass_above(probabilities)[np.arange(len(labels)), labels])
    rank = int(np.ceil((len(labels) + 1) * coverage))  # N + 1: the new image is one of them
    return Conformal(coverage, float(scores[rank - 1]) if rank <= len(labels) else 1.0)


@dataclass(frozen=True)
class Fitted:
    """What the calibration split decides; NLL before and after the temperature, in nats."""

    temperature: Temperature
    abstention: Abstention
    conformal: Conformal
    nll_before: float
    nll_after: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the temperature is a number there, what is known of it lies beside."""
        fields = asdict(self)
        return fields | {
            "temperature": self.temperature.value,
            "temperature_fit": fields["temperature"],
        }


def fit(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    domain: Domain,
    reference: bool = False,
) -> Fitted:
    """From uncalibrated logits (N, C), labels and near-duplicate groups (N,) of the calibration split.

    Args:
        reference: only measured beside another model: if all images are wrong, T stays 1.

    Raises:
        ValueError: if all images are wrong.
    """
    try:
        temperature = calibrate_temperature(logits, labels, groups)
    except ValueError as error:
        if not reference:
            raise
        temperature = Temperature(1.0, 1.0, 1.0, str(error))
    scaled = logits / temperature.value
    probabilities = softmax(scaled)
    return Fitted(
        temperature,
        fit_abstention(probabilities, labels, domain.selective_accuracy, domain.answered_share),
        fit_conformal(probabilities, labels, domain.conformal_coverage),
        nll(logits, labels),
        nll(scaled, labels),
    )
