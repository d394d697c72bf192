"""What happens beside the steps: the clamp of logit_scale, the end of a stage, signals."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has stopped a training; None: before there was a checkpoint."""

    def __init__(self, received: signal.Signals, checkpoint: Path | None):
        go_on = "start it again"
        if checkpoint:
            go_on = f"'{checkpoint}' is written, go on with --resume_from_checkpoint True"
        super().__init__(f"stopped by {received.name}; {go_on}")
        self.signal = received


def is_over(state: TrainerState, patience: int) -> bool:
    """Whether a stage has trained all its epochs, or `patience` of them without a better score."""
    since_best = state.global_step - (state.best_global_step or 0)
    steps_per_epoch = state.max_steps // state.num_train_epochs
    return state.global_step >= state.max_steps or since_best >= patience * steps_per_epoch


class StageEpochs(TrainerCallback):
    """Clamps logit_scale, evaluates whole epochs, saves them after that, ends what `is_over`.

    Args:
        best: the score of the stages before, which this one has to surpass; None: the first.
    """

    def __init__(self, best: float | None):
        self.best = best

    def on_train_begin(self, args, state: TrainerState, control, **_: Any) -> None:
        """Goes on from the best score so far."""
        if state.best_metric is None:
            state.best_metric = self.best

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **_: Any) -> None:
        """Keeps exp(logit_scale) at 100 or below, as CLIP does (Radford et al. 2021)."""
        model.clip.logit_scale.clamp_(max=math.log(100))

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves where a signal ends the training; not an epoch before it is evaluated."""
        asked = control.should_save or control.should_training_stop
        control.should_save = asked and not float(state.epoch).is_integer()

    def on_epoch_end(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch that a signal has cut off has been saved already."""
        whole = float(state.epoch).is_integer()
        control.should_log = control.should_evaluate = control.should_save = whole

    def on_save(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the stage."""
        if is_over(state, args.early_stopping_patience):
            control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """A context in which SIGINT and SIGTERM end the training after the step at hand.

    With one process, a second signal ends it at once. With several, all agree on the step, and
    further signals are ignored: launchers send one of their own after the terminal's.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        self.received = None
        # Signals can't be caught elsewhere.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._receive)

    def __exit__(self, *exception: Any) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not torch.distributed.is_initialized():
            self.__exit__()

    def agree(self, args: TrainingArguments) -> signal.Signals | None:
        """The signal that any of the processes has received."""
        number = int(self.received or 0)
        if args.world_size > 1:
            number = int(gather(torch.tensor([number], device=args.device)).max())
        return signal.Signals(number) if number else None

    def on_step_end(self, args, state, control: TrainerControl, **_: Any) -> None:
        """Ends the training if any process has received a signal."""
        if self.agree(args):
            control.should_training_stop = True


def ignore_interrupts(worker: int) -> None:
    """For workers of a DataLoader: their parent has a step to finish when Ctrl-C reaches them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
