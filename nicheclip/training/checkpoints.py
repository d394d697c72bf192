"""Which of the Trainer's checkpoints a training goes on from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

logger = logging.getLogger(__name__)


def checkpoint_at(output_dir: str | Path, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a global step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def best_checkpoint(output_dir: str | Path, state: TrainerState) -> Path:
    """The checkpoint of the best epoch so far."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"


def read_state(checkpoint: Path) -> TrainerState:
    """What a checkpoint says of steps, log and best checkpoint.

    It is the last of its files to be written.
    """
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def find_checkpoint(output_dir: str, asked: str | bool | None) -> Path | None:
    """The folder that was asked for, or (True) the last whole checkpoint; None to begin.

    A checkpoint that a kill has left unfinished has no state: it is passed over.

    Raises:
        ValueError: if a training can't go on from the folder that was asked for.
    """
    if not asked:
        return None
    if asked is not True:
        return _checked(Path(asked), output_dir)
    for folder in map(Path, reversed(sort_checkpoints(output_dir))):
        if _is_whole(folder):
            return folder
        logger.warning(f"'{folder}' is unfinished; going on from the one before it")
    logger.warning(f"no checkpoint in '{output_dir}' yet; beginning at the beginning")
    return None


def _checked(folder: Path, output_dir: str) -> Path:
    if not _is_whole(folder):
        raise ValueError(
            f"'{folder}' is no whole checkpoint: it has no {TRAINER_STATE_NAME} that can be read"
        )
    state = read_state(folder)
    later = [
        path
        for path in sort_checkpoints(output_dir)
        if int(path.rsplit("-", 1)[1]) > state.global_step
    ]
    if later:
        raise ValueError(
            f"'{folder}' is not the last checkpoint; remove the later ones first, such as "
            f"{later[-1]}"
        )
    if state.best_global_step and not (best := best_checkpoint(output_dir, state)).is_dir():
        raise ValueError(
            f"the best checkpoint before '{folder}', {best}, is gone; begin afresh, and keep more "
            "of them with --save_total_limit"
        )
    return folder


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
