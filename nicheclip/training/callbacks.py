"""What happens beside the steps: averages, the logit_scale's clamp, the end of a stage, signals."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nicheclip.recipe import Stage
from nicheclip.training.checkpoints import AVERAGE, WEIGHTS, is_over, read_weights
from nicheclip.training.towers import StageTowers

LOOKS = 5  # at validation, in a stage that keeps its last epoch


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has stopped a training; None: before there was a checkpoint."""

    def __init__(self, received: signal.Signals, checkpoint: Path | None):
        go_on = "start it again"
        if checkpoint:
            go_on = f"'{checkpoint}' is written, go on with --resume_from_checkpoint True"
        super().__init__(f"stopped by {received.name}; {go_on}")
        self.signal = received


class StageEpochs(TrainerCallback):
    """Clamps logit_scale, evaluates whole epochs, saves them after that, ends what `is_over`.

    A stage that keeps its last epoch is evaluated and saved `LOOKS` times.

    Args:
        best: the score of the stages before, which a stage that keeps its best epoch has to
            surpass; None: the first.
    """

    def __init__(self, stage: Stage, best: float | None):
        self.stage = stage
        self.best = best if stage.keep == "best" else None
        self.every = 1 if stage.keep == "best" else math.ceil(stage.epochs[0] / LOOKS)

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
        control.should_save = asked and not self._looked_at(state)

    def on_epoch_end(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch that a signal has cut off has been saved already."""
        due = self._looked_at(state)
        control.should_log = control.should_save = due
        control.should_evaluate = due and args.eval_strategy != "no"

    def _looked_at(self, state: TrainerState) -> bool:
        epoch = float(state.epoch)
        return epoch.is_integer() and (epoch % self.every == 0 or epoch == state.num_train_epochs)

    def on_save(self, args, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the stage."""
        if is_over(state, self.stage, args.early_stopping_patience):
            control.should_training_stop = True


class WeightAverage(TrainerCallback):
    """An exponential moving average of what a stage trains, without one the weights themselves.

    Its first steps count for more: else a short stage would stay where it began.

    Args:
        decay: per step, at most; 0: none.
    """

    def __init__(self, model: StageTowers, decay: float):
        self.model, self.decay = model, decay
        self.trained = model.trained()
        self.weights: dict[str, torch.Tensor] = {}
        for name, part in self.trained.items():
            self.weights[name] = part.detach().clone() if decay else part

    @torch.no_grad()
    def on_optimizer_step(self, args, state: TrainerState, control, **_: Any) -> None:
        """After each step of the optimiser."""
        if self.decay:
            decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
            update = get_ema_multi_avg_fn(decay)
            update(list(self.weights.values()), list(self.trained.values()), 0)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        if not self.decay:
            yield
            return
        trained = self.model.copies()
        self.model.load(self.weights)
        try:
            yield
        finally:
            self.model.load(trained)

    def save(self, path: Path) -> None:
        """Weights and average, as a checkpoint has them."""
        both: dict[str, torch.Tensor] = {
            f"{WEIGHTS}{name}": part for name, part in self.trained.items()
        }
        if self.decay:
            both |= {f"{AVERAGE}{name}": part for name, part in self.weights.items()}
        save_file({name: part.detach().contiguous() for name, part in both.items()}, path)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint, with both."""
        trained, average = read_weights(checkpoint)
        self.model.load(trained)
        for name, part in average.items():
            self.weights[name].copy_(part)


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
