"""Contrastive losses over a batch of images and one prompt for each."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def _symmetric(logits_per_image: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    image_loss = cross_entropy(logits_per_image, targets, label_smoothing=label_smoothing)
    text_loss = cross_entropy(logits_per_image.T, targets.T, label_smoothing=label_smoothing)
    return (image_loss + text_loss) / 2


def info_nce(logits_per_image: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """CLIP's own loss (Radford et al. 2021, arXiv:2103.00020): each image against its own prompt only.

    Other pairs of the same class count as negatives (false negatives), so the loss has a floor well above 0.

    Args:
        logits_per_image: (B, B) scaled cosines, row i column j is image i with the prompt drawn for image j.
        labels: (B,) class indices; only their number is used.
    """
    return _symmetric(logits_per_image, torch.eye(len(labels), device=logits_per_image.device), label_smoothing)


def multi_positive(logits_per_image: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """All same-class pairs of the batch are positives and share the target (Khosla et al. 2020, arXiv:2004.11362).

    Args: as `info_nce`.
    """
    same_class = (labels[:, None] == labels[None, :]).float()  # (B, B), symmetric
    return _symmetric(logits_per_image, same_class / same_class.sum(dim=1, keepdim=True), label_smoothing)


LOSSES = {"multi_positive": multi_positive, "info_nce": info_nce}
