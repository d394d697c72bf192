"""What fine-tuning forgets: a zero-shot task outside of the domain, asked before and after."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images, encode_texts, zero_shot_logits
from nicheclip.evaluation.intervals import Measure, proportion
from nicheclip.evaluation.metrics import correct


def retention_accuracy(
    model: CLIPModel,
    processor: CLIPProcessor,
    images: Iterable[Image.Image],
    labels: np.ndarray,
    canonical_prompts: list[str],
    progress: bool = True,
) -> Measure:
    """The share of images that the zero-shot classifier of the retention task names rightly.

    Args:
        images: those of the task, see `data_prep.sources.retention_rows`.
        labels: (N,) int, their class.
        canonical_prompts: one of each class (C,).
        progress: whether to show a progress bar.
    """
    image_embeds = encode_images(
        model, processor, images, len(labels), description="retention", progress=progress
    )
    # (N, C)
    logits = zero_shot_logits(
        model, image_embeds, encode_texts(model, processor, canonical_prompts)
    )
    return proportion(correct(logits, labels), np.arange(len(labels)), "retention")
