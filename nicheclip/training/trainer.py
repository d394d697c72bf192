"""`transformers.Trainer` with stages: each unfreezes its own parameters, with its own optimiser and schedule.

trainer = StagedTrainer(model, args, domain, processor, train_dataset=samples, eval_dataset=rows)
trainer.train()
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from scipy.special import softmax
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, default_collate
from transformers import CLIPModel, CLIPProcessor, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from nicheclip.clip import encode_texts, tokenize
from nicheclip.domain import Domain, Stage
from nicheclip.evaluation.metrics import ZeroShotMetrics
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import (
    ClampLogitScale,
    EndOfStage,
    EpochLines,
    StopOnSignal,
    TrainingInterrupted,
    ignore_interrupts,
)
from nicheclip.training.checkpoints import (
    best_checkpoint,
    checkpoint_at,
    find_checkpoint,
    read_state,
)
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.feature_cache import encode_views
from nicheclip.training.losses import LOSSES, class_prompts, gather
from nicheclip.training.sampler import ClusterBatchSampler
from nicheclip.training.stages import current_stage, set_trainable, trainable_names
from nicheclip.training.towers import PIXELS, begin_later, cut_before

# spawn key: the prompts that a step draws are no visit's and no epoch's stream of chance
OF_STEPS = (1,)


class StagedTrainer(Trainer):
    """Fine-tunes a CLIPModel stage by stage on visits of (image, prompt), and evaluates it as a zero-shot classifier.

    A stage is one `Trainer.train` that resumes from the last checkpoint of the stage before it, so
    that steps, epochs, the log and the best checkpoint run on, while frozen parameters, optimiser
    and schedule are its own. It begins with the best weights so far, and ends early where
    validation does not get better. Everything random depends on seed, epoch, step and sample alone,
    so a resumed training gives the same weights, bit by bit on CPU.

    Args:
        domain: whose stages, prompts and clusters are trained.
        train_dataset: visits of the train split.
        eval_dataset: the validation split.

    Raises:
        ValueError: if a stage names parameters that the model does not have, or one process sees
            several GPUs.
    """

    model: CLIPModel
    args: StagedTrainingArguments
    train_dataset: TrainingSamples
    eval_dataset: Views
    processing_class: CLIPProcessor

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
        model._keys_to_ignore_on_save = {
            *(model._keys_to_ignore_on_save or ()),
            "text_model.used_embeddings",
        }
        names = [name for name, _ in model.named_parameters()]
        self.cuts = [
            cut_before(self._vision, trainable_names(names, stage)) for stage in domain.stages
        ]
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one a GPU: accelerate launch "
                f"--num_processes {args.n_gpu}"
            )
        if args.initial_logit_scale is not None:
            with torch.no_grad():
                model.logit_scale.fill_(math.log(args.initial_logit_scale))
        self.domain = domain
        self.stage = domain.stages[0]
        self._running: tuple[Stage, int] | None = None  # the stage, and the epochs before it
        self.encoding_seconds = 0.0
        self._stage_start = 0  # the global step at which the stage begins
        self.feature_cache = Path(args.feature_cache or Path(args.output_dir) / "features")
        prompts, classes = domain.prompt_bank
        self._bank = tokenize(processor, prompts)  # (P, L) each
        # (U,)
        self._used_tokens = tokenize(processor, [*prompts, *domain.canonical_prompts])[
            "input_ids"
        ].unique()
        self._bank_of_class = [
            np.flatnonzero(np.equal(classes, c)) for c in range(len(domain.classes))
        ]
        self._interruption = StopOnSignal()
        self._metrics = ZeroShotMetrics(keep_in_memory=True)
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
        super().__init__(
            model=model,
            args=args,
            data_collator=default_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=self._compute_metrics,
            callbacks=[
                ClampLogitScale(),
                EndOfStage(lambda: self._position() != self._running, self.steps_per_epoch),
                self._interruption,
            ],
        )
        # the loss is a mean over the batch: accumulation must divide it
        self.model_accepts_loss_kwargs = False
        if self.pop_callback(ProgressCallback):
            self.add_callback(EpochLines())

    def train(  # type: ignore[override]  # a search over hyperparameters has no stages
        self, resume_from_checkpoint: str | bool | None = None
    ) -> TrainOutput | None:
        """Runs the stages in turn; resumes in any of them, from a folder or (True) from the last whole checkpoint.

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
        sign, name = (
            1 if self.args.greater_is_better else -1,
            f"eval_{self.args.metric_for_best_model}",
        )
        scores = {
            round(entry["epoch"]): sign * entry[name]
            for entry in self.state.log_history
            if name in entry
        }
        return current_stage(
            self.domain.stages, list(scores.values()), self.args.early_stopping_patience
        )

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
            (
                checkpoint_at(self.args.output_dir, self.state.global_step) / TRAINER_STATE_NAME
            ).unlink(missing_ok=True)
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
        """A checkpoint at the very start of a stage holds the optimiser of the stage before it: that one is done."""
        if self.state.global_step > self._stage_start:
            super()._load_optimizer_and_scheduler(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with the stage."""
        super().log(logs, start_time)
        # After the trackers, which take numbers only.
        self.state.log_history[-1]["stage"] = self.stage.name  # type: ignore[assignment]

    def create_optimizer(self, model: CLIPModel | None = None) -> torch.optim.Optimizer:
        """AdamW over what trains in this stage.

        Biases, norms and logit_scale (`ndim <= 1`) never decay.
        """
        if self.optimizer is None:
            trained = [
                parameter
                for parameter in (model or self.model).parameters()
                if parameter.requires_grad
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": [p for p in trained if p.ndim > 1],
                        "weight_decay": self.args.weight_decay,
                    },
                    {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
                ],
                **options,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ):
        """The schedule of this stage alone: warm-up and decay over its own steps."""
        return super().create_scheduler(num_training_steps - self._stage_start, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        """The batches that the sampler composes."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            **self._loader_options(),
        )
        # The sampler has dealt out each batch among the processes, so that together they see one
        # composed batch.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_eval_dataloader(  # type: ignore[override]  # there is one evaluation set, without names
        self, eval_dataset: Views | None = None
    ) -> DataLoader:
        """Every row once, dealt out to the processes."""
        loader = DataLoader(
            eval_dataset if eval_dataset is not None else self.eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            **self._loader_options(),
        )
        return self.accelerator.prepare(loader)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
            "pin_memory": self.args.dataloader_pin_memory,
            "worker_init_fn": ignore_interrupts,
        }

    def compute_loss(
        self,
        model,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch=None,
    ):
        """The loss of the batch of all processes together.

        Each distinct prompt is encoded once in a process.
        """
        loss_function, labels, self._visits = (
            LOSSES[self.args.loss],
            inputs["labels"],
            inputs["samples"],
        )
        if loss_function is class_prompts:
            prompts = self._prompt_of_each_class()
        else:
            prompts, prompt_of_image = inputs["prompts"].unique(return_inverse=True)
        texts = (
            self._texts(prompts.cpu())
            if self._frozen_texts is None
            else {"input_ids": self._frozen_texts[prompts]}
        )
        outputs = model(pixel_values=inputs["images"], **texts)
        # Normalised and multiplied in float32: under autocast the logits would be rounded to 8
        # bits.
        image_embeds = normalize(outputs.image_embeds.float(), dim=-1)  # (B, D)
        text_embeds = normalize(outputs.text_embeds.float(), dim=-1)
        if loss_function is not class_prompts:
            text_embeds = gather(text_embeds[prompt_of_image])
            image_embeds, labels = gather(image_embeds), gather(labels)
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits = self.model.logit_scale.exp() * image_embeds @ text_embeds.T
            loss = loss_function(logits, labels, self.args.label_smoothing_factor)
        if not torch.isfinite(loss):
            self._stop_not_finite("loss", loss.item())
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        # with fp16 the scaler leaves out such steps
        if not self.args.fp16 and not math.isfinite(norm):
            self._stop_not_finite("norm of the gradient", float(norm))
        return norm

    def _prompt_of_each_class(self) -> torch.Tensor:
        """One prompt of every class, (C,) indices of the bank.

        Drawn for the step, the same in all processes.
        """
        seeds = np.random.SeedSequence([self.args.seed, self.state.global_step], spawn_key=OF_STEPS)
        rng = np.random.default_rng(seeds)
        return torch.tensor([rng.choice(prompts) for prompts in self._bank_of_class])

    def _texts(self, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens of prompts of the bank, (P,) -> (P, L), no longer than the longest of them."""
        length = self._bank["attention_mask"][prompts].sum(dim=1).max()
        return {
            name: tokens[prompts, :length].to(self.args.device)
            for name, tokens in self._bank.items()
        }

    def _stop_not_finite(self, what: str, value: float) -> None:
        rows = self.train_dataset.row_of_sample[self._visits.cpu().numpy()]
        raise FloatingPointError(
            f"the {what} is {value} at step {self.state.global_step + 1}, in stage "
            f"'{self.stage.name}'; remove '{self.args.output_dir}' and train afresh with a lower "
            "learning rate or a longer warm-up of this stage, or in float32 or with --bf16 "
            "instead of --fp16. The images of the batch (of this process's part): "
            + ", ".join(dict.fromkeys(self.train_dataset.rows[rows.tolist()]["source_id"]))
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers counts tokens, and six operations for each of them and of all parameters."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of zero-shot classification with the canonical prompts."""
        self.model.eval()
        # (C, D)
        self._prototypes = encode_texts(
            self.model, self.processing_class, self.domain.canonical_prompts
        )
        return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ):
        """Zero-shot logits (B, C) of the canonical prompts, and their cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            image_embeds = self.model.get_image_features(inputs["images"]).pooler_output
        logits = (
            self.model.logit_scale.exp()
            * normalize(image_embeds.float(), dim=-1)
            @ self._prototypes.T
        )
        return cross_entropy(logits, inputs["labels"]), logits, inputs["labels"]

    def _compute_metrics(self, prediction) -> dict[str, float]:
        probabilities = softmax(np.asarray(prediction.predictions, dtype=np.float64), axis=1)
        return self._metrics.compute(predictions=probabilities, references=prediction.label_ids)

    @property
    def best_epoch(self) -> int:
        """The epoch that is kept, counted from 1."""
        return (self.state.best_global_step or 0) // self.steps_per_epoch

    def settings(self) -> dict[str, Any]:
        """What decides the weights, beside model and data."""
        names = (
            "seed",
            "data_seed",
            "loss",
            "cluster_share",
            "weight_decay",
        )
        return {name: getattr(self.args, name) for name in names} | {
            "batch_size": self.args.train_batch_size * self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "label_smoothing": self.args.label_smoothing_factor,
            "cached_views": self.args.cached_views,
            "precision": "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "float32",
            "stages": [stage.model_dump(mode="json") for stage in self.domain.stages],
        }
