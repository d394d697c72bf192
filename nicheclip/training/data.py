"""The prepared dataset, and the way of its images into a batch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from transformers import CLIPProcessor

from nicheclip.clip import image_side, pixel_values
from nicheclip.domain import Augmentation

VIEW = (2,)  # spawn key: the views that are kept are no visit's stream of chance


def augment(
    image: Image.Image, side: int, how: Augmentation, rng: np.random.Generator
) -> Image.Image:
    """One random view of an RGB image, `side` x `side` pixels; depends on the generator alone.

    Crop, flip, rotation and perspective are one resampling: the corners of a random box are turned
    and shifted, and what lies between them is mapped to the square.
    """
    width, height = image.size
    area = rng.uniform(*how.crop_scale) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    # (2,) width and height
    box = np.minimum([math.sqrt(area * ratio), math.sqrt(area / ratio)], [width, height])
    centre = box / 2 + rng.random(2) * (np.array([width, height]) - box)
    # (4, 2), as Pillow orders a quadrilateral
    corners = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) / 2 * box
    angle = math.radians(rng.uniform(-how.rotation, how.rotation))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = corners @ turn.T + rng.uniform(-how.perspective, how.perspective, (4, 2)) * box
    if rng.random() < how.horizontal_flip:
        corners = corners[[3, 2, 1, 0]]
    corners = np.clip(centre + corners, 0, [width, height])
    # a quadrilateral is sampled without a low-pass, so shrink the image first
    if (shrink := side / box.min()) < 1:
        smaller = [max(1, round(width * shrink)), max(1, round(height * shrink))]
        corners *= np.array(smaller) / [width, height]
        image = image.resize(smaller, Image.Resampling.BICUBIC)
    view = image.transform(
        (side, side), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC
    )

    for enhance, strength in (
        (ImageEnhance.Brightness, how.brightness),
        (ImageEnhance.Contrast, how.contrast),
        (ImageEnhance.Color, how.saturation),
    ):
        view = enhance(view).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    if how.hue:
        hue, saturation, value = view.convert("HSV").split()
        shift = round(rng.uniform(-how.hue, how.hue) * 256)
        view = Image.merge(
            "HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)
        ).convert("RGB")
    if rng.random() < how.grayscale:
        view = view.convert("L").convert("RGB")
    if rng.random() < how.blur:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * side / 224))
    return view


Features = Callable[[int, int], torch.Tensor]  # the states of (row, view)


class Views(torch.utils.data.Dataset):
    """What the model is shown of each prepared image: of row r, views (r, 0), (r, 1), …

    Args:
        chosen: the rows that are items; default: all. The others are encoded as well, so that what
            one choice has kept serves another one.

    Attributes:
        features: gives pixels, or the kept states that take their place.
    """

    def __init__(
        self, rows: datasets.Dataset, processor: CLIPProcessor, chosen: np.ndarray | None = None
    ):
        self.rows, self.processor = rows, processor
        self.chosen = np.arange(len(rows)) if chosen is None else chosen
        self.labels_of_rows = np.asarray(rows["label"])
        self.labels = self.labels_of_rows[self.chosen]
        self.features: Features = self.view

    def view(self, row: int, view: int) -> torch.Tensor:
        """Pixels (3, S, S) as the processor makes them; there is but one such view."""
        return pixel_values(self.processor, [self.rows[row]["image"]])[0]

    def identity(self) -> dict[str, Any]:
        """What views depend on beside the images, for JSON."""
        return {"processor": self.processor.image_processor.to_json_string()}

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = int(self.chosen[item])
        return {"images": self.features(row, 0), "labels": int(self.labels[item])}


class TrainingSamples(Views):
    """The samples of one epoch: each image as often as its `repeats`, each with a view of its own.

    What a sample draws depends on seed, epoch and its index alone, so not on workers, processes or
    a restart.

    Args:
        prompt_classes: class index of each prompt of the bank, (P,) int.
        repeats: (R,) how often a balanced epoch has each row, 0: never; default: their own.

    Attributes:
        views: how many augmented views there are of each image; its samples take them in turn. 0:
            each sample draws one of its own.
        epochs_before: those of earlier stages, which `epoch` counts as well.
        patch_dropout: share of the patches' kept states that a sample leaves out.
        with_prompts: whether each sample draws a prompt of its class.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        prompt_classes: Sequence[int],
        augmentation: Augmentation,
        processor: CLIPProcessor,
        seed: int,
        repeats: np.ndarray | None = None,
    ):
        self.balanced = np.asarray(rows["repeats"] if repeats is None else repeats)
        super().__init__(rows, processor, np.flatnonzero(self.balanced))
        of_class = np.asarray(prompt_classes)
        self.prompts_of_class = [np.flatnonzero(of_class == c) for c in np.unique(of_class)]
        self.augmentation = augmentation
        self.side = image_side(processor)
        self.seed = seed
        self.views = self.epoch = self.epochs_before = 0
        self.patch_dropout, self.with_prompts = 0.0, True
        self.sample("balanced")

    def sample(self, sampling: str) -> None:
        """Each image as often as its `repeats` ("balanced"), or once ("natural")."""
        once = np.minimum(self.balanced, 1)
        self.repeats = self.balanced if sampling == "balanced" else once
        self.row_of_sample = np.repeat(np.arange(len(self.rows)), self.repeats)
        first = np.cumsum(self.repeats) - self.repeats  # (rows,) the first sample of each
        self.visit_of_sample = np.arange(len(self)) - first[self.row_of_sample]
        self.labels = self.labels_of_rows[self.row_of_sample]

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer of a stage before each of its epochs."""
        self.epoch = self.epochs_before + epoch

    def view(self, row: int, view: int) -> torch.Tensor:
        """Pixels (3, S, S) of an augmented view, drawn by seed, view and the image's sha256."""
        entry = self.rows[row]
        draw = [self.seed, view, int(entry["sha256"], 16)]
        rng = np.random.default_rng(np.random.SeedSequence(draw, spawn_key=VIEW))
        return self._augmented(entry["image"], rng)

    def identity(self) -> dict[str, Any]:
        """With what the views are drawn by."""
        drawn_by = {"augmentation": self.augmentation.model_dump(mode="json"), "seed": self.seed}
        return super().identity() | drawn_by

    def __len__(self) -> int:
        return len(self.row_of_sample)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        row, label = int(self.row_of_sample[sample]), int(self.labels[sample])
        item: dict[str, Any] = {"labels": label, "samples": sample}
        if self.views:
            turn = self.epoch * self.repeats[row] + self.visit_of_sample[sample]
            item["images"] = self.features(row, int(turn % self.views))
            drops_patches = self.patch_dropout and item["images"].ndim > 1
            if not (drops_patches or self.with_prompts):
                return item  # most of a head's time would go into generators that nobody asks
        rng = np.random.default_rng([self.seed, self.epoch, sample])
        if not self.views:
            item["images"] = self._augmented(self.rows[row]["image"], rng)
        elif drops_patches:
            item["images"] = self._without_patches(item["images"], rng)
        if self.with_prompts:
            item["prompts"] = int(rng.choice(self.prompts_of_class[label]))
        return item

    def _without_patches(self, states: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        patches = len(states) - 1  # the first one is the class token
        kept = rng.permutation(patches)[: round(patches * (1 - self.patch_dropout))]
        return states[[0, *np.sort(kept + 1)]]

    def _augmented(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        view = augment(image.convert("RGB"), self.side, self.augmentation, rng)
        return pixel_values(self.processor, [view], do_resize=False, do_center_crop=False)[0]
