"""A CLIPModel as a zero-shot classifier.

Prompts -> class prototypes (C, D), images -> image_embeds (N, D), both -> logits (N, C).
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor

from nicheclip.images import to_rgb

PROMPTS_AT_ONCE = 256


def load_clip(base: str | Path) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIPModel in float32 and its processor, from a folder or the Hub.

    Raises:
        OSError: if neither a folder nor a repository of that name can be read.
    """
    try:
        model = CLIPModel.from_pretrained(base, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(base)
    except OSError as error:
        raise OSError(
            f"can't load a CLIP model from '{base}': expected a folder written by save_pretrained "
            "or a Hub id such as openai/clip-vit-base-patch32; check `base` in the domain file, "
            f"and the network ({error})"
        ) from error
    # a wrapper of transformers' hides self
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor  # type: ignore[arg-type]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it, else float32."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32


@torch.inference_mode()
def encode_texts(model: CLIPModel, processor: CLIPProcessor, prompts: list[str]) -> torch.Tensor:
    """Unit-length text_embeds (P, D), on the model's device."""
    parts = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        tokens = processor.tokenizer(
            prompts[start : start + PROMPTS_AT_ONCE],
            padding=True,  # to the longest prompt only
            truncation=True,
            max_length=77,
            return_tensors="pt",
        ).to(model.device)
        parts.append(model.get_text_features(**tokens).pooler_output.float())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


class VisualTower(torch.nn.Module):
    """The half of a CLIPModel that sees: pixel_values (B, 3, S, S) -> unit image_embeds (B, D).

    Args:
        pooled: gives the pooled features (B, F) before the projection instead.
    """

    def __init__(self, model: CLIPModel, pooled: bool = False):
        super().__init__()
        self.pooled = pooled
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, D)."""
        features = self.vision_model(pixel_values).pooler_output
        return features.float() if self.pooled else self.project(features)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, F) -> unit-length image_embeds (B, D)."""
        return torch.nn.functional.normalize(self.visual_projection(features).float(), dim=-1)


@torch.inference_mode()
def encode_images(
    model: CLIPModel,
    processor: CLIPProcessor,
    images: Iterable[Image.Image],
    total: int,
    batch_size: int = 64,
    description: str = "encoding",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    pooled: bool = False,
) -> np.ndarray:
    """Unit-length image_embeds (N, D) float32 of `total` images, read batch by batch.

    Args:
        pooled: as for `VisualTower`.
        dtype: of the arithmetic; bfloat16 goes through autocast.
        progress: whether to show a progress bar.
    """
    parts, tower, source = [], VisualTower(model, pooled), iter(images)
    batches = iter(lambda: list(islice(source, batch_size)), [])
    with tqdm(total=total, desc=description, unit="img", leave=False, disable=not progress) as bar:
        for pixels in prefetched(pixel_values(processor, batch) for batch in batches):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                parts.append(tower(pixels.to(model.device)).cpu().numpy())
            bar.update(len(pixels))
    return np.concatenate(parts)


def zero_shot_logits(
    model: CLIPModel, image_embeds: np.ndarray, text_embeds: torch.Tensor
) -> np.ndarray:
    """exp(logit_scale) x cosine: (N, D) and (C, D) -> (N, C) float32."""
    return model.logit_scale.exp().item() * image_embeds @ text_embeds.cpu().numpy().T


def pixel_values(
    processor: CLIPProcessor, images: Sequence[Image.Image], **options: Any
) -> torch.Tensor:
    """(B, 3, S, S) as the processor makes them, with `options` of its own."""
    pictures = [to_rgb(image) for image in images]
    return processor.image_processor(pictures, return_tensors="pt", **options)["pixel_values"]


def prefetched(items: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The items, each made in another thread while the one before it is worked on."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = maker.submit(next, items, None)
            yield item


def token_lists(processor: CLIPProcessor, prompts: list[str]) -> list[list[int]]:
    """The tokens of each prompt, from its start to its end."""
    return processor.tokenizer(prompts, truncation=True, max_length=77)["input_ids"]


def image_side(processor: CLIPProcessor) -> int:
    """The side of the square image that the model sees, in pixels."""
    return processor.image_processor.crop_size["height"]
