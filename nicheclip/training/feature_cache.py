"""What the frozen part of the visual tower makes of each view: encoded once, read at every use.

It lies in shards of Arrow, memory-mapped, in float16. A shard's name says what it depends on:
weights before the cut, transforms, seed, views, stored images. So a stale one is never read, an
interrupted encoding goes on where it was, and several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import CLIPVisionModel

from nicheclip.cached_map import map_shards, stored_digests, weights_digest
from nicheclip.clip import prefetched
from nicheclip.training.data import Features, Views
from nicheclip.training.towers import PIXELS, between, depth, weights_before

BATCH = 64  # views encoded at once
KEPT_AS = np.float16  # half the disk; in training no difference was seen (docs/lab_notebook.md)


def encode_views(
    tower: CLIPVisionModel,
    views: Views,
    count: int,
    cuts: Sequence[int],
    cache: Path,
    autocast: torch.dtype | None = None,
) -> Features:
    """The states at the last of `cuts`, each worked out from those at the cut before it.

    Args:
        count: views of each image.
        cuts: rising; the states at each of them are kept.
        cache: a folder of their own for these views; what lies there of others is removed.
        autocast: of the arithmetic; None: float32.

    Returns:
        features(row, view) of every row of `views.rows` and every view below `count`, (T, D), or
        (D,) at the tower's depth; without cuts, pixels.

    Raises:
        OSError: if there is no room for them on the disk; nothing has been written then.
        FloatingPointError: if states are not finite in float16.
    """
    rows = len(views.rows)
    places = datasets.Dataset.from_dict(
        {"row": np.tile(np.arange(rows), count), "view": np.repeat(np.arange(count), rows)}
    )
    images = stored_digests(views.rows)
    identity = [f"{images[row]} {view}" for view in range(count) for row in range(rows)]
    made_of = [json.dumps(views.identity(), sort_keys=True), np.dtype(KEPT_AS).name, str(autocast)]
    features: Features = views.view
    start = PIXELS
    for cut in cuts:
        made_of += [str(cut), weights_digest(weights_before(tower, cut))]
        width, length = tower.config.hidden_size, tower.embeddings.num_positions
        shape = (width,) if cut == depth(tower) else (length, width)
        encoded = map_shards(
            places,
            partial(
                _encode, tower=tower, features=features, start=start, cut=cut, autocast=autocast
            ),
            identity,
            hashlib.sha256("\n".join(made_of).encode()).hexdigest(),
            cache / f"after-block-{cut}",
            f"encoding views (--cached_views {count})" if count > 1 else "encoding",
            bytes_per_row=int(np.prod(shape)) * np.dtype(KEPT_AS).itemsize,
        )
        # No closure: it travels to the workers of a DataLoader.
        features, start = partial(_states, encoded.data.column("states"), rows, shape), cut
    return features


def _states(
    column: pa.ChunkedArray, rows: int, shape: tuple[int, ...], row: int, view: int
) -> torch.Tensor:
    """Those of (row, view), in a copy of its own."""
    states = column[view * rows + row].values.to_numpy()
    return torch.from_numpy(states.reshape(shape).copy())


@torch.inference_mode()
def _encode(
    places: datasets.Dataset,
    tower: CLIPVisionModel,
    features: Features,
    start: int,
    cut: int,
    autocast: torch.dtype | None,
) -> datasets.Dataset:
    """The states at `cut`, flattened, from those at `start`."""
    batches = (
        torch.stack([features(*place) for place in zip(batch["row"], batch["view"], strict=True)])
        for batch in places.iter(BATCH)
    )
    device, states = tower.post_layernorm.weight.device, []
    for batch in prefetched(batches):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            encoded = between(tower, batch.to(device).float(), start, cut)
        with np.errstate(over="ignore"):  # an overflow is told below
            states.append(encoded.float().flatten(1).cpu().numpy().astype(KEPT_AS))
    joined = np.concatenate(states)
    if not np.isfinite(joined).all():
        raise FloatingPointError(
            f"the visual tower's states are not finite in {np.dtype(KEPT_AS)}; train with "
            "--cached_views 0"
        )
    column = pa.FixedSizeListArray.from_arrays(pa.array(joined.ravel()), joined.shape[1])
    return datasets.Dataset(pa.table({"states": column}))
