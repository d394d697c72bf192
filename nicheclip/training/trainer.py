"""`transformers.Trainer` with stages, each with its own parameters, optimiser and schedule.

trainer = StagedTrainer(model, args, domain, processor, train_dataset=samples, eval_dataset=rows)
trainer.train()
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, CLIPProcessor, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from nicheclip.clip import tokenize
from nicheclip.domain import Domain, Stage
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import EndOfStage, EpochLines, StopOnSignal, TrainingInterrupted
from nicheclip.training.checkpoints import (
    best_checkpoint,
    checkpoint_at,
    find_checkpoint,
    read_state,
)
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.stages import current_stage, set_trainable, trainable_names
from nicheclip.training.towers import PIXELS, begin_later, cut_before


class StagedTrainer(ContrastiveTrainer):
    """Fine-tunes a CLIPModel stage by stage.

    A stage is one `Trainer.train` that resumes from the last checkpoint of the stage before it, so
    that steps, epochs, the log and the best checkpoint run on, while frozen parameters, optimiser
    and schedule are its own. It begins with the best weights so far, and ends early where
    validation does not get better. Everything random depends on seed, epoch, step and sample alone,
    so a resumed training gives the same weights, bit by bit on CPU.

    Args:
        domain: whose stages, prompts and clusters are trained.
        train_dataset: samples of the train split.
        eval_dataset: the validation split.

    Raises:
        ValueError: if a stage names parameters that the model does not have, or one process sees
            several GPUs.
    """

    def __init__(
        self,
        model: CLIPModel,
        args: StagedTrainingArguments,
        domain: Domain,
        processor: CLIPProcessor,
        train_dataset: TrainingSamples,
        eval_dataset: Views,
    ):
        self._vision, self._text = begin_later(model)
        if args.bf16 and args.device.type == "cpu":
            model.set_attn_implementation("eager")  # torch's own has a slow backward pass there
        ignored = {*(model._keys_to_ignore_on_save or ()), "text_model.used_embeddings"}
        model._keys_to_ignore_on_save = ignored
        names = [name for name, _ in model.named_parameters()]
        trained = [trainable_names(names, stage) for stage in domain.stages]
        self.cuts = [cut_before(self._vision, of_stage) for of_stage in trained]
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one a GPU: accelerate launch "
                f"--num_processes {args.n_gpu}"
            )
        if args.initial_logit_scale is not None:
            with torch.no_grad():
                model.logit_scale.fill_(math.log(args.initial_logit_scale))
        self.stage = domain.stages[0]
        self._running: tuple[Stage, int] | None = None  # the stage, and the epochs before it
        self.encoding_seconds = 0.0
        self._stage_start = 0  # the global step at which the stage begins
        self.feature_cache = Path(args.feature_cache or Path(args.output_dir) / "features")
        self._interruption = StopOnSignal()
        end = EndOfStage(lambda: self._position() != self._running)
        callbacks = [end, self._interruption]
        super().__init__(model, args, domain, processor, train_dataset, eval_dataset, callbacks)
        self.steps_per_epoch = math.ceil(len(self.sampler) / args.gradient_accumulation_steps)
        end.steps_per_epoch = self.steps_per_epoch
        prompts = [*domain.prompt_bank[0], *domain.canonical_prompts]
        self._used_tokens = tokenize(processor, prompts)["input_ids"].unique()  # (U,)
        if self.pop_callback(ProgressCallback):
            self.add_callback(EpochLines())

    def train(  # type: ignore[override]  # a search over hyperparameters has no stages
        self, resume_from_checkpoint: str | bool | None = None
    ) -> TrainOutput | None:
        """Runs the stages in turn; resumes in any of them.

        Args:
            resume_from_checkpoint: a folder, or True for the last whole checkpoint.

        Returns:
            what `Trainer.train` says of the last stage, or None if the checkpoint was the last one.

        Raises:
            TrainingInterrupted: after SIGINT or SIGTERM, when the checkpoint is written.
            FloatingPointError: if the loss is not finite.
        """
        output = None
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        self.state = read_state(checkpoint) if checkpoint else TrainerState()
        while (position := self._position()) is not None:
            try:
                self._enter(*position, checkpoint)
            except KeyboardInterrupt as interrupt:  # while encoding: what is done of it is kept
                raise TrainingInterrupted(signal.SIGINT, checkpoint) from interrupt
            with self._interruption:
                output = super().train(
                    resume_from_checkpoint=str(checkpoint) if checkpoint else None
                )
            checkpoint = checkpoint_at(self.args.output_dir, self.state.global_step)
            if received := self._interruption.agree(self.args):
                raise TrainingInterrupted(received, checkpoint)
        self._text.train_all()
        super()._load_from_checkpoint(str(best_checkpoint(self.args.output_dir, self.state)))
        return output

    def _position(self) -> tuple[Stage, int] | None:
        """The stage to run, and the epochs before it; None after the last."""
        sign, name = 1 if self.args.greater_is_better else -1, self.args.metric_for_best_model
        log = (entry for entry in self.state.log_history if f"eval_{name}" in entry)
        scores = {round(entry["epoch"]): sign * entry[f"eval_{name}"] for entry in log}
        patience = self.args.early_stopping_patience
        return current_stage(self.domain.stages, list(scores.values()), patience)

    def _enter(self, stage: Stage, epochs_before: int, checkpoint: Path | None) -> None:
        self.stage = stage
        self._running = (stage, epochs_before)
        self._stage_start = epochs_before * self.steps_per_epoch
        self._text.train_all()
        set_trainable(self.model, stage)
        if self._text.embeddings.token_embedding.weight.requires_grad:
            self._text.train_only(self._used_tokens)
        self.args.num_train_epochs = epochs_before + stage.epochs
        self.args.learning_rate = stage.learning_rate
        self.args.warmup_steps = stage.warmup
        # wrapped anew: DDP only reduces what trained when it wrapped the model
        self.model_wrapped = self.model
        self.optimizer = None  # created anew: it only holds what trained when it was created
        self.lr_scheduler = None
        if checkpoint:
            self._load_from_checkpoint(str(checkpoint))  # what is encoded beforehand depends on it
        self._encode_frozen()

    def _encode_frozen(self) -> None:
        """Encodes beforehand what no longer changes: the views up to the cut, and all prompts."""
        started = time.perf_counter()
        self.model.eval()  # what is kept must not depend on a draw of dropout
        self._frozen_texts = None
        if not any(parameter.requires_grad for parameter in self._text.parameters()):
            bank = torch.arange(len(self._bank["input_ids"]))
            with torch.no_grad():
                self._frozen_texts = self._text(**self._texts(bank)).pooler_output  # (P, D)
        self._vision.cut = cut = self.cuts[self.domain.stages.index(self.stage)]
        # What no stage trains is encoded for all of them; where this stage's cut is later, from
        # there on.
        cuts = sorted({min(self.cuts), cut} - {PIXELS}) if self.args.cached_views else []
        self.train_dataset.views = self.args.cached_views if cuts else 0
        precision = (
            torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        )
        for name, views, count in (
            ("train", self.train_dataset, self.train_dataset.views),
            ("validation", self.eval_dataset, 1),
        ):
            folder = self.feature_cache / name
            views.features = encode_views(self._vision, views, count, cuts, folder, precision)
        self.encoding_seconds += time.perf_counter() - started

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the state, which comes next, says that the files of all are there
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial) -> None:
        """The state goes first and comes last, so that a checkpoint that has one is whole."""
        if self.args.should_save:
            checkpoint = checkpoint_at(self.args.output_dir, self.state.global_step)
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model and processor; not the arguments, which the Trainer would pickle."""
        if self.args.should_save:
            self._text.store_embeddings()
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """A stage begins with the best weights of those before it."""
        state = read_state(Path(resume_from_checkpoint))
        if state.global_step == self._stage_start:
            resume_from_checkpoint = str(best_checkpoint(self.args.output_dir, state))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._text.read_embeddings()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """At the very start of a stage the optimiser is that of the stage before it: not loaded."""
        if self.state.global_step > self._stage_start:
            super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with the stage."""
        super().log(logs, start_time)
        # After the trackers, which take numbers only.
        self.state.log_history[-1]["stage"] = self.stage.name  # type: ignore[assignment]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ):
        """The schedule of this stage alone: warm-up and decay over its own steps."""
        return super().create_scheduler(num_training_steps - self._stage_start, optimizer)

    @property
    def best_epoch(self) -> int:
        """The epoch that is kept, counted from 1."""
        return (self.state.best_global_step or 0) // self.steps_per_epoch

    def settings(self) -> dict[str, Any]:
        """What decides the weights, beside model and data."""
        names = ("seed", "data_seed", "loss", "cluster_share", "weight_decay")
        return {name: getattr(self.args, name) for name in names} | {
            "batch_size": self.args.train_batch_size * self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "label_smoothing": self.args.label_smoothing_factor,
            "cached_views": self.args.cached_views,
            "precision": "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "float32",
            "stages": [stage.model_dump(mode="json") for stage in self.domain.stages],
        }
