"""Images that can be searched by words or by a photo: one Parquet file with their image_embeds.

    index = ImageIndex(folder / INDEX_FILE)
    for found in index.nearest(classifier.text_embeds(["a house with pointed arches"]), 5)[0]: ...

Published only by option, since the images go along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from tqdm.auto import tqdm

from nicheclip.classifier import NicheClassifier
from nicheclip.files import quiet_datasets
from nicheclip.images import encode_jpeg, open_image

INDEX_FILE = "index/images.parquet"
SIDE = 320  # longest side of a published image, in pixels
BATCH_SIZE = 64
TEXTS = ("label", "split", "source_id", "attribution")


@dataclass(frozen=True)
class Found:
    """An image of an index, and its cosine with what was looked for."""

    jpeg: bytes
    label: str
    split: str
    source_id: str
    attribution: str
    cosine: float


def write_index(
    classifier: NicheClassifier, splits: DatasetDict, names: Sequence[str], path: Path
) -> None:
    """Writes the images of the splits of these names, shrunk, with their image_embeds.

    Raises:
        ValueError: if there is no such split.
    """
    if unknown := [name for name in names if name not in splits]:
        raise ValueError(
            f"there is no split '{unknown[0]}' to index; expected some of {', '.join(splits)}"
        )
    rows = []
    for name in names:
        classes = splits[name].features["label"].names
        batches = splits[name].iter(BATCH_SIZE)
        for batch in tqdm(batches, f"index {name}", -(-len(splits[name]) // BATCH_SIZE)):
            pictures = [open_image(image) for image in batch["image"]]
            embeds = classifier.image_embeds(pictures).numpy()  # (B, D)
            for place, picture in enumerate(pictures):
                picture.thumbnail((SIDE, SIDE), Picture.Resampling.BICUBIC)
                row = {
                    "image": {"bytes": encode_jpeg(picture, 85), "path": None},
                    "label": classes[batch["label"][place]],
                    "split": name,
                    "source_id": batch["source_id"][place],
                    "attribution": batch["attribution"][place] or "",
                    "image_embeds": embeds[place],
                }
                rows.append(row)
    texts = {name: Value("string") for name in TEXTS}
    columns = {"image": Image(), **texts, "image_embeds": List(Value("float32"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_datasets():
        Dataset.from_list(rows, features=Features(columns)).to_parquet(path)


class ImageIndex:
    """The index of a published folder; exact search, by cosine."""

    def __init__(self, path: Path):
        with quiet_datasets():
            self.rows = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))
        columns = self.rows.select_columns("image_embeds").with_format("numpy")
        self.image_embeds = columns["image_embeds"][:]  # (N, D)

    def __len__(self) -> int:
        return len(self.rows)

    def nearest(self, embeds: np.ndarray, count: int) -> list[list[Found]]:
        """The `count` images most alike, for each of the unit-length embeds (Q, D)."""
        cosines = np.asarray(embeds) @ self.image_embeds.T  # (Q, N)
        return [
            [
                self._found(int(place), float(row[place]))
                for place in np.argsort(-row, kind="stable")[:count]
            ]
            for row in cosines
        ]

    def _found(self, place: int, cosine: float) -> Found:
        row = self.rows[place]
        return Found(row["image"]["bytes"], **{name: row[name] for name in TEXTS}, cosine=cosine)
