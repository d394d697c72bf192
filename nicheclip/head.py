"""From image_embeds to answers, once for all: users, the app, calibrate.py and the benchmarks.

NumPy only.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

SCORES = ("confidence", "energy", "prompt_cosine", "mahalanobis")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def prediction_sets(probabilities: np.ndarray, quantile: float | np.ndarray) -> np.ndarray:
    """Which classes are named together, (N, C) -> (N, C) bool; never an empty row.

    A class belongs to the set if those above it hold at most `quantile` of the probability.
    """
    return mass_above(probabilities) <= quantile


def mass_above(probabilities: np.ndarray) -> np.ndarray:
    """The probability of all classes that are more probable, (N, C); 0 for the best."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    falling = np.take_along_axis(probabilities, order, axis=1)
    above = np.empty_like(probabilities)
    np.put_along_axis(above, order, np.cumsum(falling, axis=1) - falling, axis=1)
    return above


@dataclass(frozen=True)
class Head:
    """From image_embeds to logits: what users load, and what calibrate.py fits and judges.

    Attributes:
        prototypes: (C, D) unit-length text_embeds of the canonical prompts; or a probe's weights.
        class_means: `whitening` (D, D) and whitened `means` (C, D), see `fit_class_means`.
        trained_logit_scale: logarithm of what multiplies cosines, as training left it.
        temperature: divides the logits; the published weights have it folded in.
        bias: (C,) of a linear probe.
    """

    prototypes: np.ndarray
    class_means: dict[str, np.ndarray]
    trained_logit_scale: float
    temperature: float = 1.0
    bias: np.ndarray | float = 0.0

    def at(self, temperature: float) -> Self:
        """The same, calibrated."""
        return replace(self, temperature=temperature)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by, the temperature folded in."""
        return math.exp(self.trained_logit_scale) / self.temperature

    def logits(self, image_embeds: np.ndarray) -> np.ndarray:
        """Unit-length image_embeds (N, D) -> calibrated logits (N, C)."""
        scaled = self.logit_scale * image_embeds
        return scaled @ self.prototypes.T + self.bias / self.temperature

    def probabilities(self, image_embeds: np.ndarray) -> np.ndarray:
        """(N, D) -> calibrated (N, C)."""
        return softmax(self.logits(image_embeds))

    def ood_scores(self, image_embeds: np.ndarray) -> dict[str, np.ndarray]:
        """How much each image looks like one of the domain, higher is more: (N,) by each score.

        The energy (Liu et al. 2020, arXiv:2010.03759) is that of calibrated logits, mahalanobis
        minus the distance to the nearest class mean.
        """
        logits = self.logits(image_embeds)
        highest = logits.max(axis=1)
        whitened = image_embeds @ self.class_means["whitening"]
        distances = [np.linalg.norm(whitened - mean, axis=1) for mean in self.class_means["means"]]
        return {
            "confidence": softmax(logits).max(axis=1),
            "energy": highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)),
            "prompt_cosine": highest / self.logit_scale,
            "mahalanobis": -np.min(distances, axis=0),
        }
