"""The arguments of `StagedTrainer`: transformers' own, with the recipe's defaults."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers import HfArgumentParser, TrainingArguments

from nicheclip.domain import Domain, DomainError
from nicheclip.recipe import Stage

METRICS = ("accuracy", "macro_f1", "ece", "loss", "nll")  # of validation, each epoch
# Why these keep their defaults.
FIXED = {
    "learning_rate": "each stage has its own, stages[].learning_rate in the domain file",
    "num_train_epochs": "each stage has its own, stages[].epochs in the domain file",
    "max_steps": "each stage has its own stages[].epochs in the domain file",
    "warmup_steps": "each stage has its own, stages[].warmup in the domain file",
    "eval_strategy": "epochs are compared",
    "logging_strategy": "epochs are compared",
    "eval_on_start": "epochs are compared",
    "load_best_model_at_end": "the best epoch of all stages is kept anyhow",
    "save_only_model": "stages go on from whole checkpoints",
    "ignore_data_skip": "a resumed epoch would be trained twice in part",
    "dataloader_persistent_workers": "such workers would repeat the first epoch's views",
    "dataloader_drop_last": "all batches are full",
    "auto_find_batch_size": "the batches are composed beforehand",
    "fsdp": "the loss needs the whole model in each process",
    "deepspeed": "the loss needs the whole model in each process",
}


def _argument(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


@dataclass
class StagedTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the recipe's, with what contrastive training needs.

    Learning rates, epochs and warm-up belong to the stages of the domain file; setting them here is
    an error.
    """

    output_dir: str = "trainer_output"
    cluster_share: float = _argument(0.5, "Share of a batch that comes from one cluster.")
    early_stopping_patience: int = _argument(5, "Epochs without a better score that end a stage.")
    wise_ft: str = _argument(
        "1",
        "WiSE-FT: the fine-tuned model's part in the weights, the rest is the base's; a number "
        "from 0 to 1, or auto: what is best on validation.",
    )
    retention_drop: float = _argument(
        0.04, "What of the accuracy on the retention task the mixture of --wise_ft auto may cost."
    )
    cached_views: int = _argument(
        4,
        "Augmented views of each image, kept as the frozen part of the visual tower sees them; "
        "its samples take them in turn. 0: a new view for each sample, and nothing is kept.",
    )
    feature_cache: str | None = _argument(
        None, "Where it is kept; default: RUN/cache/features, which may be removed any time."
    )
    bf16: bool | None = _argument(  # type: ignore[assignment]  # unset until __post_init__
        None, "Mixed precision in bfloat16; default: where there is a GPU that supports it."
    )
    gradient_accumulation_steps: int = _argument(
        1, "Batches that make a step; a larger batch to class_prompts, not to the pair losses."
    )
    # The recipe's optimiser: CLIP's betas and eps, strong decay, cosine.
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    label_smoothing_factor: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    lr_scheduler_type: str = "cosine"
    # One row an epoch in the log, on validation; the best is kept.
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    metric_for_best_model: str = _argument(
        "accuracy", f"What chooses the epoch on validation, one of {', '.join(METRICS)}."
    )
    save_total_limit: int = 2
    # A loss that is not finite stops the training: it must not be smoothed over in the log.
    logging_nan_inf_filter: bool = False
    # All that a stage trains takes part in each step.
    ddp_find_unused_parameters: bool = False
    # Samples carry images and prompts that only our collator understands.
    remove_unused_columns: bool = False
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        for name, reason in FIXED.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name} is {getattr(self, name)}, but {reason}; leave it out")
        metric = self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_")
        for name, fits, expected in (
            ("metric_for_best_model", metric in METRICS, f"one of {', '.join(METRICS)}"),
            ("wise_ft", _is_share(self.wise_ft), "a number from 0 to 1, or auto"),
            ("retention_drop", 0 <= self.retention_drop <= 1, "a number from 0 to 1"),
            ("cached_views", self.cached_views >= 0, "0 (none) or more"),
            ("early_stopping_patience", self.early_stopping_patience >= 1, "1 or more epochs"),
            ("save_total_limit", self.save_total_limit != 1, "2 or more: the last and the best"),
            (
                "save_strategy",
                self.save_strategy in ("epoch", "steps"),
                "'epoch', or 'steps' for checkpoints in the middle of an epoch as well",
            ),
        ):
            if not fits:
                raise ValueError(f"--{name} is '{getattr(self, name)}'; expected {expected}")
        self.greater_is_better = metric not in ("ece", "loss", "nll")
        # Else --bf16 asks for a GPU.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
            free = not (self.fp16 or self.use_cpu or asked)
            self.bf16 = free and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()

    @property
    def precision(self) -> str:
        """Of the arithmetic."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"

    def for_stage(self, stage: Stage, folder: Path, judged: bool) -> Self:
        """Those of one run of a stage without grids, whose checkpoints lie in `folder`."""
        args = copy.copy(self)
        args.output_dir, args.warmup_steps = str(folder), stage.warmup
        (args.learning_rate,), (args.num_train_epochs,) = stage.learning_rate, stage.epochs
        if stage.weight_decay is not None:
            args.weight_decay = stage.weight_decay
        if not judged:
            args.eval_strategy = "no"
        args.gradient_checkpointing = args.activation_checkpointing = False  # it is on already
        return args

    def recorded(self) -> dict[str, Any]:
        """What decides the weights, beside model, data and stages."""
        names = "seed data_seed cluster_share weight_decay cached_views max_grad_norm".split()
        names += ["early_stopping_patience", "metric_for_best_model"]
        return {name: getattr(self, name) for name in names} | {
            "batch_size": self.train_batch_size * self.world_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "label_smoothing": self.label_smoothing_factor,
            "precision": self.precision,
        }


def _is_share(text: str) -> bool:
    try:
        return text == "auto" or 0 <= float(text) <= 1
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
        if stage_has := {"loss": "loss", "initial_logit_scale": "logit_scale"}.get(unknown[0]):
            raise DomainError(
                f"training: '{unknown[0]}' belongs to a stage now; write it there, as "
                f"stages[].{stage_has}"
            )
        raise DomainError(
            f"training: unknown key '{unknown[0]}'; expected a field of transformers' "
            "TrainingArguments"
        )
    of_run = {"output_dir": str(run / "checkpoints"), "feature_cache": str(run / "cache/features")}
    parser.set_defaults(**of_run | domain.training)
    return parser.parse_args_into_dataclasses(options)[0]
