"""Results that say what they rest on: a value, its 95 % interval, how many images, which split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pydantic
from scipy.stats import binomtest, norm

RESAMPLES = 1000
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "worst_class_f1": "F1 of the worst class",
    "top_3_accuracy": "Top-3 accuracy",
    "hard_negative_pass_rate": "Hard-negative pass rate",
    "hard_negative_margin": "Hard-negative margin",
    "semantic_recall_at_1": "Semantic R@1",
    "semantic_recall_at_3": "Semantic R@3",
    "semantic_recall_at_5": "Semantic R@5",
    "semantic_mrr": "Semantic MRR",
    "image_recall_at_1": "Image-to-image R@1",
    "image_recall_at_5": "Image-to-image R@5",
    "image_map": "Image-to-image mAP",
    "ece": "ECE, calibrated",
    "ece_of_perfect": "ECE of a perfectly calibrated model",
    "ece_equal_mass": "ECE, calibrated, equal-mass bins",
    "ece_before_calibration": "ECE, before calibration",
    "nll": "NLL, calibrated",
    "brier": "Brier score",
    "aurc": "AURC",
    "coverage": "Coverage: share answered",
    "selective_accuracy": "Accuracy of the answers",
    "conformal_coverage": "Prediction sets: coverage",
    "conformal_worst_class": "Prediction sets: coverage of the worst class",
    "conformal_set_size": "Prediction sets: mean size",
    "noise_confidence_p95": "Confidence on noise, p95",
    "ood_auroc": "Outside the domain: AUROC",
    "ood_fpr95": "Outside the domain: FPR95",
    "ood_accepted": "Outside the domain: share not noticed",
    "in_domain_accepted": "In the domain: share accepted",
    "same_answer": "Same answer after mild changes",
    "embedding_stability": "Cosine after mild changes",
    "prompt_consistency": "Same answer with other prompts",
}
LOWER_IS_BETTER = frozenset(
    "ece ece_of_perfect ece_equal_mass ece_before_calibration nll brier aurc conformal_set_size "
    "noise_confidence_p95 ood_fpr95 ood_accepted".split()
)


@pydantic.dataclasses.dataclass(frozen=True)
class Measure:
    """One metric on one split, over `n` images, with its 95 % interval.

    On the same images: `base`, its zero-shot classifier; `probe`, a linear probe on its
    image_embeds; `strong_probe`, one on its pooled features. Paired differences: `difference` to
    the base, and `to_probe`, to the better one of the probes. `Measure(**fields)` reads what
    `to_dict` wrote.
    """

    value: float
    low: float
    high: float
    n: int
    split: str
    base: Measure | None = None
    probe: Measure | None = None
    strong_probe: Measure | None = None
    difference: Measure | None = None
    to_probe: Measure | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is written to JSON: what is None is left out."""
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None})

    def widened(self, folds: int) -> Measure:
        """With the intervals of a cross-fitted measure: as if one image in `folds` were missing.

        The models of the folds share most of their training images, so their errors are not
        independent. Simulated: see docs/scorecard.md.
        """
        factor = math.sqrt(folds / (folds - 1))
        low = self.value - factor * (self.value - self.low)
        high = self.value + factor * (self.high - self.value)
        if 0 <= self.low <= self.high <= 1:
            low, high = max(0.0, low), min(1.0, high)
        fields = asdict(self).items()
        nested = {
            name: getattr(self, name).widened(folds) for name, of in fields if isinstance(of, dict)
        }
        return replace(self, low=low, high=high, **nested)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(hits: np.ndarray, groups: np.ndarray, split: str) -> Measure:
    """The share of hits (N,) bool, with Wilson's interval, which does not collapse at 0 or 1.

    Where near-duplicates share a group (N,), the images are not independent and the groups are
    resampled instead.
    """
    if len(np.unique(groups)) < len(groups):
        return bootstrap(lambda chosen: float(hits[chosen].mean()), groups, split)
    test = binomtest(int(hits.sum()), len(hits))
    low, high = test.proportion_ci(confidence_level=0.95, method="wilson")
    return Measure(float(test.statistic), float(low), float(high), len(hits), split)


def bootstrap(
    statistic: Callable[[np.ndarray], float], groups: np.ndarray, split: str, biased: bool = False
) -> Measure:
    """A statistic with its percentile bootstrap interval, resampling whole groups.

    Args:
        statistic: takes the indices of the chosen images (M,) int, gives the value; NaN where they
            allow none.
        groups: the near-duplicate group of each image (N,), any comparable type.
        biased: of a statistic that grows with noise, as the ECE does, resamples lie above the
            value, of a minimum below it; the basic bootstrap (the percentiles mirrored at the
            value, cut off at 0 and 1) takes that off.
    """
    value = float(statistic(np.arange(len(groups))))
    resampled = [statistic(chosen) for chosen in resample_groups(groups)]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    if biased:
        low, high = min(value, max(0.0, 2 * value - high)), max(value, min(1.0, 2 * value - low))
    return Measure(value, float(low), float(high), len(groups), split)


def resample_groups(groups: np.ndarray, resamples: int = RESAMPLES) -> list[np.ndarray]:
    """Indices of the images in each resample of whole groups (N,); equal groups, equal draws."""
    numbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return _resampled(numbers.tobytes(), resamples)


@lru_cache(maxsize=16)
def _resampled(group_numbers: bytes, resamples: int) -> list[np.ndarray]:
    groups = np.frombuffer(group_numbers, dtype=np.int64)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(members), size=len(members)) for _ in range(resamples))
    return [np.concatenate([members[pick] for pick in picks]) for picks in drawn]


def detectable_difference(n: int, accuracy: float = 0.8) -> float:
    """The difference in accuracy that `n` images each show with 80 % power at the 5 % level.

    Of two models of about that `accuracy`, by the normal approximation for unpaired proportions,
    which is cautious: on the same images the models mostly agree.
    """
    return float((norm.ppf(0.975) + norm.ppf(0.8)) * np.sqrt(2 * accuracy * (1 - accuracy) / n))


@dataclass(frozen=True)
class Verdict:
    """Whether a measure reaches its target."""

    target: str
    verdict: Literal["pass", "fail", "undecided"]  # undecided: the interval holds the target
    more: int | None = None  # images that would decide it; None: it is, or lies on the target

    def __str__(self) -> str:
        more = f", {self.more:,} more images would decide" if self.more else ""
        return f"{self.target} {self.verdict}{more}"


def judge_gate(metric: str, measure: Measure, target: float) -> Verdict:
    """Whether a metric reaches its target, by its interval."""
    lower = metric in LOWER_IS_BETTER
    told = f"{'<' if lower else '≥'} {target:.2f}"
    if measure.high < target:
        return Verdict(told, "pass" if lower else "fail")
    if measure.low >= target:
        return Verdict(told, "fail" if lower else "pass")
    # The interval's side towards the target shrinks with the root of n.
    distance = abs(measure.value - target)
    side = measure.high - measure.value if measure.value < target else measure.value - measure.low
    more = math.ceil(measure.n * ((side / distance) ** 2 - 1)) if distance > 0 else None
    return Verdict(told, "undecided", more)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A plain-text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in [header, ["-" * width for width in widths], *rows]:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)
