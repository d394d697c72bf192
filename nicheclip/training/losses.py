"""Losses of images and prompts, and batches joined over processes."""

import torch
from torch import distributed
from torch.nn.functional import cross_entropy


def _symmetric(
    logits_per_image: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    image_loss = cross_entropy(logits_per_image, targets, label_smoothing=label_smoothing)
    text_loss = cross_entropy(logits_per_image.T, targets.T, label_smoothing=label_smoothing)
    return (image_loss + text_loss) / 2


def info_nce(
    logits_per_image: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """CLIP's own loss (Radford et al. 2021, arXiv:2103.00020): each image and its own prompt.

    Other pairs of the same class count as negatives (false negatives), so the loss has a floor well
    above 0.

    Args:
        logits_per_image: (B, B) scaled cosines, row i column j is image i with the prompt drawn for
            image j.
        labels: (B,) class indices; only their number is used.
    """
    own = torch.eye(len(labels), device=logits_per_image.device)
    return _symmetric(logits_per_image, own, label_smoothing)


def multi_positive(
    logits_per_image: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """As `info_nce`, but all same-class pairs are positives (Khosla et al., arXiv:2004.11362)."""
    same_class = (labels[:, None] == labels[None, :]).float()  # (B, B), symmetric
    targets = same_class / same_class.sum(dim=1, keepdim=True)
    return _symmetric(logits_per_image, targets, label_smoothing)


def class_prompts(
    logits_per_image: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy over one prompt of every class: the zero-shot classifier is trained.

    Goyal et al. 2023 (FLYP, arXiv:2212.00638) compare it with keeping the contrastive loss. No
    image depends on another here, so processes need not `gather`.

    Args:
        logits_per_image: (B, C) scaled cosines, column c is a prompt of class c.
        labels: (B,) class indices.
    """
    return cross_entropy(logits_per_image, labels, label_smoothing=label_smoothing)


def supervised_contrastive(
    image_embeds: torch.Tensor, labels: torch.Tensor, temperature: float = 0.2
) -> torch.Tensor:
    """SupCon (Khosla et al. 2020, arXiv:2004.11362, L_out): images of one class attract each other.

    An image whose class no other one of the batch has is no anchor, but a negative.

    Args:
        image_embeds: (B, D) of unit length.
        labels: (B,) class indices.
        temperature: divides the cosines.
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (image_embeds @ image_embeds.T / temperature).masked_fill(itself, -torch.inf)
    positives = (labels[:, None] == labels[None, :]) & ~itself  # (B, B)
    log_shares = torch.log_softmax(logits, dim=1).masked_fill(~positives, 0)
    counts = positives.sum(dim=1)
    anchors = counts > 0
    of_each = -log_shares.sum(dim=1)[anchors] / counts[anchors]
    return of_each.mean() if anchors.any() else 0 * image_embeds.sum()


LOSSES = {"multi_positive": multi_positive, "info_nce": info_nce, "class_prompts": class_prompts}


def gather(embeds: torch.Tensor) -> torch.Tensor:
    """The embeddings of all processes, (B, D) -> (W * B, D) in rank order, with gradient.

    Made for a loss that each process computes alike on the joint batch, under
    DistributedDataParallel, which averages the gradients over the W processes: each passes W times
    the gradient of its own rows on, so that the average is the gradient of the joint batch.
    Parameters used after the gathering, such as logit_scale, have that in every process already.

    Args:
        embeds: of this process; all processes hold equally many. (B,) labels can be gathered too,
            without gradient.
    """
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        return embeds
    parts = [torch.empty_like(embeds) for _ in range(world)]
    distributed.all_gather(parts, embeds.detach().contiguous())
    # As it is, with W times its gradient.
    parts[distributed.get_rank()] = embeds + (world - 1) * (embeds - embeds.detach())
    return torch.cat(parts)
