"""Stages, each one run of a `transformers.Trainer` with an optimiser and a schedule of its own.

trainer = StagedTrainer(model, args, domain, processor, train_dataset=samples, eval_dataset=rows)
trainer.train()
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from nicheclip.clip import token_lists
from nicheclip.domain import Domain, Stage
from nicheclip.processes import processes
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import StageEpochs, StopOnSignal, TrainingInterrupted, is_over
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.losses import loss_floor
from nicheclip.training.sampler import ClusterBatchSampler
from nicheclip.training.stages import set_trainable, trainable_names
from nicheclip.training.towers import PIXELS, StageTowers, cut_before

LOGGED = ("loss", "eval_accuracy", "eval_macro_f1", "eval_ece")
AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
logger = logging.getLogger(__name__)


class StagedTrainer:
    """Fine-tunes a CLIPModel stage by stage.

    A stage begins with the best weights so far, ends early where validation does not get better,
    and keeps its checkpoints in a folder of its own. Everything random depends on seed, epoch, step
    and sample alone, so a resumed training gives the same weights, bit by bit on CPU.

    Args:
        model: is trained in place.
        domain: whose stages, prompts and clusters are trained.

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
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one a GPU: accelerate launch "
                f"--num_processes {args.n_gpu}"
            )
        self.model, self.args, self.domain, self.processor = model, args, domain, processor
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if args.bf16 and args.device.type == "cpu":
            model.set_attn_implementation("eager")  # torch's own has a slow backward pass there
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if args.initial_logit_scale is not None:
            model.logit_scale.data.fill_(math.log(args.initial_logit_scale))
        names = [name for name, _ in model.named_parameters()]
        trained = [name for stage in domain.stages for name in trainable_names(names, stage)]
        self.first_cut = cut_before(model.vision_model, trained)
        self.prompts = token_lists(processor, domain.prompt_bank[0])
        self.sampler = ClusterBatchSampler(
            train_dataset.labels,
            domain.class_clusters,
            args.train_batch_size * args.world_size,
            args.cluster_share,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_processes=args.world_size,
            process_index=args.process_index,
        )
        self.steps_per_epoch = math.ceil(len(self.sampler) / args.gradient_accumulation_steps)
        self.precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
        self.folders = [
            Path(args.output_dir) / f"{number}-{stage.name.replace('/', '_')}"
            for number, stage in enumerate(domain.stages, 1)
        ]
        self.feature_cache = Path(args.feature_cache or Path(args.output_dir) / "features")
        self.encoding_seconds = 0.0
        self.signals = StopOnSignal()
        self.epochs: list[dict[str, Any]] = []  # a row each, over all stages
        self.best_epoch = 0  # counted from 1
        self.best: Path | None = None  # its checkpoint
        self.best_metric: float | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Runs the stages in turn; resumes in any of them.

        Args:
            resume_from_checkpoint: True for the last whole checkpoint, or its folder.

        Raises:
            TrainingInterrupted: after SIGINT or SIGTERM, when the checkpoint is written.
            FloatingPointError: if the loss is not finite.
            ValueError: if a training can't go on from the checkpoint that was asked for.
        """
        checkpoints: list[Path | None] = [None] * len(self.folders)
        if resume_from_checkpoint:
            checkpoints = [last_checkpoint(folder) for folder in self.folders]
            self._check_asked(resume_from_checkpoint, [path for path in checkpoints if path])
        for stage, folder, path in zip(self.domain.stages, self.folders, checkpoints, strict=True):
            state = read_state(path) if path else None
            if state is None or not is_over(state, self.args.early_stopping_patience):
                state = self._run(stage, folder, path)
            self._note(stage, folder, state)
        self._load(self.best)

    def _check_asked(self, asked: str | bool, whole: list[Path]) -> None:
        if old := sort_checkpoints(self.args.output_dir):
            raise ValueError(
                f"'{old[-1]}' is of an older version, which alone can go on from it; remove "
                f"'{self.args.output_dir}' and train afresh"
            )
        if asked is True:
            return
        resolved = [path.resolve() for path in whole]
        if (path := Path(str(asked))).resolve() in resolved[-1:]:
            return
        if not (path / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"'{asked}' is no checkpoint: it has no {TRAINER_STATE_NAME}")
        raise ValueError(
            f"'{asked}' is not the last whole checkpoint; remove the later ones first, such as "
            f"{whole[-1] if whole else 'unfinished ones'}"
        )

    def _run(self, stage: Stage, folder: Path, checkpoint: Path | None) -> TrainerState:
        try:
            trainer = self.begin_stage(stage, folder, checkpoint)
        except KeyboardInterrupt as interrupt:  # while encoding: what is done of it is kept
            raise TrainingInterrupted(signal.SIGINT, checkpoint or self.best) from interrupt
        with self.signals:
            trainer.train(str(checkpoint) if checkpoint else None)
        processes().wait_for_everyone()  # the main process has written the checkpoints
        if received := self.signals.agree(self.args):
            raise TrainingInterrupted(received, folder / f"checkpoint-{trainer.state.global_step}")
        return trainer.state

    def begin_stage(
        self, stage: Stage, folder: Path, checkpoint: Path | None = None
    ) -> ContrastiveTrainer:
        """The Trainer of a stage, with what is frozen in it encoded.

        Args:
            checkpoint: of the stage, to go on from; None: it begins with the best weights so far.
        """
        self._load(checkpoint or self.best)
        set_trainable(self.model, stage)
        model = StageTowers(self.model, self.prompts)
        self._encode_views(model.cut)
        before = len(self.epochs)
        self.sampler.epochs_before = self.train_dataset.epochs_before = before
        args = copy.copy(self.args)
        args.output_dir, args.num_train_epochs = str(folder), stage.epochs
        args.learning_rate, args.warmup_steps = stage.learning_rate, stage.warmup
        args.gradient_checkpointing = args.activation_checkpointing = False  # it is on already
        return ContrastiveTrainer(
            self.domain,
            stage,
            self.sampler,
            before * self.steps_per_epoch,
            model=model,
            args=args,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processor,
            callbacks=[self.signals, StageEpochs(self.best_metric)],
        )

    def _load(self, checkpoint: Path | None) -> None:
        if checkpoint:
            self.model.load_state_dict(load_file(checkpoint / "model.safetensors"))

    def _encode_views(self, cut: int) -> None:
        """Encodes the views up to the cut; what no stage trains, for all stages at once."""
        started = time.perf_counter()
        self.model.eval()  # what is kept must not depend on a draw of dropout
        cuts = sorted({self.first_cut, cut} - {PIXELS}) if self.args.cached_views else []
        self.train_dataset.views = self.args.cached_views if cuts else 0
        tower, autocast = self.model.vision_model, AUTOCAST[self.precision]
        for name, views, count in (
            ("train", self.train_dataset, self.train_dataset.views),
            ("validation", self.eval_dataset, 1),
        ):
            cache = self.feature_cache / name
            views.features = encode_views(tower, views, count, cuts, cache, autocast)
        self.encoding_seconds += time.perf_counter() - started

    def _note(self, stage: Stage, folder: Path, state: TrainerState) -> None:
        """Takes down a stage's epochs, and its best one if it is the best so far."""
        before = len(self.epochs)
        rows: dict[int, dict[str, Any]] = {}
        for entry in state.log_history:
            epoch = before + round(entry["epoch"])
            row = rows.setdefault(epoch, {"epoch": epoch, "stage": stage.name})
            row |= {name: entry[name] for name in LOGGED if name in entry}
        self.epochs += [row for row in rows.values() if "eval_accuracy" in row]
        if state.best_global_step:
            self.best = folder / f"checkpoint-{state.best_global_step}"
            self.best_metric = state.best_metric
            self.best_epoch = before + state.best_global_step // self.steps_per_epoch

    def settings(self) -> dict[str, Any]:
        """What decides the weights, beside model and data."""
        names = ("seed", "data_seed", "loss", "cluster_share", "weight_decay", "cached_views")
        return {name: getattr(self.args, name) for name in names} | {
            "batch_size": self.args.train_batch_size * self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "label_smoothing": self.args.label_smoothing_factor,
            "precision": self.precision,
            "stages": [stage.model_dump(mode="json") for stage in self.domain.stages],
        }

    def record(self) -> dict[str, Any]:
        """For training.json: epochs, how batches are composed, what was encoded, settings."""
        args, labels, classes = self.args, self.train_dataset.labels, len(self.domain.classes)
        self.sampler.epochs_before = 0
        self.sampler.set_epoch(0)
        floors = [
            loss_floor(labels[batch], args.loss, args.label_smoothing_factor, classes)
            for batch in self.sampler.global_batches()
        ]
        kept = [path.stat().st_size for path in self.feature_cache.rglob("*.arrow")]
        views = args.cached_views if kept else 0
        return {
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "batches": self.sampler.composition() | {"loss_floor": float(np.mean(floors))},
            "features": {
                "views": views,
                "encoded": views * len(self.train_dataset.rows),
                "bytes": sum(kept),
                "seconds": round(self.encoding_seconds, 1),
            },
            "processes": args.world_size,
            "settings": self.settings(),
        }


def read_state(checkpoint: Path) -> TrainerState:
    """Of the stage, when the checkpoint was written."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a stage; one that a kill has left unfinished has no state."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        try:
            read_state(checkpoint)
            return checkpoint
        except (OSError, ValueError):
            logger.warning(f"'{checkpoint}' is unfinished; going on from the one before it")
    return None
