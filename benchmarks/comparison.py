"""Recipes compared: pooled over seeds, paired by image; their table."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import Measure, bootstrap, proportion

OURS = "ours"
MEANS = (
    "validation_accuracy",
    "macro_f1",
    "lost_classes",
    "nll",
    "image_map",
    "ece_before_calibration",
    "ece",
    "hard_negative_pass_rate",
    "noise_confidence_p95",
    "retention",
    "seconds",
)


def pooled(results: Sequence[dict[str, Any]]) -> Measure:
    """The accuracy over all seeds; an image that several seeds test counts once, with its mean."""
    images, right, groups = _by_image(results)
    if len(images) == sum(len(result["test"]["image"]) for result in results):
        return proportion(right.astype(bool), groups, "test")
    return bootstrap(lambda chosen: right[chosen].mean(), groups, "test")


def paired(results: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> Measure | None:
    """The difference in accuracy, image by image, over the seeds that both have, if any.

    Raises:
        ValueError: if they were not asked the same images.
    """
    seeds = {result["seed"] for result in results} & {result["seed"] for result in others}
    if not seeds:
        return None
    images, right, groups = _by_image(result for result in results if result["seed"] in seeds)
    images_too, right_too, _ = _by_image(result for result in others if result["seed"] in seeds)
    if images != images_too:
        names = results[0]["name"], others[0]["name"]
        raise ValueError(f"'{names[0]}' and '{names[1]}' have different test images")
    difference = right - right_too
    return bootstrap(lambda chosen: difference[chosen].mean(), groups, "test")


def _by_image(results: Iterable[dict[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Distinct test images, the share of seeds that got each right (N,), and its group (N,)."""
    hits: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    for result in results:
        test = result["test"]
        for image, group, right in zip(test["image"], test["group"], test["right"], strict=True):
            hits.setdefault(image, []).append(right)
            group_of[image] = group
    images = sorted(hits)
    shares = np.array([np.mean(hits[image]) for image in images])
    return images, shares, np.array([group_of[image] for image in images])


def summary(results: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a recipe is worth over its seeds, for JSON: `accuracy` and `difference` are measures."""
    against = None if results[0]["name"] == OURS else paired(results, ours)
    values = {key: [result[key] for result in results if key in result] for key in MEANS}
    return {
        "seeds": [result["seed"] for result in results],
        "accuracy": pooled(results).to_dict(),
        "accuracy_of_seeds": [result["accuracy"] for result in results],
        "difference": against and against.to_dict(),
        **{key: float(np.mean(each)) if each else None for key, each in values.items()},
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy [95 %]": lambda row: _points(row["accuracy"], ""),
    "each seed": lambda row: ", ".join(f"{100 * value:.1f}" for value in row["accuracy_of_seeds"]),
    "validation": lambda row: _number(100 * row["validation_accuracy"], 1),
    "to ours, points [95 %]": lambda row: _points(row["difference"], "+"),
    "macro F1": lambda row: _number(row["macro_f1"], 3),
    "lost classes": lambda row: _number(row["lost_classes"], 1),
    "NLL": lambda row: _number(row["nll"], 3),
    "image mAP": lambda row: _number(row["image_map"], 3),
    "pass rate": lambda row: _number(row["hard_negative_pass_rate"], 3),
    "ECE before → after": lambda row: (
        f"{_number(row['ece_before_calibration'], 3)} → {_number(row['ece'], 3)}"
    ),
    "noise p95": lambda row: _number(row["noise_confidence_p95"], 2),
    "retention": lambda row: _number(row["retention"] and 100 * row["retention"], 1),
    "seconds": lambda row: _number(row["seconds"], 0),
}


def _points(measure: dict[str, Any] | None, sign: str) -> str:
    if measure is None:
        return "–"
    value, low, high = (f"{100 * measure[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A row of `summary` for each title."""
    lines = [["recipe", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    lines += [[title, *(cell(row) for cell in COLUMNS.values())] for title, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(rows: dict[str, dict[str, Any]], domain: Domain) -> str:
    """What the columns of the table mean."""
    images = max(row["accuracy"]["n"] for row in rows.values())
    seeds = sorted({seed for row in rows.values() for seed in row["seeds"]})
    task = f"; retention: accuracy on “{domain.retention.title}”" if domain.retention else ""
    return (
        f"Accuracy in per cent on {images} test images over the seeds "
        f"{', '.join(map(str, seeds))}, 95 % intervals by images, not by seeds; differences in "
        "points, paired by image. ECE with a temperature of its own, fitted on the calibration "
        f"split; validation, macro F1 and what follows are means over the seeds{task}; lost: "
        "classes whose F1 is 0; NLL: calibrated, in nats; image mAP: image-to-image; seconds "
        "with the evaluation, on a machine that may have had other work to do."
    )


def write_docs(path: Path, domain: Domain, table: str, note: str) -> None:
    """Puts table and note between the domain's markers; all other text stays as it is."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# What the recipe is worth\n"
    start, end = f"<!-- table:{domain.name} -->", "<!-- /table -->"
    block = "\n\n".join([start, table, note, end])
    place = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if place.search(text):
        text = place.sub(lambda _: block, text, count=1)
    else:
        text = "\n\n".join([text.rstrip(), f"## {domain.title}", block]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
