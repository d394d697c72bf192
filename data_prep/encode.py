"""image_embeds of the stored images, from the base model, in shards."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from transformers import CLIPModel, CLIPProcessor

from nicheclip.cached_map import map_shards, stored_digests, weights_digest
from nicheclip.clip import encode_images, fast_dtype


def encode_rows(
    model: CLIPModel,
    processor: CLIPProcessor,
    rows: datasets.Dataset,
    cache: Path,
) -> np.ndarray:
    """Unit-length image_embeds (N, D) float32 of the rows, by bfloat16 where that is fast."""
    dtype = fast_dtype(model.device)

    def encode(shard: datasets.Dataset) -> datasets.Dataset:
        images = (row["image"] for row in shard.cast_column("image", datasets.Image()))
        image_embeds = encode_images(
            model, processor, images, len(shard), dtype=dtype, progress=False
        )
        features = datasets.Features(
            {"image_embeds": datasets.List(datasets.Value("float32"), image_embeds.shape[1])}
        )
        return datasets.Dataset.from_dict({"image_embeds": image_embeds}, features=features)

    settings = (
        f"{weights_digest(model.state_dict())} {processor.image_processor.to_json_string()} {dtype}"
    )
    encoded = map_shards(
        rows.select_columns("image"),
        encode,
        stored_digests(rows),
        settings,
        cache,
        "encoding with the base model",
    )
    return np.concatenate(
        [batch["image_embeds"] for batch in encoded.with_format("numpy").iter(4096)]
    )
