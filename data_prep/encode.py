"""image_embeds of the stored images, from the base model, in shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from data_prep.shards import map_shards
from nicheclip.zero_shot import encode_images


def encode_rows(
    model: CLIPModel, processor: CLIPProcessor, rows: datasets.Dataset, cache: Path, description: str
) -> np.ndarray:
    """Unit-length image_embeds (N, D) float32 of the rows' images, in bfloat16 where that is fast."""
    dtype = fast_dtype(model.device)

    def encode(shard: datasets.Dataset) -> datasets.Dataset:
        images = (row["image"] for row in shard.cast_column("image", datasets.Image()))
        image_embeds = encode_images(model, processor, images, len(shard), dtype=dtype, progress=False)
        features = datasets.Features({"image_embeds": datasets.List(datasets.Value("float32"), image_embeds.shape[1])})
        return datasets.Dataset.from_dict({"image_embeds": image_embeds}, features=features)

    settings = f"{_weights_digest(model)} {processor.image_processor.to_json_string()} {dtype}"
    rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    stored = [hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows]
    encoded = map_shards(rows, encode, stored, settings, cache, description)
    return np.concatenate([batch["image_embeds"] for batch in encoded.with_format("numpy").iter(4096)])


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it, else float32."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32


def _weights_digest(model: CLIPModel) -> str:
    digest = hashlib.sha256()
    for name, weights in model.state_dict().items():
        digest.update(f"{name} {tuple(weights.shape)}\n".encode())
        digest.update(weights.cpu().contiguous().numpy())
    return digest.hexdigest()
