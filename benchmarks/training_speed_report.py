"""What benchmarks.training_speed has found, in tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from model_card.figures import CLUSTER_COLOURS, STYLE
from nicheclip.evaluation.intervals import format_table

# the article's: an epoch's samples, and the images that they are drawn from (4,545 - 485)
VISITS, IMAGES = 7018, 4060
PARTS = ("data", "text tower", "visual tower", "loss and backward", "optimiser")
BUILDING = "building the features"


def hours_by_part(stages: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Of the whole schedule, by parts."""
    hours = dict.fromkeys(PARTS, 0.0)
    for stage in stages:
        total = stage["samples"] * float(np.median(stage["seconds_per_sample"][name])) / 3600
        for part in PARTS:
            hours[part] += total * stage["parts"][name][part]
    return hours


def report(found: dict[str, Any], names: list[str]) -> None:
    """The tables of one run of the benchmark."""
    settings, speeds, bounds = found["settings"], [], []
    for stage in found["stages"]:
        for name in names:
            seconds = np.array(stage["seconds_per_sample"][name])
            ratios = np.array(stage["seconds_per_sample"]["article"]) / seconds
            shares = [f"{stage['parts'][name][part]:.0%}" for part in PARTS]
            row = f"{stage['stage']}: {name}"
            faster = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            speeds.append([row, f"{1000 * np.median(seconds):.2f}", faster, *shares])
            best = found["matmul_gflop_per_second"][
                "fp32" if name == "article" else settings["precision"]
            ]
            gflop = stage["gflop_per_sample"][name]
            rate, least = gflop / np.median(seconds), gflop / best * stage["samples"] / 3600
            bounds.append(
                [row, f"{gflop:.2f}", f"{rate:.0f}", f"{rate / best:.0%}", f"{least:.3f}"]
            )
    print(format_table(["stage: side", "ms/sample", "faster by", *PARTS], speeds))
    print(
        f"\nmedians of {settings['rounds']} rounds of {settings['steps']} steps in turn, the "
        "factor the rounds' own\n"
    )
    print(
        format_table(
            ["stage: side", "GFLOP/sample", "GFLOP/s", "of a matmul's", "hours at a matmul's"],
            bounds,
        )
    )
    rates = ", ".join(
        f"{rate:.0f} in {name}" for name, rate in found["matmul_gflop_per_second"].items()
    )
    print(
        f"\na 2048 x 2048 matmul's GFLOP/s: {rates}; {settings['threads']} threads, "
        f"{settings['device']}\n"
    )
    hours = {name: sum(parts.values()) for name, parts in found["hours"].items()}
    print(
        f"features: {1000 * np.median(found['seconds_per_view']):.1f} ms a view, "
        f"{found['hours']['ours'][BUILDING]:.3f} h for {settings['views']} views of {IMAGES} "
        "images\nwhole schedule, the features included: "
        + ", ".join(f"{name} {taken:.2f} h" for name, taken in hours.items())
        + f"; ours is faster than the article's by {hours['article'] / hours['ours']:.2f}\n"
        "peak memory: "
        + ", ".join(f"{name} {peak:.0f} MB" for name, peak in found["peak_mb"].items())
    )


def draw_hours(found: dict[str, Any], path: Path) -> None:
    """The picture of docs/scaling.md, as PNG and SVG."""
    settings, titles = found["settings"], {"ours": "StagedTrainer", "article": "the article's loop"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.6), layout="constrained")
        axes, lefts = figure.subplots(), np.zeros(2)
        for part, colour in zip((*PARTS, BUILDING), CLUSTER_COLOURS, strict=False):
            widths = np.array([found["hours"][name].get(part, 0.0) for name in titles])
            axes.barh(
                list(titles.values()), widths, left=lefts, color=colour, label=part, height=0.6
            )
            lefts = lefts + widths
        for height, hours in enumerate(lefts):
            axes.annotate(
                f"{hours:.2f} h", (hours, height), (4, 0), textcoords="offset points", va="center"
            )
        epochs = sum(stage["samples"] for stage in found["stages"]) // VISITS
        what = f"{settings['size']}, {settings['device']}, ours in {settings['precision']}"
        axes.set(xlim=(0, 1.12 * lefts.max()), xlabel="hours, projected")
        axes.set_title(f"Hours for {epochs} epochs of {VISITS:,} samples ({what})")
        figure.legend(loc="outside lower center", ncols=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".svg"):
            figure.savefig(path.with_suffix(suffix))
