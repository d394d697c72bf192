"""The `transformers.Trainer` of one stage, whose batches are pairs of images and prompts.

It evaluates as a zero-shot classifier. Everything random depends on seed, epoch, step and sample
alone, and both are counted from the first stage on.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from scipy.special import softmax
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, default_collate
from transformers import CLIPProcessor, Trainer

from nicheclip.clip import encode_texts
from nicheclip.domain import Domain
from nicheclip.evaluation.calibration import best_nll
from nicheclip.evaluation.metrics import ZeroShotMetrics
from nicheclip.recipe import Stage
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import WeightAverage, ignore_interrupts
from nicheclip.training.checkpoints import TRAINED_WEIGHTS
from nicheclip.training.data import TrainingSamples
from nicheclip.training.losses import LOSSES, class_prompts, gather, supervised_contrastive
from nicheclip.training.sampler import ClusterBatchSampler
from nicheclip.training.towers import StageTowers

# spawn key: the prompts that a step draws are no sample's and no epoch's stream of chance
OF_STEPS = (1,)


class ContrastiveTrainer(Trainer):
    """Trains what a stage names with one of `LOSSES`.

    Args:
        stage: what the arguments and the model were made for.
        average: of the trained weights; it is what is judged.
        sampler: composes the batches of `train_dataset`.
        of_trainer: the Trainer's own; the model comes with the weights to begin with, or those of
            the checkpoint to go on from.
    """

    model: StageTowers
    args: StagedTrainingArguments
    train_dataset: TrainingSamples
    processing_class: CLIPProcessor
    samples: torch.Tensor | None = None  # of the step at hand

    def __init__(
        self,
        domain: Domain,
        stage: Stage,
        average: WeightAverage,
        sampler: ClusterBatchSampler | None = None,
        **of_trainer: Any,
    ):
        super().__init__(
            data_collator=default_collate, compute_metrics=self._compute_metrics, **of_trainer
        )
        self.domain, self.stage, self.sampler, self.average = domain, stage, sampler, average
        self.add_callback(average)
        self.metrics = ZeroShotMetrics(keep_in_memory=True)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Biases, norms and logit_scale (`ndim <= 1`) never decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def get_train_dataloader(self) -> DataLoader:
        """The batches that the sampler composes, and has dealt out among the processes."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_interrupts,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The Trainer's own, whose workers leave Ctrl-C to it as well."""
        loader = super().get_eval_dataloader(eval_dataset)
        loader.worker_init_fn = ignore_interrupts
        return loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the batch of all processes together; distinct prompts are encoded once."""
        loss_function, labels = LOSSES[self.stage.loss], inputs["labels"]
        self.samples = inputs["samples"]
        if loss_function is class_prompts:
            prompts = self._prompt_of_each_class()
        else:
            prompts, prompt_of_image = inputs["prompts"].unique(return_inverse=True)
        image_embeds, text_embeds, scale = model(inputs["images"], prompts)
        joint_embeds, joint_labels = gather(image_embeds), gather(labels)
        if loss_function is not class_prompts:
            text_embeds = gather(text_embeds[prompt_of_image])
            image_embeds, labels = joint_embeds, joint_labels
        logits = scale * image_embeds @ text_embeds.T
        loss = loss_function(logits, labels, self.args.label_smoothing_factor)
        if self.stage.supcon:
            between_images = supervised_contrastive(joint_embeds, joint_labels)
            loss = loss + self.stage.supcon * between_images
        if not torch.isfinite(loss):
            self._stop_not_finite("loss", loss.item())
        return (loss, {"logits": logits}) if return_outputs else loss

    def _prompt_of_each_class(self) -> torch.Tensor:
        """(C,) which of the prompts, drawn for the step, the same in all processes."""
        drawn_by = [self.args.seed, self.train_dataset.epochs_before, self.state.global_step]
        rng = np.random.default_rng(np.random.SeedSequence(drawn_by, spawn_key=OF_STEPS))
        return torch.tensor([rng.choice(own) for own in self.train_dataset.prompts_of_class])

    def _clip_grad_norm(self, model) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        # With fp16 the scaler leaves out such steps.
        if not self.args.fp16 and not math.isfinite(norm):
            self._stop_not_finite("norm of the gradient", float(norm))
        return norm

    def _stop_not_finite(self, what: str, value: float) -> None:
        told = (
            f"the {what} is {value} at step {self.state.global_step + 1}, in stage "
            f"'{self.stage.name}'; remove '{Path(self.args.output_dir).parent}' and train afresh "
            "with a lower learning rate or a longer warm-up of this stage, or in float32 or with "
            "--bf16 instead of --fp16"
        )
        if self.samples is not None:
            rows = self.train_dataset.row_of_sample[self.samples.cpu().numpy()]
            images = dict.fromkeys(self.train_dataset.rows[rows.tolist()]["source_id"])
            told += f". The images of the batch (of this process's part): {', '.join(images)}"
        raise FloatingPointError(told)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of zero-shot classification with prototypes or canonical prompts."""
        with self.average.shown():
            if self.model.prototypes is not None:
                prototypes = normalize(self.model.prototypes.detach(), dim=-1)
            else:
                clip, prompts = self.model.store().eval(), self.domain.canonical_prompts
                prototypes = encode_texts(clip, self.processing_class, prompts)
            self.prototypes = prototypes  # (C, D)
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Zero-shot logits (B, C) of the canonical prompts, and their cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        image_embeds = normalize(self.model.encode_images(inputs["images"]).float(), dim=-1)
        logits = self.model.clip.logit_scale.exp() * image_embeds @ self.prototypes.T
        return cross_entropy(logits, inputs["labels"]), logits, inputs["labels"]

    def _compute_metrics(self, prediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions, np.float64), prediction.label_ids
        measured = self.metrics.compute(predictions=softmax(logits, axis=1), references=labels)
        return measured | {"nll": best_nll(logits, labels)}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What the stage trains, and its average; not the arguments, which would be a pickle."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.average.save(folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The model and its average come with the checkpoint's weights."""
