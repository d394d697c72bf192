"""A published model: image in, calibrated labels out, or "not sure", or "outside my domain".

    classifier = NicheClassifier.from_pretrained("you/your-model")
    print(classifier(["photo.jpg"])[0])

Needs only torch, transformers, safetensors, huggingface_hub and Pillow; with an ONNX backend also
onnxruntime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from nicheclip.images import Photo, open_image

SETTINGS_FILE = "nicheclip.json"
PROTOTYPES_FILE = "prototypes.safetensors"  # prototypes, prompt bank, and the shape of the domain
CLASS_MEANS_FILE = "class_means.safetensors"  # of a run
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
# by backend
ONNX_FILES = {"onnx": "onnx/vision_model.onnx", "onnx-int8": "onnx/vision_model_int8.onnx"}


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        probabilities: of the classes, calibrated, falling.
        prediction_set: the classes that hold the right one as often as the model card says, the
            most probable first.
        outside: whether the image looks like none of the domain.
        threshold: below this confidence the answer is "not sure".
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
        among = (
            f", one of: {', '.join(self.prediction_set)}" if len(self.prediction_set) > 1 else ""
        )
        return f"{self.label or 'not sure'} ({self.best} {self.confidence:.0%}{among})"


class VisualTower(torch.nn.Module):
    """The half of a CLIPModel that sees: pixel_values (B, 3, S, S) -> unit-length image_embeds (B, D)."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, D)."""
        image_embeds = self.visual_projection(
            self.vision_model(pixel_values=pixel_values).pooler_output
        )
        return torch.nn.functional.normalize(image_embeds, dim=-1)


class TextTower:
    """The half of a CLIPModel that reads: texts, longer ones cut off -> unit-length text_embeds (M, D)."""

    def __init__(self, model: CLIPModel, tokenizer):
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """M texts -> (M, D)."""
        length = self.model.text_model.config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return torch.nn.functional.normalize(
            self.model.get_text_features(**tokens).pooler_output, dim=-1
        )


class OnnxTower:
    """A `VisualTower` that `python -m model_card RUN --onnx` has exported, run by onnxruntime on the CPU.

    Args:
        threads: of onnxruntime; 0: as many as there are cores.

    Raises:
        ImportError: if onnxruntime is not installed.
    """

    def __init__(self, path: Path, threads: int = 0):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"'{path}' needs onnxruntime, which is not installed; run `pip install "
                "'nicheclip[onnx]'`, or use backend='torch'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, D)."""
        return torch.from_numpy(self.session.run(None, {"pixel_values": pixel_values.numpy()})[0])


class NicheClassifier:
    """A calibrated zero-shot classifier over the classes that the model was fine-tuned for.

    Args:
        tower: pixel_values (B, 3, S, S) -> unit-length image_embeds (B, D), on one device with the
            other tensors.
        logit_scale: that multiplies cosines, with the temperature folded in.
        prototypes: (C, D) unit-length text_embeds of the canonical prompts.
        class_means: of the training images: `whitening` (D, D) and the classes' whitened `means` (C, D).
        settings: the content of nicheclip.json.
        text_tower: M texts -> unit-length text_embeds (M, D), where there is one.
    """

    def __init__(
        self,
        tower: Callable[[torch.Tensor], torch.Tensor],
        logit_scale: float,
        image_processor,
        prototypes: torch.Tensor,
        class_means: dict[str, torch.Tensor],
        settings: dict,
        text_tower: Callable[[Sequence[str]], torch.Tensor] | None = None,
    ):
        self.tower = tower
        self.text_tower = text_tower
        self.logit_scale = logit_scale
        self.image_processor = image_processor
        self.prototypes = prototypes
        self.class_means = class_means
        self.settings = settings
        self.class_names: list[str] = settings["class_names"]
        self.threshold: float = settings["abstention"]["threshold"]

    @classmethod
    def from_pretrained(
        cls, repo_or_path: str | Path, revision: str | None = None, backend: str = "torch"
    ) -> NicheClassifier:
        """Loads a folder made by `python -m model_card`, or a repository of the Hub.

        Args:
            backend: what runs the visual tower: "torch", "onnx", or "onnx-int8" (smaller, faster,
                nearly the same).

        Raises:
            FileNotFoundError: if it is a CLIP model, but not one of NicheCLIP's; or if it has no
                ONNX tower.
            ImportError: for an ONNX backend, if onnxruntime is not installed.
            ValueError: if another version of NicheCLIP has published it, or the backend is unknown.
        """
        if backend not in ("torch", *ONNX_FILES):
            raise ValueError(
                f"backend is '{backend}'; expected 'torch' or one of "
                f"{', '.join(map(repr, ONNX_FILES))}"
            )
        folder = Path(repo_or_path)
        if not folder.is_dir():
            tower_file = ONNX_FILES.get(backend, "model*.safetensors*")
            patterns = ["*.json", "*.txt", PROTOTYPES_FILE, tower_file]
            folder = Path(
                snapshot_download(str(repo_or_path), revision=revision, allow_patterns=patterns)
            )
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(
                f"'{repo_or_path}' has no {SETTINGS_FILE}; expected a model published by "
                "NicheCLIP (for another CLIP model, use transformers' "
                "zero-shot-image-classification pipeline)"
            )
        settings = _read_settings(folder / SETTINGS_FILE)
        embeds, text_tower = load_file(folder / PROTOTYPES_FILE), None
        tower: VisualTower | OnnxTower
        if backend == "torch":
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
            tower, logit_scale = VisualTower(model), model.logit_scale.exp().item()
            text_tower = TextTower(model, AutoTokenizer.from_pretrained(folder))
        elif not (folder / ONNX_FILES[backend]).is_file():
            raise FileNotFoundError(
                f"'{repo_or_path}' has no {ONNX_FILES[backend]}; use backend='torch', or build it "
                "anew with `python -m model_card RUN --onnx` (it leaves INT8 out where that "
                "costs too much: onnx/report.json)"
            )
        else:
            tower = OnnxTower(folder / ONNX_FILES[backend])
            logit_scale = math.exp(settings["trained_logit_scale"]) / settings["temperature"]
        return cls(
            tower,
            logit_scale,
            AutoImageProcessor.from_pretrained(folder),
            embeds["prototypes"],
            embeds,
            settings,
            text_tower,
        )

    @torch.inference_mode()
    def image_embeds(self, images: Sequence[Photo]) -> torch.Tensor:
        """Unit-length image_embeds (N, D), of the same kinds of images as `__call__` takes.

        Raises:
            OSError: naming the image that can't be read.
            ValueError: for an address.
        """
        pixel_values = self.image_processor(
            [open_image(image) for image in images], return_tensors="pt"
        )["pixel_values"]
        return self.tower(pixel_values)

    @torch.inference_mode()
    def text_embeds(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit-length text_embeds (M, D), to look for images by words.

        Raises:
            ValueError: of an ONNX backend, which has the visual tower only.
        """
        if self.text_tower is None:
            raise ValueError(
                "an ONNX backend has no text tower; load the model with backend='torch'"
            )
        return self.text_tower(texts)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Photo]) -> np.ndarray:
        """Calibrated probabilities (N, C), classes in the order of `class_names`."""
        return self._logits(self.image_embeds(images)).softmax(dim=-1).cpu().numpy()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Photo]) -> list[Prediction]:
        """Classifies a batch of images: paths, PIL images, bytes of files, or uint8 arrays (H, W, 3) or (H, W).

        Raises:
            TypeError: if it is given one image instead of a list.
            PIL.UnidentifiedImageError: if a file is no image.
        """
        if isinstance(images, Photo):
            raise TypeError(
                "expected a list of images; put the image into a list: classifier([image])[0]"
            )
        return self.answer(self.image_embeds(images))

    @torch.inference_mode()
    def answer(self, image_embeds: torch.Tensor) -> list[Prediction]:
        """Classifies images by their image_embeds (N, D)."""
        logits = self._logits(image_embeds)
        inside = (
            self._domain_score(image_embeds, logits) >= self.settings["ood"]["threshold"]
        ).tolist()
        probabilities = logits.softmax(dim=-1).cpu().numpy()
        return [
            self._prediction(row, is_inside)
            for row, is_inside in zip(probabilities, inside, strict=True)
        ]

    def _logits(self, image_embeds: torch.Tensor) -> torch.Tensor:
        return self.logit_scale * image_embeds @ self.prototypes.T

    def _domain_score(self, image_embeds: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How much each image looks like one of the domain, (N,), by the score that calibrate.py has found best."""
        match self.settings["ood"]["score"]:
            case "confidence":
                return logits.softmax(dim=-1).amax(dim=-1)
            case "energy":
                return logits.logsumexp(dim=-1)
            case "prompt_cosine":
                return (image_embeds @ self.prototypes.T).amax(dim=-1)
            case "mahalanobis":
                return -torch.cdist(
                    image_embeds @ self.class_means["whitening"], self.class_means["means"]
                ).amin(dim=-1)
        raise ValueError(
            f"{SETTINGS_FILE}: ood.score is '{self.settings['ood']['score']}', which is unknown"
        )

    def _prediction(self, probabilities: np.ndarray, inside: bool) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        falling = probabilities[order]
        size = int((np.cumsum(falling) - falling <= self.settings["conformal"]["quantile"]).sum())
        names = [self.class_names[index] for index in order]
        found = dict(zip(names, falling.tolist(), strict=True))
        return Prediction(found, names[:size], not inside, self.threshold)


def _read_settings(path: Path) -> dict:
    """nicheclip.json, if it is one that this version reads.

    Raises:
        ValueError: naming the field and what was expected.
    """
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
            "model anew (calibrate.py, then python -m model_card), or install the NicheCLIP that "
            "made it"
        )
    for name, kind in SETTINGS.items():
        value = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(
            value, bool
        ):
            raise ValueError(
                f"'{path}': {name} is {value!r}, expected a {kind.__name__}; fetch or build it anew"
            )
    return settings
