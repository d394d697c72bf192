"""The baseline that fine-tuning has to beat: a linear probe on the base's frozen image_embeds."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from nicheclip.evaluation.calibration import nll
from nicheclip.evaluation.metrics import correct
from nicheclip.head import Head

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def fit_probe(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    num_classes: int,
) -> Head:
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
            head = _head(model.fit(*train), num_classes)
            logits = head.logits(embeds)
            tried.append((correct(logits, labels).mean(), -nll(logits, labels), head))
    return max(tried, key=lambda entry: entry[:2])[2]


def _head(model: LogisticRegression, num_classes: int) -> Head:
    """Its weights and bias; a class that it has never seen gets no logit worth speaking of."""
    rows = np.column_stack([model.coef_, model.intercept_])  # (C, D + 1)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for both
        rows = np.concatenate([-rows, rows]) / 2
    weights, bias = np.zeros((num_classes, rows.shape[1] - 1)), np.full(num_classes, -1e3)
    weights[model.classes_], bias[model.classes_] = rows[:, :-1], rows[:, -1]
    return Head(weights, {}, trained_logit_scale=0.0, bias=bias)
