"""The baselines that fine-tuning has to beat: probes on the base's frozen features."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from nicheclip.evaluation.calibration import best_temperature, nll
from nicheclip.evaluation.metrics import correct
from nicheclip.files import replaced_file
from nicheclip.head import Head

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
SHRINKAGES = (0.05, 0.1, 0.3, 0.6, 0.9)
STRONG_PROBE_FILE = "strong_probe.safetensors"  # of a run directory
Part = tuple[np.ndarray, np.ndarray]  # features (N, F) and labels (N,)


def fit_probe(train: Part, validation: Part, num_classes: int, refit: bool = False) -> Head:
    """Logistic regression on image_embeds, of the strength and class weights best on validation.

    Ties are decided by the NLL.

    Args:
        refit: whether the best is fitted anew on both parts, its logits divided by the temperature
            that suits validation, so that those of different kinds can be calibrated together.
    """
    models = (
        LogisticRegression(C=strength, class_weight=weights, tol=1e-3, max_iter=1000)
        for strength, weights in product(STRENGTHS, (None, "balanced"))
    )
    return _best(models, train, validation, num_classes, refit)


def fit_strong_probe(train: Part, validation: Part, num_classes: int, refit: bool = False) -> Head:
    """The best on validation of shrinkage LDA and logistic regression, on pooled features.

    Those lie before the visual projection, which throws away much that tells classes apart. The
    training features may be of several augmented views. `refit`: as in `fit_probe`.
    """
    scale, several = train[0].std(), len(train[1]) > len(np.unique(train[1]))
    shrinkages = SHRINKAGES if several else ()  # LDA needs two images of a class
    models = (
        *(LinearDiscriminantAnalysis(solver="lsqr", shrinkage=each) for each in shrinkages),
        *(LogisticRegression(C=each, tol=1e-3, max_iter=300) for each in (1e-3, 1e-2, 1e-1)),
    )
    scaled, judged = ((features / scale, labels) for features, labels in (train, validation))
    head = _best(models, scaled, judged, num_classes, refit)
    return Head(head.prototypes / scale, {}, trained_logit_scale=0.0, bias=head.bias)


def _best(
    models: Iterable[Any], train: Part, validation: Part, num_classes: int, refit: bool
) -> Head:
    features, labels = validation
    tried = []
    with threadpool_limits(1), warnings.catch_warnings():
        # a probe that is nearly converged is as good here
        warnings.simplefilter("ignore", ConvergenceWarning)
        for model in models:
            head = _head(model.fit(*train), num_classes)
            logits = head.logits(features)
            tried.append((correct(logits, labels).mean(), -nll(logits, labels), head, model))
        *_, head, model = max(tried, key=lambda entry: entry[:2])
        if refit:
            scale = best_temperature(head.logits(features), labels)
            both = (np.concatenate(parts) for parts in zip(train, validation, strict=True))
            head = _head(model.fit(*both), num_classes)
            head = replace(head, prototypes=head.prototypes / scale, bias=head.bias / scale)
    return head


def save_strong_probe(head: Head, run: Path) -> None:
    """Writes RUN/strong_probe.safetensors."""
    weights = {"weights": head.prototypes, "bias": np.asarray(head.bias)}
    with replaced_file(run / STRONG_PROBE_FILE) as unfinished:
        save_file(weights, unfinished)


def load_strong_probe(run: Path) -> Head:
    """The one that train.py has fitted.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not (run / STRONG_PROBE_FILE).is_file():
        raise FileNotFoundError(
            f"there is no '{run / STRONG_PROBE_FILE}'; run `accelerate launch train.py {run}` again"
        )
    saved = load_file(run / STRONG_PROBE_FILE)
    return Head(saved["weights"], {}, trained_logit_scale=0.0, bias=saved["bias"])


def _head(model: Any, num_classes: int) -> Head:
    """Its weights and bias; a class that it has never seen gets no logit worth speaking of."""
    rows = np.column_stack([model.coef_, model.intercept_])  # (C, D + 1)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for both
        rows = np.concatenate([-rows, rows]) / 2
    weights, bias = np.zeros((num_classes, rows.shape[1] - 1)), np.full(num_classes, -1e3)
    weights[model.classes_], bias[model.classes_] = rows[:, :-1], rows[:, -1]
    return Head(weights, {}, trained_logit_scale=0.0, bias=bias)
