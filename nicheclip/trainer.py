"""`transformers.Trainer` with stages: each unfreezes its own parameters, with its own optimiser and schedule.

trainer = StagedTrainer(model, args, stages, train_dataset=visits, eval_dataset=rows, …)
trainer.train()
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from torch.utils.data import DataLoader
from transformers import (
    CLIPModel,
    CLIPProcessor,
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from nicheclip.data import ImageCollator, TrainingCollator, TrainingVisits
from nicheclip.domain import Stage
from nicheclip.losses import LOSSES
from nicheclip.metrics import Accuracy, ExpectedCalibrationError, MacroF1
from nicheclip.sampler import ClusterBatchSampler
from nicheclip.stages import set_trainable, trainable_names
from nicheclip.zero_shot import encode_texts

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = math.log(100)


@dataclass
class StagedTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the recipe's, with what staged contrastive training needs besides.

    Learning rates and epochs belong to the stages of the domain file; setting them here is an error.
    """

    loss: str = field(default="multi_positive", metadata={"help": f"One of {', '.join(LOSSES)}."})
    cluster_share: float = field(
        default=0.5, metadata={"help": "Share of each batch that comes from one cluster of confusable classes."}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Stop after this many epochs of a stage without a better validation accuracy."}
    )
    # The recipe's optimiser: CLIP's betas and eps, strong decay, short warm-up, cosine.
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    label_smoothing_factor: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    # One row a epoch in the log, on validation, and the best epoch kept.
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "accuracy"
    greater_is_better: bool = True
    save_total_limit: int = 2
    # Visits carry images and prompts that only our collator understands.
    remove_unused_columns: bool = False
    report_to: str = "none"
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory for the copy to the GPU, if there is one."},
    )

    def __post_init__(self) -> None:
        defaults = TrainingArguments.__dataclass_fields__
        for name in ("learning_rate", "num_train_epochs", "max_steps"):
            if getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, but learning rates and epochs belong to the stages; "
                    "set stages[].learning_rate and stages[].epochs in the domain file"
                )
        if self.loss not in LOSSES:
            raise ValueError(f"--loss is '{self.loss}'; expected one of {', '.join(LOSSES)}")
        if self.save_strategy not in ("epoch", "steps"):
            raise ValueError(
                f"--save_strategy is '{self.save_strategy}', but a stage starts from the last checkpoint of the one "
                "before it; use 'epoch' or 'steps'"
            )
        if self.eval_on_start or (self.eval_strategy, self.logging_strategy) != ("epoch", "epoch"):
            raise ValueError(
                "--eval_strategy and --logging_strategy must be 'epoch', without --eval_on_start: epochs are compared"
            )
        if not self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end must be True: the best epoch on validation is kept")
        super().__post_init__()


class _ClampLogitScale(TrainerCallback):
    """Keeps exp(logit_scale) at 100 or below, as CLIP does."""

    def on_optimizer_step(self, args, state, control, model: CLIPModel, **kwargs) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


class _EpochLines(ProgressCallback):
    """Progress bars, and one line an epoch instead of the Trainer's dictionaries."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if state.is_local_process_zero and "eval_accuracy" in logs and self.training_bar is not None:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), math.nan)
            self.training_bar.write(
                f"epoch {math.ceil(state.epoch - 1e-6)}: loss {loss:.3f}, "
                f"validation accuracy {logs['eval_accuracy']:.1%}"
            )


class StagedTrainer(Trainer):
    """Fine-tunes a CLIPModel stage by stage on visits of (image, prompt), and evaluates it as a zero-shot classifier.

    A stage is one `Trainer.train` that resumes from the last checkpoint of the stage before it, so that steps,
    epochs, the log and the best checkpoint run on, while frozen parameters, optimiser and schedule are its own.

    Args:
        stages: of the domain.
        canonical_prompts: one a class, the classifier that evaluation uses.
        class_clusters: cluster index of each class.
        train_dataset: visits of the train split.
        eval_dataset: rows of the validation split.

    Raises:
        ValueError: if a stage names parameters that the model does not have.
    """

    def __init__(
        self,
        model: CLIPModel,
        args: StagedTrainingArguments,
        stages: list[Stage],
        canonical_prompts: list[str],
        class_clusters: list[int],
        processor: CLIPProcessor,
        train_dataset: TrainingVisits,
        eval_dataset: Dataset,
    ):
        for stage in stages:
            trainable_names((name for name, _ in model.named_parameters()), stage)
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs; start one a GPU: accelerate launch --num_processes {args.n_gpu}"
            )
        self.stages = stages
        self.stage = stages[0]
        self._stage_start = 0  # the global step at which the stage begins
        self.canonical_prompts = canonical_prompts
        self.class_clusters = class_clusters
        self._early_stopping = EarlyStoppingCallback(args.early_stopping_patience)
        self._metrics = evaluate.combine(
            [metric(keep_in_memory=True) for metric in (Accuracy, MacroF1, ExpectedCalibrationError)]
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=TrainingCollator(processor),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=self._compute_metrics,
            callbacks=[
                _ClampLogitScale(),
                self._early_stopping,
            ],
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: accumulation must divide it
        if self.pop_callback(ProgressCallback):
            self.add_callback(_EpochLines())

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Runs the stages in turn; resumes in any of them, from a folder or (True) from the last checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"--resume_from_checkpoint: no checkpoint in '{self.args.output_dir}'; leave the option out"
                )
        checkpoint = resume_from_checkpoint or None
        steps_done = _global_step(checkpoint) if checkpoint else 0
        updates_per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
        epochs = 0
        for stage in self.stages:
            self._stage_start = epochs * updates_per_epoch
            epochs += stage.epochs
            if steps_done >= epochs * updates_per_epoch and stage is not self.stages[-1]:
                continue
            self._enter(stage, epochs)
            output = super().train(resume_from_checkpoint=checkpoint)
            if self.state.global_step < epochs * updates_per_epoch:
                logger.warning(
                    f"stopped early in stage '{stage.name}': {self.args.early_stopping_patience} epochs without a "
                    "better validation accuracy; later stages are left out"
                )
                break
            checkpoint = str(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        return output

    def _enter(self, stage: Stage, last_epoch: int) -> None:
        self.stage = stage
        set_trainable(self.model, stage)
        self.args.num_train_epochs = last_epoch
        self.args.learning_rate = stage.learning_rate
        self.model_wrapped = self.model  # wrapped anew: DDP only reduces what trained when it wrapped the model
        self.optimizer = None  # created anew: it only holds what trained when it was created
        self.lr_scheduler = None
        self._early_stopping.early_stopping_patience_counter = 0  # a plateau of one stage says nothing about the next

    def stage_of_epoch(self, epoch: float) -> str:
        """The name of the stage in which an epoch (counted from 1) was trained."""
        last = 0
        for stage in self.stages:
            last += stage.epochs
            if epoch <= last:
                return stage.name
        raise ValueError(f"epoch {epoch:g} is beyond the stages, which have {last} epochs")

    def create_optimizer(self, model: CLIPModel | None = None) -> torch.optim.Optimizer:
        """AdamW over what trains in this stage; biases, norms and logit_scale (`ndim <= 1`) never decay."""
        if self.optimizer is None:
            trained = [parameter for parameter in (model or self.model).parameters() if parameter.requires_grad]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.args.weight_decay},
                    {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
                ],
                **options,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of this stage alone: warm-up and decay over its own steps."""
        return super().create_scheduler(num_training_steps - self._stage_start, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A checkpoint at the very start of a stage holds the optimiser of the stage before it: that one is done."""
        if checkpoint is None or _global_step(checkpoint) > self._stage_start:
            super()._load_optimizer_and_scheduler(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        sampler = ClusterBatchSampler(
            self.train_dataset.labels,
            self.class_clusters,
            self.args.train_batch_size,
            self.args.cluster_share,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        loader = DataLoader(
            eval_dataset if eval_dataset is not None else self.eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=ImageCollator(self.processing_class),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch=None
    ):
        """The contrastive loss of a batch; each distinct prompt of the batch is encoded once."""
        inputs = dict(inputs)
        labels, prompt_index = inputs.pop("labels"), inputs.pop("prompt_index")
        outputs = model(**inputs)
        logits_per_image = outputs.logits_per_image[:, prompt_index].float()  # (B, P) -> (B, B)
        loss = LOSSES[self.args.loss](logits_per_image, labels, self.args.label_smoothing_factor)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step} of stage '{self.stage.name}'; "
                "lower its learning rate, or train with --bf16 or in float32 instead of --fp16"
            )
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.model.eval()
        self._prototypes = encode_texts(self.model, self.processing_class, self.canonical_prompts)  # (C, D)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None):
        """Zero-shot logits (B, C) of the canonical prompts, and their cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            image_embeds = self.model.get_image_features(inputs["pixel_values"]).pooler_output.float()
            image_embeds = torch.nn.functional.normalize(image_embeds, dim=-1)
            logits = self.model.logit_scale.exp() * image_embeds @ self._prototypes.T
            loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return loss, logits, inputs["labels"]

    def _compute_metrics(self, prediction) -> dict[str, float]:
        probabilities = softmax(np.asarray(prediction.predictions, dtype=np.float64), axis=1)
        return self._metrics.compute(predictions=probabilities, references=prediction.label_ids)

    def training_record(self) -> dict[str, Any]:
        """What was trained and how: one row an epoch with its stage, loss and validation metrics; settings."""
        rows: dict[int, dict[str, Any]] = {}
        for entry in self.state.log_history:
            epoch = math.ceil(entry["epoch"] - 1e-6)
            row = rows.setdefault(epoch, {"epoch": epoch, "stage": self.stage_of_epoch(epoch)})
            logged = ("loss", "eval_accuracy", "eval_macro_f1", "eval_ece")
            row |= {name: entry[name] for name in logged if name in entry}
        epochs = [row for row in rows.values() if "eval_accuracy" in row]
        return {
            "epochs": epochs,
            "best_epoch": round(self.state.best_global_step * self.state.num_train_epochs / self.state.max_steps),
            "processes": self.args.world_size,
            "settings": {
                "seed": self.args.seed,
                "loss": self.args.loss,
                "batch_size": self.args.train_batch_size,
                "cluster_share": self.args.cluster_share,
                "label_smoothing": self.args.label_smoothing_factor,
                "weight_decay": self.args.weight_decay,
            },
        }


def _global_step(checkpoint: str | Path) -> int:
    """Raises: FileNotFoundError if the folder is no checkpoint."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"'{checkpoint}' is no checkpoint: it has no {TRAINER_STATE_NAME}")
    return json.loads(path.read_text())["global_step"]
