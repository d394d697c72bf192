"""What is said of a training when it ends."""

import math
from typing import Any

from nicheclip.evaluation.intervals import format_table
from nicheclip.recipe import GRIDS


def training_text(training: dict[str, Any]) -> str:
    """The table of epochs, and what batches, features and the mixture with the base came to."""
    kept = training["wise_ft"]["alpha"]
    rows = [
        [
            row["stage"],
            f"{row['epoch']}{' *' if row['kept'] else ''}",
            f"{row['loss']:.3f}",
            f"{row['eval_accuracy']:.1%}",
            f"{row['eval_macro_f1']:.3f}",
            f"{row['eval_nll']:.3f}",
        ]
        for row in training["epochs"]
    ]
    features = training["features"]
    header = ["stage", "epoch", "loss", "val accuracy", "val macro F1", "val NLL"]
    note = "* kept; NLL at the temperature that suits validation"
    lines = [format_table(header, rows), note] if rows else []
    lines += [stage_text(stage) for stage in training["stages"]]
    if "settled" in training:
        lines += ["settled by the folds:", *settled_text(training)]
    if features["views"]:
        lines.append(
            f"{features['encoded']:,} views passed the frozen part of the visual tower once, in "
            f"{features['seconds']:.0f} s ({features['bytes'] / 1e6:.0f} MB are kept, see "
            "--feature_cache)"
        )
    mixtures = {row["alpha"]: row for row in training["wise_ft"]["mixtures"]}
    for alpha in sorted({0.0, kept, 1.0}):
        mixture = mixtures[alpha]
        accuracy, retention = mixture["accuracy"], mixture["retention"]
        told = [f"weights {alpha:.0%} fine-tuned"]
        if accuracy:
            told.append(f"validation {accuracy['value']:.1%}, NLL {mixture['nll']:.3f}")
        if retention:
            told.append(f"retention task {retention['value']:.1%} (n = {retention['n']})")
        lines.append(", ".join(told + (["kept"] if alpha == kept else [])))
    return "\n".join(lines)


def settled_text(training: dict[str, Any]) -> list[str]:
    """Of each stage what a cross-fitted model was trained with: what the folds have chosen."""
    lines = []
    for stage in training["settled"]:
        values = {name: value[0] for name, value in stage.items() if name != "name" and value}
        told = ", ".join(f"{name} {value}" for name, value in values.items())
        lines.append(f"{stage['name']}: {told if values['mix'] else 'left out'}")
    return lines


def stage_text(stage: dict[str, Any]) -> str:
    """What a stage has tried, what it chose, and what its batches were made of."""
    told = []
    if len(tried := stage["tried"]) > 1:
        told += [f"{_values(row)}: NLL {row.get('eval_nll', math.inf):.3f}" for row in tried]
        told += [f"chosen: {_values(tried[stage['chosen']])}"]
    if len(mixes := stage["mixes"]) > 1:
        told += [f"mix {row['mix']:g}: NLL {row['eval_nll']:.3f}" for row in mixes]
    if batches := stage.get("batches"):
        told.append(
            f"of the pairs in a batch {batches['same_class_pairs']:.1%} share a class, "
            f"{batches['hard_pairs']:.1%} are of classes in one cluster"
        )
    return f"{stage['name']}: {'; '.join(told)}"


def _values(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in GRIDS if name in row)
