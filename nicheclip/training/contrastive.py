"""A `transformers.Trainer` whose batches are pairs of images and prompts.

It evaluates as a zero-shot classifier.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from scipy.special import softmax
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, default_collate
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainerCallback

from nicheclip.clip import encode_texts, tokenize
from nicheclip.domain import Domain, Stage
from nicheclip.evaluation.metrics import ZeroShotMetrics
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import ClampLogitScale, ignore_interrupts
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.losses import LOSSES, class_prompts, gather
from nicheclip.training.sampler import ClusterBatchSampler

# spawn key: the prompts that a step draws are no sample's and no epoch's stream of chance
OF_STEPS = (1,)


class ContrastiveTrainer(Trainer):
    """Trains a CLIPModel with the losses of `LOSSES` on batches that a `ClusterBatchSampler` makes.

    Args:
        domain: whose prompts and clusters are trained.
        train_dataset: samples of the train split.
        eval_dataset: the validation split.
    """

    model: CLIPModel
    args: StagedTrainingArguments
    train_dataset: TrainingSamples
    eval_dataset: Views
    processing_class: CLIPProcessor
    stage: Stage
    _frozen_texts: torch.Tensor | None = None  # (P, D) of the bank, where no text is trained

    def __init__(
        self,
        model: CLIPModel,
        args: StagedTrainingArguments,
        domain: Domain,
        processor: CLIPProcessor,
        train_dataset: TrainingSamples,
        eval_dataset: Views,
        callbacks: list[TrainerCallback],
    ):
        self.domain = domain
        prompts, classes = domain.prompt_bank
        self._bank = tokenize(processor, prompts)  # (P, L) each
        of_class = range(len(domain.classes))
        self._bank_of_class = [np.flatnonzero(np.equal(classes, c)) for c in of_class]
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
        super().__init__(
            model=model,
            args=args,
            data_collator=default_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=self._compute_metrics,
            callbacks=[ClampLogitScale(), *callbacks],
        )
        # The loss is a mean over the batch: accumulation must divide it.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: CLIPModel | None = None) -> torch.optim.Optimizer:
        """AdamW over what trains in this stage.

        Biases, norms and logit_scale (`ndim <= 1`) never decay.
        """
        if self.optimizer is None:
            trained = [p for p in (model or self.model).parameters() if p.requires_grad]
            decays = {"weight_decay": self.args.weight_decay}
            groups = [
                {"params": [p for p in trained if p.ndim > 1], **decays},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

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
        loss_function, labels = LOSSES[self.args.loss], inputs["labels"]
        self._samples = inputs["samples"]
        if loss_function is class_prompts:
            prompts = self._prompt_of_each_class()
        else:
            prompts, prompt_of_image = inputs["prompts"].unique(return_inverse=True)
        if self._frozen_texts is None:
            texts = self._texts(prompts.cpu())
        else:
            texts = {"input_ids": self._frozen_texts[prompts]}
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
        rows = self.train_dataset.row_of_sample[self._samples.cpu().numpy()]
        raise FloatingPointError(
            f"the {what} is {value} at step {self.state.global_step + 1}, in stage "
            f"'{self.stage.name}'; remove '{self.args.output_dir}' and train afresh with a lower "
            "learning rate or a longer warm-up of this stage, or in float32 or with --bf16 "
            "instead of --fp16. The images of the batch (of this process's part): "
            + ", ".join(dict.fromkeys(self.train_dataset.rows[rows.tolist()]["source_id"]))
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers counts tokens, and there are none here."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of zero-shot classification with the canonical prompts."""
        self.model.eval()
        prompts = self.domain.canonical_prompts
        self._prototypes = encode_texts(self.model, self.processing_class, prompts)  # (C, D)
        return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model, inputs, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ):
        """Zero-shot logits (B, C) of the canonical prompts, and their cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            image_embeds = self.model.get_image_features(inputs["images"]).pooler_output
        image_embeds = normalize(image_embeds.float(), dim=-1)
        logits = self.model.logit_scale.exp() * image_embeds @ self._prototypes.T
        return cross_entropy(logits, inputs["labels"]), logits, inputs["labels"]

    def _compute_metrics(self, prediction) -> dict[str, float]:
        probabilities = softmax(np.asarray(prediction.predictions, dtype=np.float64), axis=1)
        return self._metrics.compute(predictions=probabilities, references=prediction.label_ids)
