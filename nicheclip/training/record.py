"""What a training was: RUN/training.json, and what is said of it when it ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from nicheclip.evaluation.intervals import format_table
from nicheclip.training.losses import loss_floor
from nicheclip.training.towers import PIXELS
from nicheclip.training.trainer import StagedTrainer

LOGGED = ("loss", "eval_accuracy", "eval_macro_f1", "eval_ece")


def training_record(trainer: StagedTrainer) -> dict[str, Any]:
    """One row an epoch with its stage, loss and validation metrics.

    Batches, features and settings.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in trainer.state.log_history:
        epoch = round(entry["epoch"])
        row = rows.setdefault(epoch, {"epoch": epoch, "stage": entry["stage"]})
        row |= {name: entry[name] for name in LOGGED if name in entry}
    epochs = [row for row in rows.values() if "eval_accuracy" in row]
    return {
        "epochs": epochs,
        "best_epoch": trainer.best_epoch,
        "batches": batch_record(trainer),
        "features": feature_record(trainer, epochs),
        "processes": trainer.args.world_size,
        "settings": trainer.settings(),
    }


def batch_record(trainer: StagedTrainer) -> dict[str, float]:
    """How the batches of an epoch are composed, and the lowest value of the loss on them."""
    trainer.sampler.set_epoch(0)
    args, labels, classes = trainer.args, trainer.train_dataset.labels, len(trainer.domain.classes)
    floors = [
        loss_floor(labels[batch], args.loss, args.label_smoothing_factor, classes)
        for batch in trainer.sampler.global_batches()
    ]
    return trainer.sampler.composition() | {"loss_floor": float(np.mean(floors))}


def feature_record(trainer: StagedTrainer, epochs: list[dict[str, Any]]) -> dict[str, float]:
    """What was encoded beforehand, and the visits that it served.

    Bytes on disk, seconds in this session.
    """
    frozen = {
        stage.name
        for stage, cut in zip(trainer.domain.stages, trainer.cuts, strict=True)
        if cut != PIXELS
    }
    views = trainer.args.cached_views if frozen else 0
    served = sum(row["stage"] in frozen for row in epochs) if views else 0
    return {
        "views": views,
        "encoded": views * len(trainer.train_dataset.rows),
        "samples": served * len(trainer.train_dataset),
        "bytes": sum(path.stat().st_size for path in trainer.feature_cache.rglob("*.arrow")),
        "seconds": round(trainer.encoding_seconds, 1),
    }


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
            f"{features['encoded']:,} views, encoded in {features['seconds']:.0f} s, took the "
            f"place of {features['samples']:,} passes through the frozen part of the visual tower "
            f"({features['bytes'] / 1e6:.0f} MB are kept, see --feature_cache)"
        )
    mixtures = {row["alpha"]: row for row in training["wise_ft"]["mixtures"]}
    for alpha in sorted({0.0, kept, 1.0}):
        accuracy, retention = mixtures[alpha]["accuracy"], mixtures[alpha]["retention"]
        told = f"weights {alpha:.0%} fine-tuned: validation {accuracy['value']:.1%}"
        if retention:
            told += f", retention task {retention['value']:.1%} (n = {retention['n']})"
        lines.append(told + (", kept" if alpha == kept else ""))
    return "\n".join(lines)
