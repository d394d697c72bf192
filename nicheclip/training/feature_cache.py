"""What the frozen part of the visual tower makes of each view: encoded once, read at every use.

It lies in shards of Arrow, memory-mapped, in float16. A shard's name says what it depends on:
weights before the cut, transforms, seed, views, stored images. So a stale one is never read, an
interrupted encoding goes on where it was, and several processes share the work.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import CLIPModel, CLIPVisionModel

from nicheclip.cached_map import map_shards, stored_digests, weights_digest
from nicheclip.clip import prefetched
from nicheclip.evaluation.probe import Part
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.data import Features, TrainingSamples, Views
from nicheclip.training.lda import discriminants
from nicheclip.training.towers import PIXELS, between, depth, weights_before

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ENOUGH = 20_000  # views of images for a discriminant analysis
BATCH = 64  # views encoded at once
KEPT_AS = np.float16  # half the disk; in training no difference was seen (docs/lab_notebook.md)


class StageFeatures:
    """What stages see of the images: states at a cut, or pixels.

    Args:
        model: as it is before anything is trained.
        train, validation: their `features` are set.
        first_cut: what no stage trains lies before it, and is encoded for all stages at once.
        args: `cached_views` of each training image are kept in `feature_cache`; 0: none, each
            sample draws one of its own.
    """

    def __init__(
        self,
        model: CLIPModel,
        train: TrainingSamples,
        validation: Views,
        first_cut: int,
        args: StagedTrainingArguments,
    ):
        self.model, self.train, self.validation = model, train, validation
        self.first_cut, self.views = first_cut, args.cached_views
        self.later: Path | None = None  # where states lie that depend on what has been trained
        self.own_folder = Path(args.output_dir) / "features"
        self.folder = Path(args.feature_cache or self.own_folder)
        self.autocast = AUTOCAST[args.precision]
        self.num_classes = train.rows.features["label"].num_classes
        self.seconds = 0.0
        self.projection = model.visual_projection.weight.detach().cpu().numpy().copy()

    def show(self, cut: int, with_train: bool = True, with_validation: bool = True) -> None:
        """Encodes the images that are asked for up to a cut."""
        cuts = sorted({self.first_cut, cut} - {PIXELS}) if self.views else []
        self.train.views = self.views if cuts else 0
        if with_train:
            self._encode("train", self.train, self.train.views, cuts)
        if with_validation:
            self._encode("validation", self.validation, 1, cuts)

    def _encode(self, name: str, images: Views, count: int, cuts: list[int]) -> None:
        started = time.perf_counter()
        self.model.eval()  # what is kept must not depend on a draw of dropout
        tower, cache = self.model.vision_model, self.folder / name
        later = self.later and self.later / name
        images.features = encode_views(tower, images, count, cuts, cache, self.autocast, later)
        self.seconds += time.perf_counter() - started

    @cached_property
    def of_base(self) -> tuple[Part, Part]:
        """Pooled features and labels of the base: of the views of train, and of validation.

        Without validation's rows in train, where it trains on them as well. To be asked for before
        anything is trained.
        """
        end, count = depth(self.model.vision_model), max(1, self.views)
        cuts = sorted({self.first_cut, end} - {PIXELS})
        of_train = self.train.chosen
        if self.train.rows is self.validation.rows:
            of_train = np.setdiff1d(of_train, self.validation.chosen)
        parts = []
        for name, images, chosen, views in (
            ("train", self.train, of_train, count),
            ("validation", self.validation, self.validation.chosen, 1),
        ):
            self._encode(name, images, views, cuts)
            of_views = [self._pooled(images, chosen, view) for view in range(views)]
            labels = np.tile(images.labels_of_rows[chosen], views)
            parts.append((np.concatenate(of_views), labels))
        return parts[0], parts[1]

    @torch.inference_mode()
    def _pooled(self, images: Views, rows: np.ndarray, view: int) -> np.ndarray:
        norm = self.model.vision_model.post_layernorm
        states = torch.stack([images.features(row, view) for row in rows.tolist()])
        return norm(states.to(norm.weight)).cpu().numpy()

    @cached_property
    def discriminants(self) -> dict[str, np.ndarray]:
        """The analysis of the base's features that `start: lda` begins with."""
        (features, labels), validation = self.of_base
        images = len(labels) // max(1, self.views)
        enough = images * max(1, ENOUGH // images)  # whole views
        features, labels = features[:enough], labels[:enough]
        embeds = features @ self.projection.T
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        return discriminants((features, labels), validation, embeds, self.num_classes)

    def record(self) -> dict[str, Any]:
        """For training.json."""
        kept = [path.stat().st_size for path in self.folder.rglob("*.arrow")]
        views = self.views if kept else 0
        return {
            "views": views,
            "encoded": views * len(self.train.rows),
            "bytes": sum(kept),
            "seconds": round(self.seconds, 1),
        }


def encode_views(
    tower: CLIPVisionModel,
    views: Views,
    count: int,
    cuts: Sequence[int],
    cache: Path,
    autocast: torch.dtype | None = None,
    later: Path | None = None,
) -> Features:
    """The states at the last of `cuts`, each worked out from those at the cut before it.

    Args:
        count: views of each image.
        cuts: rising; the states at each of them are kept.
        cache: a folder of their own for these views; what lies there of others is removed.
        autocast: of the arithmetic; None: float32.
        later: a folder for the states after the first of the cuts, if it is another one.

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
            (later if later and cut != cuts[0] else cache) / f"after-block-{cut}",
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
