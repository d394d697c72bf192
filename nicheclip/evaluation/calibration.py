"""After training: one temperature, when to say "not sure", and which classes to name together.

All of it is fitted on the calibration split, which neither training nor the choice of the epoch has
seen: N images, `logits` or calibrated `probabilities` (N, C) float, `labels` (N,) int, and the
near-duplicate `groups` (N,).
"""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import resample_groups
from nicheclip.head import mass_above, softmax

TEMPERATURE_BOUNDS = (0.02, 50.0)
FEW_ERRORS = 20  # with fewer, the temperature is hardly known
MIN_COVERAGE = 0.5  # of a threshold that aims at an accuracy
REMEDY = "give the calibration split more images (splits.calibration in the domain file)"


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017).

    Raises:
        ValueError: if the images can't identify T: none, all right, or all wrong.
    """
    right = logits.argmax(axis=1) == labels
    if right.all() or not right.any():  # both, if there are none
        state = f"all {len(labels)} calibration images are {'right' if right.all() else 'wrong'}"
        told = state if len(labels) else "there are no calibration images"
        raise ValueError(f"the temperature can't be identified, since {told}; {REMEDY}")
    found = minimize_scalar(  # over log T, where the NLL has one minimum
        lambda log_t: nll(logits / np.exp(log_t), labels),
        bounds=np.log(TEMPERATURE_BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """That of `fit_temperature`; 1 where these images can't identify it."""
    right = logits.argmax(axis=1) == labels
    return 1.0 if right.all() or not right.any() else fit_temperature(logits, labels)


def best_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """The NLL at the temperature that suits these images best: what classifiers are compared by."""
    return nll(logits / best_temperature(logits, labels), labels)


def calibrate_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    resamples: int = 200,
    reference: bool = False,
) -> dict[str, Any]:
    """`fit_temperature` with its interval, and a warning where it is needed.

    Where all images are right there is nothing to fit: T stays 1, with a warning.

    Args:
        resamples: for the interval; 0: none is worked out.
        reference: only measured beside another model: T stays 1 as well where all are wrong.

    Returns:
        "value"; "low" and "high", its 95 % bootstrap interval; "warning", "" if there is none.

    Raises:
        ValueError: if there are no images, or all are wrong.
    """
    wrong, warning = logits.argmax(axis=1) != labels, ""
    try:
        value = fit_temperature(logits, labels)
    except ValueError as error:
        if wrong.all() and not reference:
            raise
        return {"value": 1.0, "low": 1.0, "high": 1.0, "warning": f"T stays 1: {error}"}
    if wrong.sum() < FEW_ERRORS:
        errors = f"{wrong.sum()} errors among {len(labels)} images"
        warning = f"T rests on {errors}, so it is hardly known; {REMEDY}"
    elif np.isclose(np.log(value), np.log(TEMPERATURE_BOUNDS), atol=1e-3).any():
        warning = f"T is {value:.3g}, at the end of what is searched: is this the model's data?"
    found = [
        fit_temperature(logits[chosen], labels[chosen])
        for chosen in resample_groups(groups, resamples)
        if 0 < wrong[chosen].sum() < len(chosen)
    ]
    low, high = np.percentile(found or [value], [2.5, 97.5]).tolist()
    return {"value": value, "low": low, "high": high, "warning": warning}


def fit_abstention(
    probabilities: np.ndarray,
    labels: np.ndarray,
    selective_accuracy: float,
    coverage: float | None = None,
) -> dict[str, Any]:
    """The lowest threshold whose answers are right often enough, or that answers `coverage`.

    Where no threshold that answers at least `MIN_COVERAGE` of the images reaches the accuracy, the
    one with the best is taken and "target_reached" is False.

    Returns:
        "threshold", the confidence below which an answer is "not sure"; "aim" and "target"; and
        the "selective_accuracy" and "coverage" that it gives on these images.
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
        possible &= answered >= MIN_COVERAGE * len(labels)
        reached = np.flatnonzero(possible & (selective >= selective_accuracy))[-1:]
    best = np.flatnonzero(possible)[selective[possible].argmax()]
    chosen = reached[0] if len(reached) else best
    return {
        "threshold": float(confidence[order][chosen]),
        "aim": "selective_accuracy" if coverage is None else "coverage",
        "target": selective_accuracy if coverage is None else coverage,
        "target_reached": bool(len(reached)),
        "selective_accuracy": float(selective[chosen]),
        "coverage": float(answered[chosen] / len(labels)),
    }


def fit_conformal(probabilities: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """The quantile of split-conformal, adaptive `prediction_sets` (Romano et al. 2020).

    Sets made so contain the label of `coverage` of all images like these, or more. The score of a
    class is the probability above it, not up to and with it as in arXiv:2006.02544: so no set is
    empty, and no draw decides.
    """
    scores = np.sort(mass_above(probabilities)[np.arange(len(labels)), labels])
    rank = int(np.ceil((len(labels) + 1) * coverage))  # the new image counts as one of them
    return float(scores[rank - 1]) if rank <= len(labels) else 1.0


def fit(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    domain: Domain,
    reference: bool = False,
    resamples: int = 200,
) -> dict[str, Any]:
    """What calibration.json says of a model.

    Args:
        logits: (N, C) not calibrated, of images that it has not seen.
        reference, resamples: as in `calibrate_temperature`.
    """
    temperature = calibrate_temperature(logits, labels, groups, resamples, reference)
    probabilities, coverage = softmax(logits / temperature["value"]), domain.conformal_coverage
    aims = domain.selective_accuracy, domain.answered_share
    return {
        "temperature": temperature["value"],
        "temperature_fit": temperature,
        "abstention": fit_abstention(probabilities, labels, *aims),
        "conformal": {
            "coverage": coverage,
            "quantile": fit_conformal(probabilities, labels, coverage),
        },
    }
