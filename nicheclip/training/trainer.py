"""Stages, each one or more runs of a `transformers.Trainer` with an optimiser of their own.

trainer = StagedTrainer(model, args, domain, processor, train_dataset=samples, eval_dataset=rows)
trainer.train()
"""

from __future__ import annotations

import copy
import logging
import signal
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from nicheclip.clip import encode_texts, token_lists
from nicheclip.domain import Domain
from nicheclip.evaluation.probe import Part
from nicheclip.processes import processes
from nicheclip.recipe import GRIDS, Sampling, Stage
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import (
    StageEpochs,
    StopOnSignal,
    TrainingInterrupted,
    WeightAverage,
    is_over,
    kept_weights,
)
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.distillation import DistillationTrainer, PromptTargets, generic_texts
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.lda import discriminants
from nicheclip.training.losses import loss_floor
from nicheclip.training.sampler import ClusterBatchSampler
from nicheclip.training.stages import set_trainable, trainable_names
from nicheclip.training.towers import PIXELS, StageTowers, cut_before, depth

LOGGED = ("loss", "eval_accuracy", "eval_macro_f1", "eval_ece", "eval_nll")
AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROJECTION = "clip.visual_projection.weight"  # as StageTowers names it
Weights = dict[str, torch.Tensor]
logger = logging.getLogger(__name__)


class StagedTrainer:
    """Fine-tunes a CLIPModel stage by stage.

    A stage goes on from what those before it came to. Each combination of its grids is trained, and
    each of its `runs`, in a folder of its own. Everything random depends on seed, epoch, step and
    sample alone, so a resumed training gives the same weights, bit by bit on CPU.

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
        names = [name for name, _ in model.named_parameters()]
        trained = [name for stage in domain.stages for name in trainable_names(names, stage)]
        self.first_cut = cut_before(model.vision_model, trained)
        self.prompts = token_lists(processor, domain.prompt_bank[0])
        self.precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
        self.folders = [
            Path(args.output_dir) / f"{number}-{stage.name.replace('/', '_')}"
            for number, stage in enumerate(domain.stages, 1)
        ]
        self.sampling: Sampling = "balanced"  # of the stage before
        for stage in domain.stages:
            for variant in self._variants(stage):
                self._sampler(variant)  # what can't be sampled is told before anything is trained
        self.feature_cache = Path(args.feature_cache or Path(args.output_dir) / "features")
        self.encoding_seconds = 0.0
        self.signals = StopOnSignal()
        self.base_bias = model.vision_model.post_layernorm.bias.detach().clone()
        self.base_projection = model.visual_projection.weight.detach().cpu().numpy().copy()
        self._base_features: tuple[Part, Part] | None = None
        self.prototypes: torch.Tensor | None = None  # (C, D), where they are free
        self.stages: list[dict[str, Any]] = []  # of each, what was tried and chosen
        self.epochs: list[dict[str, Any]] = []  # a row each that was looked at, over all stages
        self.epochs_done = 0  # of all stages so far
        self.best: Path | None = None  # the last checkpoint that was kept
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
        if resume_from_checkpoint:
            self._check_asked(resume_from_checkpoint)
        for stage, folder in zip(self.domain.stages, self.folders, strict=True):
            self._train_stage(stage, folder, bool(resume_from_checkpoint))

    def _check_asked(self, asked: str | bool) -> None:
        if old := sort_checkpoints(self.args.output_dir):
            raise ValueError(
                f"'{old[-1]}' is of an older version, which alone can go on from it; remove "
                f"'{self.args.output_dir}' and train afresh"
            )
        if asked is True:
            return
        variants = [variant for folder in self.folders for variant in _variant_folders(folder)]
        found = [last_checkpoint(folder) for folder in variants]
        whole = [path for path in found if path]
        resolved = [path.resolve() for path in whole]
        if (path := Path(str(asked))).resolve() in resolved[-1:]:
            return
        if not (path / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"'{asked}' is no checkpoint: it has no {TRAINER_STATE_NAME}")
        raise ValueError(
            f"'{asked}' is not the last whole checkpoint; remove the later ones first, such as "
            f"{whole[-1] if whole else 'unfinished ones'}"
        )

    def _train_stage(self, stage: Stage, folder: Path, resume: bool) -> None:
        """Trains the variants and the runs of the chosen one; averages and mixes these."""
        variants = self._variants(stage)
        several = len(variants) > 1 or stage.runs > 1
        towers = self.begin_stage(stage)
        before = _copies(towers.trained())

        def run(variant: Stage, number: int, draw: int = 0) -> tuple[TrainerState, Path | None]:
            own = folder / f"variant-{number}" if several else folder
            return self._run(variant, towers, before, own, draw, resume)

        runs, tried = [], []
        for number, variant in enumerate(variants, 1):
            runs.append(run(variant, number))
            tried.append(_grid_values(stage, variant) | _kept_row(variant, runs[-1][0]))
        chosen = min(range(len(tried)), key=lambda index: tried[index].get("eval_nll", np.inf))
        variant, (state, kept) = variants[chosen], runs[chosen]
        mixes = self._mix(variant, towers, before, [kept])
        if kept and mixes[0]["mix"] > 0:
            more = [run(variant, len(variants) + draw, draw) for draw in range(1, stage.runs)]
            if more:
                mixes = self._mix(variant, towers, before, [kept, *(path for _, path in more)])
        self._note(stage, variant, state, tried, chosen, mixes)
        towers.store()
        self.prototypes = None
        if towers.prototypes is not None:
            self.prototypes = towers.prototypes.detach().clone()

    def _variants(self, stage: Stage) -> list[Stage]:
        return stage.variants(float(np.mean(self.train_dataset.rows["repeats"])))

    def begin_stage(self, stage: Stage) -> StageTowers:
        """The model as the stage trains it."""
        if stage.logit_scale is not None:
            self.model.logit_scale.data.fill_(np.log(stage.logit_scale))
        set_trainable(self.model, stage)
        prompts = self.prompts
        if stage.loss == "distillation":
            prompts = prompts + token_lists(self.processor, self._generic_texts())
        prototypes = None
        if stage.free_prototypes:
            prototypes = self.prototypes
            if prototypes is None:
                canonical = self.domain.canonical_prompts
                prototypes = encode_texts(self.model.eval(), self.processor, canonical)
        return StageTowers(self.model, prompts, prototypes)

    def _begin(self, stage: Stage, towers: StageTowers, before: Weights) -> None:
        """Gives the towers the weights that a variant begins with."""
        towers.load(before)
        bias = self.model.vision_model.post_layernorm.bias
        if "lda" in self.domain.stages[0].start and stage.name == self.domain.stages[0].name:
            bias.data.copy_(self.base_bias)
        if stage.start == ["lda"]:
            found = self._discriminants
            bias.data -= torch.from_numpy(found["mean"]).to(bias)
            start = {PROJECTION: found["projection"], "prototypes": found["prototypes"]}
            towers.load(before | {name: torch.from_numpy(part) for name, part in start.items()})

    def base_features(self) -> tuple[Part, Part]:
        """Pooled features and labels of the base: of the views of train, and of validation.

        Called before anything is trained.
        """
        if self._base_features is None:
            tower = self.model.vision_model
            cuts = sorted({self.first_cut, depth(tower)} - {PIXELS})
            counts = {"train": max(1, self.args.cached_views), "validation": 1}
            parts = []
            for name, views in (("train", self.train_dataset), ("validation", self.eval_dataset)):
                self._encode(name, views, counts[name], cuts)
                of_views = [_pooled(self.model, views, view) for view in range(counts[name])]
                labels = np.tile(np.asarray(views.rows["label"]), counts[name])
                parts.append((np.concatenate(of_views), labels))
            self._base_features = parts[0], parts[1]
        return self._base_features

    @cached_property
    def _discriminants(self) -> dict[str, np.ndarray]:
        """The analysis that `start: lda` begins with."""
        train, validation = self.base_features()
        embeds = train[0] @ self.base_projection.T
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        return discriminants(train, validation, embeds, len(self.domain.classes))

    def _run(
        self,
        stage: Stage,
        towers: StageTowers,
        before: Weights,
        folder: Path,
        draw: int,
        resume: bool,
    ) -> tuple[TrainerState, Path | None]:
        """One run of a variant: its state at the end, and the checkpoint that it keeps.

        None for a stage that keeps its best epoch, if that is no better than those before.
        """
        checkpoint = last_checkpoint(folder) if resume else None
        state = read_state(checkpoint) if checkpoint else None
        if state is None or not is_over(state, stage, self.args.early_stopping_patience):
            try:
                self._begin(stage, towers, before)
                trainer = self.trainer_of(stage, towers, folder, draw, checkpoint)
            except KeyboardInterrupt as interrupt:  # while encoding: what is done of it is kept
                raise TrainingInterrupted(signal.SIGINT, checkpoint or self.best) from interrupt
            with self.signals:
                trainer.train(str(checkpoint) if checkpoint else None)
            processes().wait_for_everyone()  # the main process has written the checkpoints
            state = trainer.state
            last = folder / f"checkpoint-{state.global_step}"
            if received := self.signals.agree(self.args):
                raise TrainingInterrupted(received, last)
        step = state.best_global_step if stage.keep == "best" else state.global_step
        if not step:
            return state, None
        self.best = folder / f"checkpoint-{step}"
        return state, self.best

    def trainer_of(
        self,
        stage: Stage,
        towers: StageTowers,
        folder: Path,
        draw: int = 0,
        checkpoint: Path | None = None,
    ) -> ContrastiveTrainer:
        """The Trainer of one run, with what is frozen in it encoded.

        Args:
            stage: without grids.
            draw: which of the runs.
            checkpoint: to go on from.
        """
        self._encode_views(stage, towers.cut)
        average = WeightAverage(towers, stage.ema)
        if checkpoint:
            average.load(checkpoint)
        args = copy.copy(self.args)
        args.output_dir, args.warmup_steps = str(folder), stage.warmup
        (args.learning_rate,), (args.num_train_epochs,) = stage.learning_rate, stage.epochs
        if stage.weight_decay is not None:
            args.weight_decay = stage.weight_decay
        args.gradient_checkpointing = args.activation_checkpointing = False  # it is on already
        epochs_before = self.epochs_done + draw * stage.epochs[0]
        kind, options = ContrastiveTrainer, dict[str, Any]()
        if stage.loss == "distillation":
            kind, options = DistillationTrainer, {"train_dataset": self._targets(epochs_before)}
        else:
            sampler = self._sampler(stage)
            sampler.epochs_before = self.train_dataset.epochs_before = epochs_before
            args.per_device_train_batch_size = sampler.batch_size
            options = {"train_dataset": self.train_dataset, "sampler": sampler}
        return kind(
            self.domain,
            stage,
            average,
            model=towers,
            args=args,
            eval_dataset=self.eval_dataset,
            processing_class=self.processor,
            callbacks=[self.signals, StageEpochs(stage, self.best_metric)],
            **options,
        )

    def _sampler(self, stage: Stage) -> ClusterBatchSampler:
        """Of the images as the stage samples them."""
        args, samples = self.args, self.train_dataset
        samples.sample(*(stage.sampling or [self.sampling]))
        samples.patch_dropout = stage.patch_dropout
        batch_size = args.train_batch_size * args.world_size
        if stage.batch_size is not None:
            batch_size = min(stage.batch_size, len(samples)) // args.world_size * args.world_size
        return ClusterBatchSampler(
            samples.labels,
            self.domain.class_clusters,
            batch_size,
            args.cluster_share,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_processes=args.world_size,
            process_index=args.process_index,
        )

    def _generic_texts(self) -> list[str]:
        prompts, _ = self.domain.prompt_bank
        return generic_texts(self.processor.tokenizer, prompts, self.args.seed)

    def _targets(self, epochs_before: int) -> PromptTargets:
        """Prototypes for the prompts of each class; generic texts keep their text_embeds."""
        _, classes = self.domain.prompt_bank
        generic = encode_texts(self.model.eval(), self.processor, self._generic_texts())
        assert self.prototypes is not None  # by check_order
        prototypes = normalize(self.prototypes, dim=-1)
        first = np.unique(classes, return_index=True)[1]
        kinds = np.repeat([1, 2], [len(classes), len(generic)])
        kinds[first] = 0
        targets = torch.cat([prototypes[classes], generic]).cpu()
        return PromptTargets(kinds, targets, self.args.seed, epochs_before)

    def _encode_views(self, stage: Stage, cut: int) -> None:
        """Encodes the views up to the cut; what no stage trains, for all stages at once."""
        cuts = sorted({self.first_cut, cut} - {PIXELS}) if self.args.cached_views else []
        self.train_dataset.views = self.args.cached_views if cuts else 0
        if stage.loss != "distillation":  # which sees no images
            self._encode("train", self.train_dataset, self.train_dataset.views, cuts)
        self._encode("validation", self.eval_dataset, 1, cuts)

    def _encode(self, name: str, views: Views, count: int, cuts: list[int]) -> None:
        started = time.perf_counter()
        self.model.eval()  # what is kept must not depend on a draw of dropout
        tower, autocast = self.model.vision_model, AUTOCAST[self.precision]
        cache = self.feature_cache / name
        views.features = encode_views(tower, views, count, cuts, cache, autocast)
        self.encoding_seconds += time.perf_counter() - started

    def _mix(
        self, stage: Stage, towers: StageTowers, before: Weights, runs: Sequence[Path | None]
    ) -> list[dict[str, float]]:
        """Gives the towers the average of runs, mixed with what the stage began with.

        Returns:
            a row for each share, that of the lowest validation NLL first, which is taken; none
            where there is nothing to mix.
        """
        self._begin(stage, towers, before)
        ended = [kept_weights(path) for path in runs if path]
        if not ended:
            return []
        start = _copies(towers.trained())
        average = {
            name: torch.stack([each[name].to(part.device) for each in ended]).mean(dim=0)
            for name, part in start.items()
        }

        def mix(share: float) -> None:
            mixed = {name: part.lerp(average[name], share) for name, part in start.items()}
            towers.load(mixed)

        found = [{"mix": share} for share in stage.mix]
        if len(found) > 1:
            judge = self.trainer_of(stage.model_copy(update={"ema": 0.0}), towers, Path())
            for row in found:
                mix(row["mix"])
                measured = judge.evaluate()
                row |= {name: measured[name] for name in LOGGED if name in measured}
            found.sort(key=lambda row: row["eval_nll"])
        mix(found[0]["mix"])
        return found

    def _note(
        self,
        stage: Stage,
        variant: Stage,
        state: TrainerState,
        tried: list[dict[str, Any]],
        chosen: int,
        mixes: list[dict[str, float]],
    ) -> None:
        """Takes down what a stage came to."""
        kept = _kept_row(variant, state)
        for row in _looks(state):
            is_kept = bool(mixes) and row["epoch"] == kept.get("epoch")
            self.epochs.append(row | {"stage": stage.name, "kept": is_kept})
        noted = {"name": stage.name, "tried": tried, "chosen": chosen, "mixes": mixes}
        if variant.loss != "distillation":
            sampler = self._sampler(variant)
            sampler.epochs_before = self.epochs_done
            sampler.set_epoch(0)
            labels, classes = self.train_dataset.labels, len(self.domain.classes)
            smoothing = self.args.label_smoothing_factor
            floors = [
                loss_floor(labels[batch], variant.loss, smoothing, classes)
                for batch in sampler.global_batches()
            ]
            noted["batches"] = sampler.composition() | {"loss_floor": float(np.mean(floors))}
            self.sampling = (variant.sampling or [self.sampling])[0]
        self.stages.append(noted)
        self.epochs_done += variant.epochs[0] * variant.runs
        if variant.keep == "best" and mixes:
            self.best_metric = state.best_metric

    def settings(self) -> dict[str, Any]:
        """What decides the weights, beside model and data."""
        names = ("seed", "data_seed", "cluster_share", "weight_decay", "cached_views")
        return {name: getattr(self.args, name) for name in names} | {
            "batch_size": self.args.train_batch_size * self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "label_smoothing": self.args.label_smoothing_factor,
            "precision": self.precision,
            "stages": [stage.model_dump(mode="json") for stage in self.domain.stages],
        }

    def record(self) -> dict[str, Any]:
        """For training.json: what stages tried and chose, epochs, what was encoded, settings."""
        kept = [path.stat().st_size for path in self.feature_cache.rglob("*.arrow")]
        views = self.args.cached_views if kept else 0
        return {
            "stages": self.stages,
            "epochs": self.epochs,
            "features": {
                "views": views,
                "encoded": views * len(self.train_dataset.rows),
                "bytes": sum(kept),
                "seconds": round(self.encoding_seconds, 1),
            },
            "processes": self.args.world_size,
            "settings": self.settings(),
        }


def _copies(weights: dict[str, Any]) -> Weights:
    return {name: part.detach().clone() for name, part in weights.items()}


@torch.inference_mode()
def _pooled(model: CLIPModel, views: Views, view: int) -> np.ndarray:
    """The tower's pooled features of one view of each image, from its states at the depth."""
    states = torch.stack([views.features(row, view) for row in range(len(views.rows))])
    norm = model.vision_model.post_layernorm
    return norm(states.to(norm.weight)).cpu().numpy()


def _grid_values(stage: Stage, variant: Stage) -> dict[str, Any]:
    """What distinguishes a variant."""
    return {name: getattr(variant, name)[0] for name in GRIDS if len(getattr(stage, name)) > 1}


def _looks(state: TrainerState) -> list[dict[str, Any]]:
    """A row for each epoch of a run that was looked at."""
    rows: dict[float, dict[str, Any]] = {}
    for entry in state.log_history:
        row = rows.setdefault(
            entry["step"], {"epoch": round(entry["epoch"]), "step": entry["step"]}
        )
        row |= {name: entry[name] for name in LOGGED if name in entry}
    return [row for row in rows.values() if "eval_accuracy" in row]


def _kept_row(stage: Stage, state: TrainerState) -> dict[str, Any]:
    """That of the epoch which a run keeps; empty if it keeps none."""
    step = state.best_global_step if stage.keep == "best" else state.global_step
    return next((row for row in _looks(state) if row["step"] == step), {})


def read_state(checkpoint: Path) -> TrainerState:
    """Of the run, when the checkpoint was written."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _variant_folders(folder: Path) -> list[Path]:
    """Of a stage, where its checkpoints may lie, in the order of training."""
    variants = folder.glob("variant-*")
    return [folder, *sorted(variants, key=lambda path: int(path.name.rpartition("-")[2]))]


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; one that a kill has left unfinished has no state."""
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        try:
            read_state(checkpoint)
            return checkpoint
        except (OSError, ValueError):
            logger.warning(f"'{checkpoint}' is unfinished; going on from the one before it")
    return None
