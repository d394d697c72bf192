"""What mild changes of a picture do, what other prompts say, and what fine-tuning forgets."""

import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageStat
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images, encode_texts, zero_shot_logits
from nicheclip.evaluation.intervals import Measure, proportion
from nicheclip.evaluation.metrics import correct
from nicheclip.images import encode_jpeg

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "brighter by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "slight blur": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 200)),
    "JPEG of quality 50": lambda image: Image.open(io.BytesIO(encode_jpeg(image, 50))),
    "turned by 5°": lambda image: image.rotate(
        5, Image.Resampling.BICUBIC, fillcolor=tuple(map(int, ImageStat.Stat(image).mean))
    ),
}


def prompt_answers(similarity: np.ndarray, prompt_classes: np.ndarray) -> np.ndarray:
    """What the classifier answers with the first prompt of each class, the second, and so on.

    Of cosines (N, P) with prompts of these classes (P,), answers (N, K), K the largest number of
    prompts of a class; those that have fewer keep their last.
    """
    of_class = [np.flatnonzero(prompt_classes == c) for c in range(prompt_classes.max() + 1)]
    turns = range(max(map(len, of_class)))
    asked = [[own[min(turn, len(own) - 1)] for own in of_class] for turn in turns]  # (K, C)
    return np.stack([similarity[:, prompts].argmax(axis=1) for prompts in asked], axis=1)


def retention_accuracy(
    model: CLIPModel,
    processor: CLIPProcessor,
    images: Iterable[Image.Image],
    labels: np.ndarray,
    canonical_prompts: list[str],
    progress: bool = True,
) -> Measure:
    """The accuracy on the retention task, which fine-tuning should not forget.

    Args: its images, labels (N,) int, and one prompt of each class (C,).
    """
    embeds = encode_images(model, processor, images, len(labels), progress=progress)
    logits = zero_shot_logits(model, embeds, encode_texts(model, processor, canonical_prompts))
    return proportion(correct(logits, labels), np.arange(len(labels)), "retention")
