"""The baseline that fine-tuning has to beat: a linear probe on the base's frozen image_embeds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import product

import numpy as np
from datasets import Dataset
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import fit, nll
from nicheclip.evaluation.metrics import correct
from nicheclip.evaluation.predictions import Predictions

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Probe:
    """A fitted logistic regression over C classes."""

    fitted: LogisticRegression
    num_classes: int

    def logits(self, image_embeds: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C); a class that it has never seen gets none worth speaking of."""
        logits = np.full((len(image_embeds), self.num_classes), -1e3)
        scores = self.fitted.decision_function(image_embeds)
        two = scores.ndim == 1
        logits[:, self.fitted.classes_] = np.stack([-scores, scores], axis=1) / 2 if two else scores
        return logits


def fit_probe(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    num_classes: int,
) -> Probe:
    """Logistic regression, of the strength and class weights that are best on validation.

    Ties are decided by the NLL. Args: image_embeds (N, D) and labels (N,) of each split.
    """
    embeds, labels = validation
    tried = []
    with threadpool_limits(1), warnings.catch_warnings():
        # a probe that is nearly converged is as good here
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength, weights in product(STRENGTHS, (None, "balanced")):
            model = LogisticRegression(C=strength, class_weight=weights, tol=1e-3, max_iter=1000)
            probe = Probe(model.fit(*train), num_classes)
            logits = probe.logits(embeds)
            tried.append((correct(logits, labels).mean(), -nll(logits, labels), probe))
    return max(tried, key=lambda entry: entry[:2])[2]


def run_probe(
    embeds: dict[str, np.ndarray], splits: dict[str, Dataset], domain: Domain
) -> Predictions:
    """A probe on the base's image_embeds of each split, calibrated and run as the others are."""
    labels = {name: np.array(rows["label"]) for name, rows in splits.items()}
    train, validation = ((embeds[name], labels[name]) for name in ("train", "validation"))
    probe = fit_probe(train, validation, len(domain.classes))
    logits, groups = probe.logits(embeds["calibration"]), splits["calibration"]["group_id"]
    fitted = fit(logits, labels["calibration"], np.array(groups), domain, reference=True)
    return Predictions(probe.logits(embeds["test"]) / fitted["temperature"], fitted)
