"""Results that say what they rest on: a value, its 95 % interval, how many images, which split."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

METRIC_TITLES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "hard_negative_pass_rate": "Hard-negative pass rate",
    "semantic_recall_at_1": "Semantic R@1",
    "semantic_recall_at_3": "Semantic R@3",
    "semantic_recall_at_5": "Semantic R@5",
    "semantic_mrr": "Semantic MRR",
    "ece": "ECE, calibrated",
    "ece_before_calibration": "ECE, before calibration",
    "nll": "NLL, calibrated",
    "coverage": "Coverage: share answered",
    "selective_accuracy": "Accuracy of the answers",
    "noise_confidence_p95": "Confidence on noise, p95",
}
LOWER_IS_BETTER = frozenset({"ece", "ece_before_calibration", "nll", "noise_confidence_p95"})


@dataclass(frozen=True)
class Measure:
    """One metric on one split.

    `low` and `high` bound the 95 % interval, `n` counts what was averaged over, `base` is the same metric of the
    base model's zero-shot classifier on the same images.
    """

    value: float
    low: float
    high: float
    n: int
    split: str
    base: Measure | None = None

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.base is None:
            fields.pop("base")
        else:
            fields["base"] = self.base.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Measure:
        base = fields.get("base")
        return cls(**{**fields, "base": cls.from_dict(base) if base else None})

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(hits: np.ndarray, groups: np.ndarray, split: str) -> Measure:
    """The share of hits (N,) bool, with Wilson's interval, which does not collapse at 0 or 1.

    Where near-duplicates share a group (N,), the images are not independent and the groups are resampled instead.
    """
    if len(np.unique(groups)) < len(groups):
        return bootstrap(lambda chosen: hits[chosen].mean(), groups, split)
    test = binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(confidence_level=0.95, method="wilson")
    return Measure(float(test.statistic), float(interval.low), float(interval.high), len(hits), split)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    split: str,
    biased: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Measure:
    """A statistic with its percentile bootstrap interval, resampling whole groups of near-duplicates.

    Args:
        statistic: takes the indices of the chosen images (M,) int, gives the value.
        groups: the group of each image (N,), any comparable type.
        biased: of a statistic that grows with noise, as the ECE does, resamples lie above the value; the basic
            bootstrap (the percentiles mirrored at the value, cut off at 0) takes that off.
    """
    _, group_of_image = np.unique(groups, return_inverse=True)
    order = np.argsort(group_of_image, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group_of_image))[:-1])
    rng = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([members[pick] for pick in rng.integers(len(members), size=len(members))]))
        for _ in range(resamples)
    ]
    value = float(statistic(np.arange(len(groups))))
    low, high = np.percentile(values, [2.5, 97.5])
    if biased:
        low, high = max(0.0, 2 * value - high), max(value, 2 * value - low)
    return Measure(value, float(low), float(high), len(groups), split)


def detectable_difference(n: int, accuracy: float = 0.8) -> float:
    """The smallest difference in accuracy that `n` images each show with 80 % power at the 5 % level.

    Of two models of about that `accuracy`, by the normal approximation for unpaired proportions, which is cautious: on
    the same images the models mostly agree.
    """
    return float((norm.ppf(0.975) + norm.ppf(0.8)) * np.sqrt(2 * accuracy * (1 - accuracy) / n))


def gate_verdict(metric: str, value: float, target: float) -> str:
    """`pass` or `fail`, by the value alone; read the interval beside it."""
    return "pass" if (value < target if metric in LOWER_IS_BETTER else value >= target) else "fail"


def gate_target(metric: str, target: float) -> str:
    return f"{'<' if metric in LOWER_IS_BETTER else '≥'} {target:.2f}"


def write_json(path: str | Path, content: Any) -> None:
    """Writes under a temporary name and renames it into place, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` once all is written."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    former = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)  # deleting takes longer than renaming, and may be interrupted
    unfinished.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def read_json(path: str | Path, remedy: str) -> Any:
    """Reads a file that an earlier stage wrote.

    Raises:
        FileNotFoundError: if it is absent; `remedy` names the command that writes it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing; {remedy}")
    return json.loads(path.read_text(encoding="utf-8"))


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A plain-text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
