"""What runs of a stage leave in their folders: weights, states, and what was seen of validation."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from nicheclip.recipe import Stage

TRAINED_WEIGHTS = "trained.safetensors"
WEIGHTS, AVERAGE = "weights.", "average."
LOGGED = ("loss", "eval_accuracy", "eval_macro_f1", "eval_ece", "eval_nll")
Weights = dict[str, torch.Tensor]
logger = logging.getLogger(__name__)


def read_weights(checkpoint: Path) -> tuple[Weights, Weights]:
    """What a stage trains, by name, and its average; empty, where there is none."""
    saved = load_file(checkpoint / TRAINED_WEIGHTS)
    trained, average = (
        {name.removeprefix(kind): part for name, part in saved.items() if name.startswith(kind)}
        for kind in (WEIGHTS, AVERAGE)
    )
    return trained, average


def kept_weights(checkpoint: Path) -> Weights:
    """What a run came to: the average, where there is one."""
    trained, average = read_weights(checkpoint)
    return average or trained


def read_state(checkpoint: Path) -> TrainerState:
    """Of the run, when the checkpoint was written."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; one that a kill has left unfinished has no state."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        try:
            read_state(checkpoint)
            return checkpoint
        except (OSError, ValueError):
            logger.warning(f"'{checkpoint}' is unfinished; going on from the one before it")
    return None


def check_asked(asked: str | bool, stages: list[Path]) -> None:
    """Whether a training can go on from the checkpoint that was asked for.

    Args:
        asked: its folder; True: the last one.
        stages: the folders of the stages, all in one.

    Raises:
        ValueError: if it can't.
    """
    if old := sort_checkpoints(str(stages[0].parent)):
        raise ValueError(
            f"'{old[-1]}' is of an older version, which alone can go on from it; remove "
            f"'{stages[0].parent}' and train afresh"
        )
    if asked is True:
        return
    runs = [run for stage in stages for run in [stage, *_variant_folders(stage)]]
    whole = [path for run in runs if (path := last_checkpoint(run))]
    if (path := Path(str(asked))).resolve() in [each.resolve() for each in whole[-1:]]:
        return
    if not (path / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"'{asked}' is no checkpoint: it has no {TRAINER_STATE_NAME}")
    raise ValueError(
        f"'{asked}' is not the last whole checkpoint; remove the later ones first, such as "
        f"{whole[-1] if whole else 'unfinished ones'}"
    )


def _variant_folders(stage: Path) -> list[Path]:
    return sorted(stage.glob("variant-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def is_over(state: TrainerState, stage: Stage, patience: int) -> bool:
    """Whether a run of a stage has trained all its epochs, or as many as its patience allows.

    Args:
        patience: epochs without a better score; only a stage that keeps its best epoch ends early.
    """
    since_best = state.global_step - (state.best_global_step or 0)
    steps_per_epoch = state.max_steps // state.num_train_epochs
    gains_no_more = since_best >= patience * steps_per_epoch
    return state.global_step >= state.max_steps or (stage.keep == "best" and gains_no_more)


def kept_step(state: TrainerState, stage: Stage) -> int:
    """The step whose weights a run keeps; 0 for a best epoch that is no better than before."""
    return (state.best_global_step or 0) if stage.keep == "best" else state.global_step


def looks(state: TrainerState) -> list[dict[str, Any]]:
    """A row for each epoch of a run that was looked at on validation."""
    rows: dict[float, dict[str, Any]] = {}
    for entry in state.log_history:
        new = {"epoch": round(entry["epoch"]), "step": entry["step"]}
        row = rows.setdefault(entry["step"], new)
        row |= {name: entry[name] for name in LOGGED if name in entry}
    return [row for row in rows.values() if "eval_accuracy" in row]


def kept_row(state: TrainerState, stage: Stage) -> dict[str, Any]:
    """That of the epoch which a run keeps; empty if it keeps none."""
    return next((row for row in looks(state) if row["step"] == kept_step(state, stage)), {})
