"""A published model: image in, calibrated labels out, or "not sure".

    classifier = NicheClassifier.from_pretrained("you/your-model")
    print(classifier(["photo.jpg"])[0])

Needs only torch, transformers, safetensors, huggingface_hub and Pillow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel

SETTINGS_FILE = "nicheclip.json"
PROTOTYPES_FILE = "prototypes.safetensors"


@dataclass(frozen=True)
class Prediction:
    """The classes by falling calibrated probability; `label` is None where the best is below the threshold."""

    probabilities: dict[str, float]
    threshold: float

    @property
    def best(self) -> str:
        return next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        return self.probabilities[self.best]

    @property
    def label(self) -> str | None:
        return self.best if self.confidence >= self.threshold else None

    def __str__(self) -> str:
        return f"{self.label or 'not sure'} ({self.best} {self.confidence:.0%})"


class NicheClassifier:
    """A calibrated zero-shot classifier over the classes that the model was fine-tuned for.

    Args:
        model: whose logit_scale has the temperature folded in.
        prototypes: (C, D) unit-length text_embeds of the canonical prompts.
        settings: the content of nicheclip.json.
    """

    def __init__(self, model: CLIPModel, image_processor, prototypes: torch.Tensor, settings: dict):
        self.model = model.eval()
        self.image_processor = image_processor
        self.prototypes = prototypes.to(model.device)
        self.settings = settings
        self.class_names: list[str] = settings["class_names"]
        self.threshold: float = settings["abstention"]["threshold"]

    @classmethod
    def from_pretrained(cls, repo_or_path: str | Path, revision: str | None = None) -> NicheClassifier:
        """Loads a folder made by `python -m model_card`, or a repository of the Hub.

        Raises:
            FileNotFoundError: if it is a CLIP model, but not one of NicheCLIP's.
        """
        folder = Path(repo_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(repo_or_path), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt"]
                )
            )
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(
                f"'{repo_or_path}' has no {SETTINGS_FILE}; expected a model published by NicheCLIP "
                "(for another CLIP model, use transformers' zero-shot-image-classification pipeline)"
            )
        return cls(
            CLIPModel.from_pretrained(folder, dtype=torch.float32),
            AutoImageProcessor.from_pretrained(folder),
            load_file(folder / PROTOTYPES_FILE)["prototypes"],
            json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")),
        )

    @torch.inference_mode()
    def image_embeds(self, images: Sequence[str | Path | Image.Image]) -> torch.Tensor:
        """Unit-length image_embeds (N, D) of paths or PIL images."""
        pixel_values = self.image_processor([_open(image) for image in images], return_tensors="pt")["pixel_values"]
        image_embeds = self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(image_embeds, dim=-1)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[str | Path | Image.Image]) -> np.ndarray:
        """Calibrated probabilities (N, C), classes in the order of `class_names`."""
        logits = self.model.logit_scale.exp() * self.image_embeds(images) @ self.prototypes.T
        return logits.softmax(dim=-1).cpu().numpy()

    def __call__(self, images: Sequence[str | Path | Image.Image]) -> list[Prediction]:
        """Classifies a batch of paths or PIL images.

        Raises:
            TypeError: if it is given one image instead of a list.
            PIL.UnidentifiedImageError: if a file is no image.
        """
        if isinstance(images, (str, Path, Image.Image)):
            raise TypeError("expected a list of images; put the image into a list: classifier([image])[0]")
        return [
            Prediction({self.class_names[index]: float(row[index]) for index in np.argsort(-row)}, self.threshold)
            for row in self.probabilities(images)
        ]


def _open(image: str | Path | Image.Image) -> Image.Image:
    opened = image if isinstance(image, Image.Image) else Image.open(image)
    return ImageOps.exif_transpose(opened).convert("RGB")
