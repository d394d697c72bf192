"""Pictures that a model should not answer, and how it notices them.

They are drawn here, so that they cost no download and are always the same.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.covariance import ShrunkCovariance

from nicheclip.evaluation.metrics import auroc

PER_KIND = 100
KINDS = ("noise", "texture", "flat colour", "page of text", "object", "crop of 4 %", "heavy blur")
SHRINKAGE = 0.01  # of the covariance towards a round one: there may be fewer images than dimensions
ACCEPTED = 0.95  # share of in-domain images that the threshold lets pass
WORDS = "the of and in to a for is on that by with as was at from are an be it which this".split()
WORDS += ["or", "its", "not", "stone", "new"]


def ood_pictures(
    kind: str, side: int, seed: int, own: Sequence[Image.Image] = ()
) -> Iterator[Image.Image]:
    """`PER_KIND` RGB pictures of a kind: squares of `side` pixels, or `own` pictures spoilt."""
    for index in range(PER_KIND):
        rng = np.random.default_rng([seed, KINDS.index(kind), index])
        match kind:
            case "noise":
                yield Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            case "texture":
                yield _texture(side, rng)
            case "flat colour":  # with a gradient in every second picture on average
                colour, slope = rng.uniform(0, 255, 3), rng.uniform(-60, 60) * (rng.random() < 0.5)
                down = np.linspace(-slope, slope, side)[:, None, None]
                yield _image(colour + down * np.ones((1, side, 1)))
            case "page of text":
                yield _page(side, rng)
            case "object":
                yield _object(side, rng)
            case "crop of 4 %":
                yield _crop(own[index % len(own)].convert("RGB"), rng)
            case "heavy blur":
                picture = own[index % len(own)].convert("RGB")
                yield picture.filter(ImageFilter.GaussianBlur(min(picture.size) / 10))


def _texture(side: int, rng: np.random.Generator) -> Image.Image:
    """Two waves over each other, or smoothed noise, in two colours."""
    if rng.random() < 0.5:
        across, down = np.meshgrid(np.arange(side), np.arange(side))
        waves = np.zeros((side, side))
        for _ in range(2):
            angle, length = rng.uniform(0, math.pi), rng.uniform(side / 24, side / 3)
            waves += np.sin((across * math.cos(angle) + down * math.sin(angle)) * math.tau / length)
        pattern = waves / 4 + 0.5
    else:
        cells = int(rng.integers(3, 24))
        small = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        pattern = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255
    light, dark = rng.uniform(0, 255, (2, 3))
    return _image(pattern[..., None] * light + (1 - pattern[..., None]) * dark)


def _page(side: int, rng: np.random.Generator) -> Image.Image:
    """Lines of black words on nearly white."""
    page = Image.new("RGB", (side, side), tuple(rng.integers(225, 256, 3).tolist()))
    drawing, size = ImageDraw.Draw(page), float(rng.uniform(side / 28, side / 12))
    font, y = ImageFont.load_default(size), size
    while y < side - size:
        words = " ".join(rng.choice(WORDS, size=int(rng.integers(8, 24))))
        drawing.text((size, y), words, fill=(30, 30, 30), font=font)
        y += size * (1.4 if rng.random() < 0.85 else 2.6)
    return page


def _object(side: int, rng: np.random.Generator) -> Image.Image:
    """A few coloured ellipses and polygons on a ground, like a bowl of fruit or a toy."""
    scene = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    drawing = ImageDraw.Draw(scene)
    for _ in range(int(rng.integers(2, 7))):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        x, y, radius = *rng.uniform(0.2, 0.8, 2) * side, rng.uniform(0.08, 0.3) * side
        if rng.random() < 0.5:
            flat = rng.uniform(0.5, 1)
            drawing.ellipse((x - radius, y - radius * flat, x + radius, y + radius * flat), colour)
        else:
            angles = np.sort(rng.uniform(0, math.tau, int(rng.integers(3, 9))))
            corners = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
            drawing.polygon(corners, colour)
    return scene.filter(ImageFilter.GaussianBlur(side / 200))


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """4 % of its area, as large as the whole."""
    width, height = (max(2, round(0.2 * length)) for length in picture.size)
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    part = picture.crop((left, top, left + width, top + height))
    return part.resize(picture.size, Image.Resampling.BICUBIC)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def fit_class_means(image_embeds: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """`whitening` (D, D) and the classes' whitened `means` (C, D), float32.

    Of train's image_embeds (N, D) and labels (N,) int. After the whitening the images of a class
    spread alike in all directions; so the distance to a class's mean is Mahalanobis's, with one
    covariance for all classes (Lee et al. 2018, arXiv:1807.03888).
    """
    classes, of_image = np.unique(labels, return_inverse=True)
    embeds = image_embeds.astype(np.float64)
    means = np.stack([embeds[labels == each].mean(axis=0) for each in classes])
    spread = ShrunkCovariance(assume_centered=True, shrinkage=SHRINKAGE)
    whitening = np.linalg.cholesky(spread.fit(embeds - means[of_image]).get_precision())
    found = {"whitening": whitening, "means": means @ whitening}
    return {name: array.astype(np.float32) for name, array in found.items()}


def fit_ood_threshold(own: dict[str, np.ndarray], ood: dict[str, np.ndarray]) -> dict[str, Any]:
    """The score that tells calibration images (N,) from OOD pictures (M,) best.

    Returns:
        "score" and "threshold": a picture below it is outside of the domain; "auroc" of each score.
    """
    found = {score: auroc(own[score], ood[score]) for score in own}
    best = max(found, key=found.__getitem__)
    threshold = float(np.quantile(own[best], 1 - ACCEPTED, method="lower"))
    return {"score": best, "threshold": threshold, "auroc": found}
