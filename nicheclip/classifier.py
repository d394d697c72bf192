"""A published model: image in, calibrated labels out, or "not sure", or "outside my domain".

    classifier = NicheClassifier.from_pretrained("you/your-model")
    print(classifier(["photo.jpg"])[0])

Needs torch, transformers, safetensors, huggingface_hub and Pillow; an ONNX backend onnxruntime.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.numpy import load_file
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import VisualTower, encode_texts
from nicheclip.head import SCORES, Head, prediction_sets
from nicheclip.images import Photo, open_image

SETTINGS_FILE = "nicheclip.json"
PROTOTYPES_FILE = "prototypes.safetensors"  # prototypes, prompt bank, class means and precision
FORMAT_VERSION = 3
SETTINGS = {  # what is read of nicheclip.json
    "class_names": list,
    "prompts": dict,
    "temperature": float,
    "trained_logit_scale": float,
    "abstention.threshold": float,
    "conformal.quantile": float,
    "ood.score": str,
    "ood.threshold": float,
}
ONNX_FILES = {"onnx": "onnx/vision_model.onnx", "onnx-int8": "onnx/vision_model_int8.onnx"}


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    The `probabilities` are calibrated and fall; the `prediction_set` holds the right class as often
    as the model card says, the most probable first; an image that is `outside` looks like none of
    the domain; below a confidence of `threshold` the answer is "not sure".
    """

    probabilities: dict[str, float]
    prediction_set: list[str]
    outside: bool
    threshold: float

    @property
    def best(self) -> str:
        """The most probable class, sure or not."""
        return next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        """The probability of the best class."""
        return self.probabilities[self.best]

    @property
    def label(self) -> str | None:
        """The best class; None where the image is outside of the domain, or the model not sure."""
        return self.best if self.confidence >= self.threshold and not self.outside else None

    def __str__(self) -> str:
        if self.outside:
            return "outside my domain"
        several = len(self.prediction_set) > 1
        among = f", one of: {', '.join(self.prediction_set)}" if several else ""
        return f"{self.label or 'not sure'} ({self.best} {self.confidence:.0%}{among})"


@dataclass(eq=False, repr=False)
class NicheClassifier:
    """A calibrated zero-shot classifier over the classes that the model was fine-tuned for."""

    # pixel_values (B, 3, S, S) -> unit-length image_embeds (B, D)
    tower: Callable[[torch.Tensor], torch.Tensor]
    head: Head
    image_processor: Any
    settings: dict[str, Any]  # the content of nicheclip.json
    # M texts -> unit-length text_embeds (M, D), where there is one
    text_tower: Callable[[list[str]], torch.Tensor] | None = None

    @property
    def class_names(self) -> list[str]:
        """In the order of the class indices."""
        return self.settings["class_names"]

    @classmethod
    def from_pretrained(
        cls, repo_or_path: str | Path, revision: str | None = None, backend: str = "torch"
    ) -> Self:
        """Loads a folder made by `python -m model_card`, or a repository of the Hub.

        Args:
            backend: of the visual tower: "torch", "onnx", or "onnx-int8" (faster, nearly the same).

        Raises:
            FileNotFoundError: if it is a CLIP model, but not one of NicheCLIP's; or if it has no
                ONNX tower.
            ImportError: for an ONNX backend, if onnxruntime is not installed.
            ValueError: if another version of NicheCLIP has published it, or the backend is unknown.
        """
        if backend not in ("torch", *ONNX_FILES):
            raise ValueError(f"backend is '{backend}'; expected 'torch', 'onnx' or 'onnx-int8'")
        folder = Path(repo_or_path)
        if not folder.is_dir():
            tower_file = ONNX_FILES.get(backend, "model*.safetensors*")
            patterns = ["*.json", "*.txt", PROTOTYPES_FILE, tower_file]
            wanted: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
            folder = Path(snapshot_download(str(repo_or_path), **wanted))
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(
                f"'{repo_or_path}' has no {SETTINGS_FILE}; expected a model published by NicheCLIP "
                "(others: transformers' zero-shot-image-classification pipeline)"
            )
        settings = _read_settings(folder / SETTINGS_FILE)
        embeds = load_file(folder / PROTOTYPES_FILE)
        scales = settings["trained_logit_scale"], settings["temperature"]
        head = Head(embeds["prototypes"], embeds, *scales)
        processor = CLIPProcessor.from_pretrained(folder)
        if backend == "torch":
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
            text_tower = partial(encode_texts, model, processor)
            return cls(VisualTower(model), head, processor.image_processor, settings, text_tower)
        path = folder / ONNX_FILES[backend]
        if not path.is_file():
            raise FileNotFoundError(
                f"'{path}' is missing; use backend='torch', or `python -m model_card RUN --onnx` "
                "(it leaves INT8 out where that costs too much: onnx/report.json)"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"'{path}' needs onnxruntime: `pip install 'nicheclip[onnx]'`, or use "
                "backend='torch'"
            ) from error
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def tower(pixels: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])

        return cls(tower, head, processor.image_processor, settings)

    @torch.inference_mode()
    def image_embeds(self, images: Sequence[Photo]) -> torch.Tensor:
        """Unit-length image_embeds (N, D) of what `open_image` takes, and refuses, as an image."""
        pictures = [open_image(image) for image in images]
        return self.tower(self.image_processor(pictures, return_tensors="pt")["pixel_values"])

    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit-length text_embeds (M, D), to look for images by words.

        Raises:
            ValueError: of an ONNX backend, which has the visual tower only.
        """
        if self.text_tower is None:
            raise ValueError("ONNX has no text tower; load the model with backend='torch'")
        return self.text_tower(list(texts))

    def probabilities(self, images: Sequence[Photo]) -> np.ndarray:
        """Calibrated probabilities (N, C), classes in the order of `class_names`."""
        return self.head.probabilities(self.image_embeds(images).numpy())

    def __call__(self, images: Sequence[Photo]) -> list[Prediction]:
        """Classifies paths, PIL images, bytes of files, or uint8 arrays (H, W, 3) or (H, W).

        Raises:
            TypeError: if it is given one image instead of a list.
            OSError: if a file is no image.
        """
        if isinstance(images, Photo):
            raise TypeError("expected a list of images, as in classifier([image])[0]")
        return self.predict(self.image_embeds(images).numpy())

    def predict(self, image_embeds: np.ndarray) -> list[Prediction]:
        """Classifies images by their image_embeds (N, D)."""
        probabilities = self.head.probabilities(image_embeds)
        included = prediction_sets(probabilities, self.settings["conformal"]["quantile"])
        scores = self.head.ood_scores(image_embeds)[self.settings["ood"]["score"]]
        outside = scores < self.settings["ood"]["threshold"]
        threshold, predictions = self.settings["abstention"]["threshold"], []
        for row, own, is_outside in zip(probabilities, included, outside.tolist(), strict=True):
            order = np.argsort(-row, kind="stable")
            found = {self.class_names[index]: float(row[index]) for index in order}
            named = [self.class_names[index] for index in order if own[index]]
            predictions.append(Prediction(found, named, is_outside, threshold))
        return predictions


def _read_settings(path: Path) -> dict[str, Any]:
    """nicheclip.json, if it is one that this version reads."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        version = settings["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is damaged or no file of NicheCLIP's ({error!r}); fetch or build it anew"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' is of format {version}, this NicheCLIP reads {FORMAT_VERSION}; publish the "
            "model anew (calibrate.py, model_card), or install the NicheCLIP that made it"
        )
    for name, kind in SETTINGS.items():
        value = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"'{path}': {name} is {value!r}, expected a {kind.__name__}; fetch or build it anew"
            )
    if settings["ood"]["score"] not in SCORES:
        score = settings["ood"]["score"]
        raise ValueError(f"'{path}': ood.score is '{score}'; expected one of {', '.join(SCORES)}")
    return settings
