"""What `StagedTrainer` does beside the steps: clamps, ends stages, stops on a signal, prints."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

MAX_LOGIT_SCALE = math.log(100)


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has stopped a training, after its checkpoint was written.

    None: before there was one.
    """

    def __init__(self, received: signal.Signals, checkpoint: Path | None):
        go_on = (
            f"'{checkpoint}' is written, go on with --resume_from_checkpoint True"
            if checkpoint
            else "start it again"
        )
        super().__init__(f"stopped by {received.name}; {go_on}")
        self.signal = received


class ClampLogitScale(TrainerCallback):
    """Keeps exp(logit_scale) at 100 or below, as CLIP does (Radford et al.

    2021, arXiv:2103.00020).
    """

    def on_optimizer_step(self, args, state, control, **kwargs: Any) -> None:
        """After each step, on `model` among the keywords."""
        with torch.no_grad():
            kwargs["model"].logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class EndOfStage(TrainerCallback):
    """Stops when the stage is over, and keeps epochs whole.

    Args:
        is_over: says after an evaluation whether the stage has ended before its time.

    Attributes:
        steps_per_epoch: optimiser steps.
    """

    def __init__(self, is_over: Callable[[], bool]):
        self.is_over = is_over
        self.steps_per_epoch = 1

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves the checkpoint of an epoch's last step to `on_epoch_end`."""
        if state.global_step % self.steps_per_epoch == 0:
            # Not before the epoch has been evaluated: who resumes would skip that.
            control.should_save = False

    def on_epoch_end(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluates whole epochs only, and writes a checkpoint in any case."""
        whole = state.global_step % self.steps_per_epoch == 0  # else a signal has cut it off
        control.should_log = control.should_evaluate = whole
        control.should_save = True

    def on_evaluate(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the stage."""
        if self.is_over():
            control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """A context in which SIGINT and SIGTERM end the training after the step at hand.

    With one process, a second signal ends it at once. With several, all agree on the step, and
    further signals are
    ignored: launchers send one of their own after the terminal's.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self.received = None
        # signals can't be caught elsewhere
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not torch.distributed.is_initialized():
            self.__exit__()

    def agree(self, args: TrainingArguments) -> signal.Signals | None:
        """The signal that any of the processes has received."""
        number = int(self.received or 0)
        if args.world_size > 1:
            highest = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest.item())
        if not number:
            return None
        self.received = signal.Signals(number)
        return self.received

    def on_step_end(
        self, args: TrainingArguments, state, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the training if any process has received a signal."""
        if self.agree(args):
            control.should_training_stop = True


def ignore_interrupts(worker: int) -> None:
    """For workers of a DataLoader: a Ctrl-C reaches them, but their parent has a step to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class EpochLines(ProgressCallback):
    """Progress bars, and one line an epoch instead of the Trainer's dictionaries."""

    def on_log(
        self, args, state: TrainerState, control, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """One line when an epoch has been evaluated."""
        if (
            state.is_local_process_zero
            and logs
            and "eval_accuracy" in logs
            and self.training_bar is not None
        ):
            *_, before = (entry for entry in state.log_history if "loss" in entry)
            self.training_bar.write(
                f"{before['stage']}, epoch {round(state.epoch)}: loss {before['loss']:.3f}, "
                f"validation accuracy {logs['eval_accuracy']:.1%}"
            )
