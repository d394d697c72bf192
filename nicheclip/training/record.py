"""What is said of a training when it ends."""

from __future__ import annotations

from typing import Any

from nicheclip.evaluation.intervals import format_table


def training_text(training: dict[str, Any]) -> str:
    """The table of epochs, and what batches, features and the mixture with the base came to."""
    best, kept = training["best_epoch"], training["wise_ft"]["alpha"]
    rows = [
        [
            f"{row['epoch']}{' *' if row['epoch'] == best else ''}",
            f"{row['loss']:.3f}",
            f"{row['eval_accuracy']:.1%}",
            f"{row['eval_macro_f1']:.3f}",
            row["stage"],
        ]
        for row in training["epochs"]
    ]
    batches, features = training["batches"], training["features"]
    lines = [
        format_table(["epoch", "loss", "val accuracy", "val macro F1", "stage"], rows),
        f"* the best on validation. Of the pairs in a batch {batches['same_class_pairs']:.1%} "
        f"share a class, {batches['hard_pairs']:.1%} are of classes in one cluster; the loss "
        f"can't fall below {batches['loss_floor']:.3f}",
    ]
    if features["views"]:
        lines.append(
            f"{features['encoded']:,} views passed the frozen part of the visual tower once, in "
            f"{features['seconds']:.0f} s ({features['bytes'] / 1e6:.0f} MB are kept, see "
            "--feature_cache)"
        )
    mixtures = {row["alpha"]: row for row in training["wise_ft"]["mixtures"]}
    for alpha in sorted({0.0, kept, 1.0}):
        accuracy, retention = mixtures[alpha]["accuracy"], mixtures[alpha]["retention"]
        told = f"weights {alpha:.0%} fine-tuned: validation {accuracy['value']:.1%}"
        if retention:
            told += f", retention task {retention['value']:.1%} (n = {retention['n']})"
        lines.append(told + (", kept" if alpha == kept else ""))
    return "\n".join(lines)
