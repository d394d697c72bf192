"""What the frozen part of the visual tower makes of each view, encoded once, read at every use.

It lies in shards of Arrow, memory-mapped, in float16. A shard's name says what it
depends on: weights before the cut, transforms, seed, views, stored images. So a stale one is never
read, an interrupted encoding goes on where it was, and several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from nicheclip.cached_map import map_shards, stored_digests, weights_digest
from nicheclip.clip import prefetched
from nicheclip.training.data import Views
from nicheclip.training.towers import PIXELS, VisionTower, pooled, weights_before

BATCH = 64  # views encoded at once
KEPT_AS = np.float16  # half the disk; in training no difference was seen (docs/lab_notebook.md)


class Features:
    """States of views at a cut: features(row, view) is (T, D), or (D,) of the pooled cut."""

    def __init__(self, encoded: datasets.Dataset, rows: int, shape: tuple[int, ...]):
        chunks = encoded.data.column("states").chunks
        self._parts = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape) for chunk in chunks
        ]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._rows = rows

    def __call__(self, row: int, view: int) -> np.ndarray:
        """The states of one view, in a copy of its own."""
        index = view * self._rows + row
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - self._starts[part]].copy()


def encode_views(
    tower: VisionTower,
    views: Views,
    count: int,
    cuts: Sequence[int],
    cache: Path,
    autocast: torch.dtype = torch.float32,
) -> Features | None:
    """The states at the last of `cuts`, each worked out from those at the cut before it.

    Args:
        count: views of each image.
        cuts: rising; the states at each of them are kept.
        cache: a folder of their own for these views; what lies there of others is removed.
        autocast: of the arithmetic.

    Returns:
        features(row, view) of every row of `views.rows` and every view below `count`; None if there
        are no cuts.

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
    features, start = None, PIXELS
    for cut in cuts:
        made_of += [str(cut), weights_digest(weights_before(tower, cut))]
        shape = _shape(tower, cut)
        encoded = map_shards(
            places,
            _Encode(tower, views, features, start, cut, autocast),
            identity,
            hashlib.sha256("\n".join(made_of).encode()).hexdigest(),
            cache / ("pooled" if cut == pooled(tower) else f"after-block-{cut}"),
            f"encoding views (--cached_views {count})" if count > 1 else "encoding",
            bytes_per_row=int(np.prod(shape)) * np.dtype(KEPT_AS).itemsize,
        )
        features, start = Features(encoded, rows, shape), cut
    return features


class _Encode:
    """A shard of places (row, view) -> their states at `cut`."""

    def __init__(
        self,
        tower,
        views,
        before: Features | None,
        start: int,
        cut: int,
        autocast: torch.dtype,
    ):
        self.tower, self.views, self.before = tower, views, before
        self.start, self.cut, self.autocast = start, cut, autocast

    @torch.inference_mode()
    def __call__(self, places: datasets.Dataset) -> datasets.Dataset:
        device = self.tower.post_layernorm.weight.device
        states = []
        for batch in prefetched(self._batches(places)):
            with torch.autocast(device.type, self.autocast, enabled=self.autocast != torch.float32):
                encoded = self.tower.between(batch.to(device).float(), self.start, self.cut)
            with np.errstate(over="ignore"):  # an overflow is told below
                states.append(encoded.float().cpu().numpy().astype(KEPT_AS))
        joined = np.concatenate(states).reshape(len(places), -1)
        if not np.isfinite(joined).all():
            raise FloatingPointError(
                f"the visual tower's states are not finite in {np.dtype(KEPT_AS)}; train with "
                "--cached_views 0"
            )
        column = pa.FixedSizeListArray.from_arrays(pa.array(joined.ravel()), joined.shape[1])
        return datasets.Dataset(pa.table({"states": column}))

    def _batches(self, places: datasets.Dataset) -> Iterator[torch.Tensor]:
        for batch in places.iter(BATCH):
            at = list(zip(batch["row"], batch["view"], strict=True))
            if self.before is None:
                yield torch.stack([self.views.view(row, view) for row, view in at])
            else:
                yield torch.from_numpy(np.stack([self.before(row, view) for row, view in at]))


def _shape(tower: VisionTower, cut: int) -> tuple[int, ...]:
    width = tower.config.hidden_size
    return (width,) if cut == pooled(tower) else (tower.embeddings.num_positions, width)
