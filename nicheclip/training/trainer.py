"""Stages, each one or more runs of a `transformers.Trainer` with an optimiser of their own.

StagedTrainer(model, args, domain, processor, train_dataset=samples, eval_dataset=rows).train()
"""

import copy
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor, TrainerState

from nicheclip.clip import encode_texts, token_lists
from nicheclip.domain import Domain
from nicheclip.processes import processes
from nicheclip.recipe import Sampling, Stage
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import (
    StageEpochs,
    StopOnSignal,
    TrainingInterrupted,
    WeightAverage,
)
from nicheclip.training.checkpoints import (
    LOGGED,
    Weights,
    check_asked,
    is_over,
    kept_row,
    kept_step,
    kept_weights,
    last_checkpoint,
    looks,
    read_state,
)
from nicheclip.training.contrastive import ContrastiveTrainer
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.distillation import (
    DistillationTrainer,
    PromptTargets,
    generic_texts,
    prompt_targets,
)
from nicheclip.training.feature_cache import StageFeatures
from nicheclip.training.sampler import ClusterBatchSampler
from nicheclip.training.stages import all_trained, set_trainable
from nicheclip.training.towers import StageTowers, cut_before, depth

logger = logging.getLogger(__name__)


class StagedTrainer:
    """Fine-tunes a CLIPModel stage by stage.

    A stage goes on from what those before it came to. Each combination of its grids is trained, and
    each of its `runs`, in a folder of its own. Everything random depends on seed, epoch, step and
    sample alone, so a resumed training gives the same weights, bit by bit on CPU.

    Args:
        model: is trained in place.
        domain: whose stages, prompts and clusters are trained.
        judged: whether runs are judged by `eval_dataset`; without, stages must be free of grids,
            and only what they begin with is chosen by it.

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
        judged: bool = True,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one a GPU: accelerate launch "
                f"--num_processes {args.n_gpu}"
            )
        model.to(args.device)  # type: ignore[arg-type]  # a wrapper of transformers' hides self
        self.model, self.args, self.domain, self.processor = model, args, domain, processor
        self.train_dataset, self.judged_by = train_dataset, eval_dataset if judged else None
        if args.bf16 and args.device.type == "cpu":
            model.set_attn_implementation("eager")  # torch's own has a slow backward pass there
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.prompts = token_lists(processor, domain.prompt_bank[0])
        self.generic = generic_texts(processor.tokenizer, domain.prompt_bank[0], args.seed)
        self.folders = [
            Path(args.output_dir) / f"{number}-{stage.name.replace('/', '_')}"
            for number, stage in enumerate(domain.stages, 1)
        ]
        self.sampling: Sampling = "balanced"  # of the stage before
        self.repeats = float(train_dataset.balanced[train_dataset.chosen].mean())
        possible: list[Sampling] = [self.sampling]
        for stage in domain.stages:  # what can't be sampled is told before anything is trained
            possible = stage.sampling or possible
            for sampling in possible if stage.loss != "distillation" else []:
                self._sampler(stage.model_copy(update={"sampling": [sampling]}))
        first_cut = cut_before(model.vision_model, all_trained(model, domain.stages))
        self.features = StageFeatures(model, train_dataset, eval_dataset, first_cut, args)
        self.signals = StopOnSignal()
        self.base_bias = model.vision_model.post_layernorm.bias.detach().clone()
        self.prototypes: torch.Tensor | None = None  # (C, D), where they are free
        self.stages: list[dict[str, Any]] = []  # of each, what was tried and chosen
        self.epochs: list[dict[str, Any]] = []  # a row each that was looked at, over all stages
        self.epochs_done = 0
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
        self.resume = bool(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_asked(resume_from_checkpoint, self.folders)
        try:
            for stage, folder in zip(self.domain.stages, self.folders, strict=True):
                self._train_stage(stage, folder)
        except TrainingInterrupted:
            raise
        except KeyboardInterrupt as interrupt:  # while encoding
            raise TrainingInterrupted(signal.SIGINT, self.best) from interrupt

    def _train_stage(self, stage: Stage, folder: Path) -> None:
        """Trains a stage, and gives the model what it came to."""
        towers = self.begin_stage(stage)
        if stage.mix == [0.0]:  # it is known to gain nothing
            self.stages.append({"name": stage.name, "tried": [], "chosen": 0, "mixes": []})
        else:
            self._try(stage, towers, folder)
            if towers.cut < depth(self.model.vision_model):
                self.features.later = self.features.own_folder
        towers.store()
        self.prototypes = towers.copies().get("prototypes")

    def _try(self, stage: Stage, towers: StageTowers, folder: Path) -> None:
        """Trains the variants and the runs of the chosen one; averages and mixes these."""
        variants = stage.variants(self.repeats)
        several = len(variants) > 1 or stage.runs > 1
        before = towers.copies()

        def run(variant: Stage, number: int, draw: int = 0) -> tuple[TrainerState, Path | None]:
            own = folder / f"variant-{number}" if several else folder
            return self._run(variant, towers, before, own, draw)

        runs, tried = [], []
        for number, variant in enumerate(variants, 1):
            runs.append(run(variant, number))
            tried.append(stage.grid_values(variant) | kept_row(runs[-1][0], variant))
        chosen = min(range(len(tried)), key=lambda index: tried[index].get("eval_nll", np.inf))
        variant, (state, kept) = variants[chosen], runs[chosen]
        mixes = self._mix(variant, towers, before, [kept])
        if kept and mixes[0]["mix"] > 0:
            more = [run(variant, len(variants) + draw, draw) for draw in range(1, stage.runs)]
            if more:
                mixes = self._mix(variant, towers, before, [kept, *(path for _, path in more)])
        self._note(stage, variant, state, tried, chosen, mixes)

    def begin_stage(self, stage: Stage) -> StageTowers:
        """The model as the stage trains it, and what it sees, encoded."""
        if stage.logit_scale is not None:
            self.model.logit_scale.data.fill_(np.log(stage.logit_scale))
        set_trainable(self.model, stage)
        prompts = self.prompts
        if stage.loss == "distillation":
            prompts = prompts + token_lists(self.processor, self.generic)
        prototypes = self.prototypes if stage.free_prototypes else None
        if stage.free_prototypes and prototypes is None:
            canonical = self.domain.canonical_prompts
            prototypes = encode_texts(self.model.eval(), self.processor, canonical)
        towers = StageTowers(self.model, prompts, prototypes, stage.patch_dropout)
        self.features.show(towers.cut, stage.loss != "distillation", self.judged_by is not None)
        return towers

    def _begin(self, stage: Stage, towers: StageTowers, before: Weights) -> None:
        """Gives the towers the weights that a variant begins with."""
        towers.load(before)
        bias = self.model.vision_model.post_layernorm.bias
        if "lda" in self.domain.stages[0].start and stage.name == self.domain.stages[0].name:
            bias.data.copy_(self.base_bias)
        if stage.start == ["lda"]:
            towers.begin_with(self.features.discriminants)

    def _run(
        self, stage: Stage, towers: StageTowers, before: Weights, folder: Path, draw: int
    ) -> tuple[TrainerState, Path | None]:
        """One run of a variant: its state at the end, and the checkpoint that it keeps.

        None for a stage that keeps its best epoch, if that is no better than those before.
        """
        checkpoint = last_checkpoint(folder) if self.resume else None
        state = read_state(checkpoint) if checkpoint else None
        if state is None or not is_over(state, stage, self.args.early_stopping_patience):
            self.best = checkpoint or self.best
            self._begin(stage, towers, before)
            trainer = self.trainer_of(stage, towers, folder, draw, checkpoint)
            with self.signals:
                trainer.train(str(checkpoint) if checkpoint else None)
            processes().wait_for_everyone()  # the main process has written the checkpoints
            state = trainer.state
            if received := self.signals.agree(self.args):
                raise TrainingInterrupted(received, folder / f"checkpoint-{state.global_step}")
        if not (step := kept_step(state, stage)):
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
        average = WeightAverage(towers, stage.ema)
        args = self.args.for_stage(stage, folder, judged=self.judged_by is not None)
        epochs_before = self.epochs_done + draw * stage.epochs[0]
        kind, options = ContrastiveTrainer, dict[str, Any]()
        if stage.loss == "distillation":
            assert self.prototypes is not None  # see check_order
            targets = prompt_targets(
                self.model, self.processor, self.domain, self.generic, self.prototypes
            )
            dataset = PromptTargets(*targets, args.seed, epochs_before)
            kind, options = DistillationTrainer, {"train_dataset": dataset}
        else:
            sampler = self._sampler(stage)
            sampler.epochs_before = self.train_dataset.epochs_before = epochs_before
            args.per_device_train_batch_size = sampler.batch_size
            options = {"train_dataset": self.train_dataset, "sampler": sampler}
        if checkpoint:  # not before: targets are what the model says when the stage begins
            average.load(checkpoint)
        return kind(
            self.domain,
            stage,
            average,
            model=copy.copy(towers),  # accelerate marks and wraps what it is given
            args=args,
            eval_dataset=self.judged_by,
            processing_class=self.processor,
            callbacks=[self.signals, StageEpochs(stage, self.best_metric)],
            **options,
        )

    def _sampler(self, stage: Stage) -> ClusterBatchSampler:
        """Of the images as the stage samples them."""
        args, samples = self.args, self.train_dataset
        samples.sample(*(stage.sampling or [self.sampling]))
        samples.patch_dropout = stage.patch_dropout
        samples.with_prompts = stage.loss != "class_prompts"
        batch_size = args.train_batch_size * args.world_size
        if stage.batch_size is not None:
            shares = max(1, min(stage.batch_size, len(samples)) // args.world_size)
            batch_size = shares * args.world_size
        return ClusterBatchSampler(
            samples.labels,
            self.domain.class_clusters,
            batch_size,
            args.cluster_share,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_processes=args.world_size,
            process_index=args.process_index,
        )

    def _mix(
        self, stage: Stage, towers: StageTowers, before: Weights, runs: Sequence[Path | None]
    ) -> list[dict[str, float]]:
        """Gives the towers the average of runs, mixed with what the stage began with.

        Returns:
            a row for each share, the one that is taken (lowest validation NLL) first; none for none
        """
        self._begin(stage, towers, before)
        ended = [kept_weights(path) for path in runs if path]
        if not ended:
            return []
        start = towers.copies()
        average = {name: torch.stack([each[name] for each in ended]).mean(dim=0) for name in start}

        def mix(share: float) -> None:
            ends = {name: average[name].to(part.device) for name, part in start.items()}
            towers.load({name: part.lerp(ends[name], share) for name, part in start.items()})

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
        kept = kept_row(state, variant) if mixes and mixes[0]["mix"] > 0 else {}
        self.epochs += [row | {"stage": stage.name, "kept": row == kept} for row in looks(state)]
        noted = {"name": stage.name, "tried": tried, "chosen": chosen, "mixes": mixes}
        if variant.loss != "distillation":
            noted["batches"] = self._sampler(variant).composition()
            (self.sampling,) = variant.sampling or [self.sampling]
        self.stages.append(noted)
        self.epochs_done += variant.epochs[0] * variant.runs
        if variant.keep == "best" and mixes:
            self.best_metric = state.best_metric

    def record(self) -> dict[str, Any]:
        """For training.json: what stages tried and chose, epochs, what was encoded, settings."""
        return {
            "stages": self.stages,
            "epochs": self.epochs,
            "features": self.features.record(),
            "processes": self.args.world_size,
            "settings": self.args.recorded(),
        }
