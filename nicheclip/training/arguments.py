"""The arguments of `StagedTrainer`: transformers' own, with the recipe's defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from nicheclip.domain import Domain, DomainError
from nicheclip.training.losses import LOSSES

METRICS = ("accuracy", "macro_f1", "ece", "loss")  # of validation, each epoch
_OF_THE_STAGES = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "epochs",
    "warmup_steps": "warmup",
}
_REFUSED = {
    "load_best_model_at_end": "the best epoch of all stages is kept anyhow",
    "save_only_model": "stages go on from whole checkpoints",
    "ignore_data_skip": "a resumed epoch would be trained twice in part",
    "dataloader_persistent_workers": "such workers would repeat the first epoch's views",
    "dataloader_drop_last": "all batches are full",
    "auto_find_batch_size": "the batches are composed beforehand",
    "fsdp": "the loss needs the whole model in each process",
    "deepspeed": "the loss needs the whole model in each process",
}


@dataclass
class StagedTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the recipe's defaults and what staged training needs besides.

    Learning rates, epochs and warm-up belong to the stages of the domain file; setting them here is
    an error.
    """

    output_dir: str = "trainer_output"
    loss: str = field(default="multi_positive", metadata={"help": f"One of {', '.join(LOSSES)}."})
    cluster_share: float = field(
        default=0.5,
        metadata={"help": "Share of each batch that comes from one cluster of confusable classes."},
    )
    early_stopping_patience: int = field(
        default=5,
        metadata={
            "help": "End a stage after this many epochs of it without a better validation score."
        },
    )
    initial_logit_scale: float | None = field(
        default=None,
        metadata={"help": "exp(logit_scale) to begin with, e.g. 14.3; default: the base model's."},
    )
    wise_ft: str = field(
        default="1",
        metadata={
            "help": "WiSE-FT: the fine-tuned model's part in the weights, the rest is the base's; "
            "a number from 0 to 1, or auto: what is best on validation."
        },
    )
    cached_views: int = field(
        default=4,
        metadata={
            "help": "Augmented views of each image, taken in turn; what the frozen part of the "
            "visual tower makes of them is kept on disk. 0: a new view each time, nothing is kept."
        },
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Where it is kept; default: RUN/cache/features, which may be removed any time."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # unset until __post_init__
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16; default: where there is a GPU that supports it."
        },
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Batches whose gradients are averaged before a step. To the pair losses, which "
            "see the negatives of one batch at a time, that is no larger batch."
        },
    )
    # The recipe's optimiser: CLIP's betas and eps, strong decay, cosine.
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    label_smoothing_factor: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    lr_scheduler_type: str = "cosine"
    # One row an epoch in the log, on validation, and the best epoch kept (by StagedTrainer, over
    # all stages).
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    metric_for_best_model: str = field(
        default="accuracy",
        metadata={"help": f"What chooses the epoch on validation, one of {', '.join(METRICS)}."},
    )
    save_total_limit: int = 2
    # A loss that is not finite stops the training: it must not be smoothed over in the log.
    logging_nan_inf_filter: bool = False
    # All that a stage trains takes part in each step.
    ddp_find_unused_parameters: bool = False
    # Visits carry images and prompts that only our collator understands.
    remove_unused_columns: bool = False
    report_to: str = "none"
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin memory for the copy to the GPU, if there is one."},
    )

    def __post_init__(self) -> None:
        defaults = TrainingArguments.__dataclass_fields__
        for name, of_the_stage in _OF_THE_STAGES.items():
            if getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, but it belongs to the stages; "
                    f"set stages[].{of_the_stage} in the domain file"
                )
        if self.loss not in LOSSES:
            raise ValueError(f"--loss is '{self.loss}'; expected one of {', '.join(LOSSES)}")
        if self.wise_ft != "auto" and not _is_share(self.wise_ft):
            raise ValueError(
                f"--wise_ft is '{self.wise_ft}'; expected a number from 0 to 1, or auto"
            )
        if self.save_strategy not in ("epoch", "steps"):
            raise ValueError(
                f"--save_strategy is '{self.save_strategy}', but a stage starts from a checkpoint "
                "of the one before it; use 'epoch', or 'steps' for checkpoints in the middle of "
                "an epoch as well"
            )
        if self.eval_on_start or (self.eval_strategy, self.logging_strategy) != ("epoch", "epoch"):
            raise ValueError(
                "--eval_strategy and --logging_strategy must be 'epoch', without --eval_on_start: "
                "epochs are compared"
            )
        if self.cached_views < 0:
            raise ValueError(f"--cached_views is {self.cached_views}; expected 0 (none) or more")
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"--{name} is {getattr(self, name)}, but {reason}; leave it out")
        if self.save_total_limit == 1:
            raise ValueError(
                "--save_total_limit is 1; expected 2 or more: the last and the best checkpoint "
                "are needed"
            )
        if self.early_stopping_patience < 1:
            raise ValueError(
                f"--early_stopping_patience is {self.early_stopping_patience}; expected 1 or "
                "more, and to switch it off as many as the longest stage has epochs"
            )
        if self.initial_logit_scale is not None and not self.initial_logit_scale > 0:
            raise ValueError(
                f"--initial_logit_scale is {self.initial_logit_scale}; expected a number above 0"
            )
        self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_")
        if self.metric_for_best_model not in METRICS:
            raise ValueError(
                f"--metric_for_best_model is '{self.metric_for_best_model}'; expected one of "
                f"{', '.join(METRICS)}"
            )
        self.greater_is_better = self.metric_for_best_model not in ("ece", "loss")
        # else --bf16 asks for a GPU
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            asked = (
                self.fp16
                or self.use_cpu
                or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
            )
            self.bf16 = not asked and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def parse_arguments(domain: Domain, run: Path, options: list[str]) -> StagedTrainingArguments:
    """Command line over domain file over defaults.

    Raises:
        DomainError: for a key of `training` that is no argument.
    """
    arguments: Any = StagedTrainingArguments  # transformers asks for a NewType that no class has
    parser = HfArgumentParser(arguments, prog="train.py")
    known = StagedTrainingArguments.__dataclass_fields__
    if unknown := sorted(set(domain.training) - set(known)):
        raise DomainError(
            f"training: unknown key '{unknown[0]}'; expected a field of transformers' "
            "TrainingArguments"
        )
    of_run = {"output_dir": str(run / "checkpoints"), "feature_cache": str(run / "cache/features")}
    parser.set_defaults(**of_run | domain.training)
    return parser.parse_args_into_dataclasses(options)[0]
