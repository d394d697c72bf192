"""What mild changes of a picture do to the answer."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "brighter by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker by a fifth": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "slight blur": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 200)),
    "JPEG of quality 50": lambda image: _as_jpeg(image, 50),
    "turned by 5°": lambda image: image.rotate(
        5, Image.Resampling.BICUBIC, fillcolor=_mean_colour(image)
    ),
}


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


def _mean_colour(image: Image.Image) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image).mean(axis=(0, 1)))


def prompt_answers(similarity: np.ndarray, prompt_classes: np.ndarray) -> np.ndarray:
    """What the classifier answers with the first prompt of each class, with the second, and so on.

    Classes that have fewer prompts keep their last.

    Args:
        similarity: (N, P) cosines with all prompts of the bank.
        prompt_classes: (P,) class of each prompt.

    Returns:
        (N, K) classes, K the largest number of prompts of a class.
    """
    of_class = [np.flatnonzero(prompt_classes == c) for c in range(prompt_classes.max() + 1)]
    most = max(map(len, of_class))
    return np.stack(
        [
            similarity[:, [own[min(turn, len(own) - 1)] for own in of_class]].argmax(axis=1)
            for turn in range(most)
        ],
        axis=1,
    )
