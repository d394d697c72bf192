"""Recipes compared: pooled over seeds, paired by image, in the tables of docs/ablations.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import Measure, bootstrap, proportion

OURS = "ours"


def pooled(results: Sequence[dict[str, Any]]) -> Measure:
    """The accuracy over all seeds.

    An image that several seeds have in test counts once, with its mean over them.
    """
    images, right, groups = _by_image(results)
    if len(images) == sum(len(result["test"]["image"]) for result in results):
        return proportion(right.astype(bool), groups, "test")
    return bootstrap(lambda chosen: right[chosen].mean(), groups, "test")


def paired(
    results: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> Measure | None:
    """The difference in accuracy, image by image, over the seeds that both have; None if there is none.

    Raises:
        ValueError: if they were not asked the same images.
    """
    seeds = {result["seed"] for result in results} & {result["seed"] for result in reference}
    if not seeds:
        return None
    images, right, groups = _by_image([result for result in results if result["seed"] in seeds])
    images_too, right_too, _ = _by_image(
        [result for result in reference if result["seed"] in seeds]
    )
    if images != images_too:
        raise ValueError(
            f"'{results[0]['name']}' and '{reference[0]['name']}' have different test images"
        )
    difference = right - right_too
    return bootstrap(lambda chosen: difference[chosen].mean(), groups, "test")


def _by_image(results: Iterable[dict[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Distinct test images in fixed order: names, share of seeds that got it right (N,), groups (N,)."""
    hits: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    for result in results:
        test = result["test"]
        for image, group, right in zip(test["image"], test["group"], test["right"], strict=True):
            hits.setdefault(image, []).append(right)
            group_of[image] = group
    images = sorted(hits)
    return (
        images,
        np.array([np.mean(hits[i]) for i in images]),
        np.array([group_of[i] for i in images]),
    )


def summary(results: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a recipe is worth over its seeds: accuracy and difference with intervals, means of the rest."""

    def mean(key: str) -> float | None:
        values = [result[key] for result in results if result.get(key) is not None]
        return float(np.mean(values)) if values else None

    against = None if results[0]["name"] == OURS else paired(results, ours)
    means = (
        "validation_accuracy", "macro_f1", "ece_before_calibration", "ece", "hard_negative_pass_rate",
        "noise_confidence_p95", "retention", "best_epoch", "seconds",
    )  # fmt: skip
    return {
        "seeds": [result["seed"] for result in results],
        "accuracy": pooled(results).to_dict(),
        "accuracy_of_seeds": [result["accuracy"] for result in results],
        "difference": against and against.to_dict(),
        **{key: mean(key) for key in means},
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy [95 %]": lambda row: _percent(row["accuracy"]),
    "each seed": lambda row: ", ".join(f"{100 * value:.1f}" for value in row["accuracy_of_seeds"]),
    "to ours, points [95 %]": lambda row: _points(row["difference"]),
    "macro F1": lambda row: _number(row["macro_f1"], 3),
    "pass rate": lambda row: _number(row["hard_negative_pass_rate"], 3),
    "ECE before → after": lambda row: (
        f"{_number(row['ece_before_calibration'], 3)} → {_number(row['ece'], 3)}"
    ),
    "noise p95": lambda row: _number(row["noise_confidence_p95"], 2),
    "retention": lambda row: "–" if row["retention"] is None else f"{100 * row['retention']:.1f}",
    "seconds": lambda row: _number(row["seconds"], 0),
}


def _percent(measure: dict[str, Any]) -> str:
    return f"{100 * measure['value']:.1f} [{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]"


def _points(measure: dict[str, Any] | None) -> str:
    if measure is None:
        return "–"
    return (
        f"{100 * measure['value']:+.1f} [{100 * measure['low']:+.1f}, {100 * measure['high']:+.1f}]"
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown_table(first: str, rows: dict[str, dict[str, Any]]) -> str:
    """A row of `summary` for each title."""
    lines = [[first, *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    lines += [[title, *(cell(row) for cell in COLUMNS.values())] for title, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(rows: dict[str, dict[str, Any]], domain: Domain) -> str:
    """What the columns of the table mean."""
    images = max(row["accuracy"]["n"] for row in rows.values())
    seeds = sorted({seed for row in rows.values() for seed in row["seeds"]})
    retention = (
        f"; retention: accuracy in per cent on “{domain.retention.title}”"
        if domain.retention
        else ""
    )
    return (
        f"Accuracy in per cent on {images} test images over the seeds "
        f"{', '.join(map(str, seeds))}, 95 % intervals by images, not by seeds; differences in "
        "points, paired by image. ECE with a temperature of its own, fitted on the calibration "
        f"split; macro F1 and what follows it are means over the seeds{retention}; seconds: of "
        "training on a machine that may have had other work to do."
    )
