"""The stage in which the text tower learns to say free class prototypes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from nicheclip.clip import encode_texts
from nicheclip.domain import Domain
from nicheclip.training.contrastive import ContrastiveTrainer

STEPS_PER_EPOCH = 20
GENERIC = 4000  # texts whose embeddings should stay
TEMPLATES = ("{}", "a photo of a {}", "{} {}", "a {} {}")
# How many of each kind a step sees, at most, and their weight in its loss.
CANONICAL, OTHER_PROMPTS, GENERIC_TEXTS = (64, 1.0), (32, 0.3), (64, 1.0)


def generic_texts(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], seed: int, count: int = GENERIC
) -> list[str]:
    """Short texts, and the prompts with some words replaced, by whole words of the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab())
    words = [word[:-4] for word in vocabulary if re.fullmatch(r"[a-z]{3,}</w>", word)]
    rng = np.random.default_rng(seed)
    texts = []
    for index in range(count if words else 0):
        if index % 2:
            texts.append(TEMPLATES[index // 2 % len(TEMPLATES)].format(*rng.choice(words, 2)))
            continue
        said = prompts[int(rng.integers(len(prompts)))].split()
        replaced = rng.random(len(said)) < 0.5
        replaced[rng.integers(len(said))] = True
        texts.append(" ".join(np.where(replaced, rng.choice(words, len(said)), said)))
    return sorted(set(texts) - set(prompts))


def prompt_targets(
    model: CLIPModel,
    processor: CLIPProcessor,
    domain: Domain,
    generic: list[str],
    prototypes: torch.Tensor,
) -> tuple[np.ndarray, torch.Tensor]:
    """What the text tower should say: of each class its prototype, of generic texts what it says.

    Args:
        prototypes: (C, D).

    Returns:
        kinds (P,) and targets (P, D) of the prompt bank and the generic texts, as `PromptTargets`
        has them.
    """
    classes = np.array(domain.prompt_bank[1])
    kinds = np.repeat([1, 2], [len(classes), len(generic)])
    kinds[np.unique(classes, return_index=True)[1]] = 0
    said = encode_texts(model.eval(), processor, generic)
    return kinds, torch.cat([normalize(prototypes, dim=-1)[classes], said]).cpu()


class PromptTargets(torch.utils.data.Dataset):
    """An item is what one step sees: prompts and the text_embeds that they should have.

    Args:
        kinds: (P,) of each prompt: 0 canonical, 1 another one of a class, 2 generic.
        targets: (P, D) of unit length.
    """

    def __init__(self, kinds: np.ndarray, targets: torch.Tensor, seed: int, epochs_before: int = 0):
        self.kinds, self.targets, self.seed = kinds, targets, seed
        self.epoch = self.epochs_before = epochs_before

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = self.epochs_before + epoch

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, self.epoch, step])
        prompts, weights = [], []
        for kind, (most, weight) in enumerate((CANONICAL, OTHER_PROMPTS, GENERIC_TEXTS)):
            own = np.flatnonzero(self.kinds == kind)
            drawn = own if len(own) <= most else np.sort(rng.permutation(own)[:most])
            prompts.append(drawn)
            weights.append(np.full(len(drawn), weight / max(1, len(drawn)), np.float32))
        chosen = torch.from_numpy(np.concatenate(prompts))
        return {
            "prompts": chosen,
            "targets": self.targets[chosen],
            "weights": torch.from_numpy(np.concatenate(weights)),
        }


class DistillationTrainer(ContrastiveTrainer):
    """Trains the text side on `PromptTargets`; all processes take the same steps."""

    def get_train_dataloader(self) -> DataLoader:
        """One item a step."""
        loader = DataLoader(self.train_dataset, 1, collate_fn=_only_item)
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted mean of 1 - cosine of each prompt's text_embeds with its target."""
        _, text_embeds, _ = model(None, inputs["prompts"])
        cosines = (text_embeds * inputs["targets"]).sum(dim=-1)
        loss = (inputs["weights"] * (1 - cosines)).sum()
        if not torch.isfinite(loss):
            self._stop_not_finite("loss", loss.item())
        return (loss, {"cosines": cosines}) if return_outputs else loss


def _only_item(items: list[Any]) -> Any:
    return items[0]
