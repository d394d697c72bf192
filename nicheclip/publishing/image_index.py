"""Images that can be searched by words or by a photo: `datasets` with embeddings, FAISS over them.

    index = ImageIndex(folder)
    for found in index.nearest(classifier.text_embeds(["a house with pointed arches"]), 5)[0]: ...

Published only by option, since the images go along; needs faiss-cpu besides `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL.Image import Image as Picture
from PIL.Image import Resampling
from tqdm.auto import tqdm

from nicheclip.classifier import NicheClassifier
from nicheclip.files import quiet_datasets
from nicheclip.images import encode_jpeg, to_rgb

INDEX_FILE = "index/images.parquet"
SIDE = 320  # longest side of a published image, in pixels
BATCH_SIZE = 64


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
    classifier: NicheClassifier,
    splits: DatasetDict,
    names: Sequence[str],
    path: Path,
    title: str = "index",
) -> int:
    """Writes the images of some splits, shrunk, with image_embeds; gives their number.

    Args:
        names: of the splits, of those that data_prep makes.

    Raises:
        ValueError: if there is no such split.
    """
    for name in names:
        if name not in splits:
            raise ValueError(
                f"there is no split '{name}' to index; expected some of {', '.join(splits)}"
            )

    def rows() -> Iterator[dict[str, Any]]:
        with tqdm(total=sum(len(splits[name]) for name in names), desc=title, unit="image") as bar:
            for name in names:
                classes = splits[name].features["label"].names
                for batch in splits[name].iter(BATCH_SIZE):
                    embeds = classifier.image_embeds(batch["image"]).cpu().numpy()
                    for place, image in enumerate(batch["image"]):
                        yield {
                            "image": {"bytes": _small(image), "path": None},
                            "label": classes[batch["label"][place]],
                            "split": name,
                            "source_id": batch["source_id"][place],
                            "attribution": batch["attribution"][place] or "",
                            "image_embeds": embeds[place],
                        }
                    bar.update(len(batch["image"]))

    text = ("label", "split", "source_id", "attribution")
    columns = {
        "image": Image(),
        **{name: Value("string") for name in text},
        "image_embeds": List(Value("float32")),
    }
    with quiet_datasets():
        written = Dataset.from_list(list(rows()), features=Features(columns))
        path.parent.mkdir(parents=True, exist_ok=True)
        written.to_parquet(path)
    return len(written)


def _small(image: Picture) -> bytes:
    small = to_rgb(image)
    small.thumbnail((SIDE, SIDE), Resampling.BICUBIC)
    return encode_jpeg(small, 85)


class ImageIndex:
    """The index of a published folder; exact search, by cosine.

    Raises:
        ImportError: if FAISS is not installed.
    """

    def __init__(self, path: Path):
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                f"'{path}' needs FAISS, which is not installed; run `pip install "
                "'nicheclip[search]'`"
            ) from error

        with quiet_datasets():
            self.rows = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))
            self.rows.add_faiss_index("image_embeds", metric_type=faiss.METRIC_INNER_PRODUCT)

    def __len__(self) -> int:
        return len(self.rows)

    def nearest(self, embeds: np.ndarray, count: int) -> list[list[Found]]:
        """The `count` images most alike, for each of the unit-length embeddings (Q, D)."""
        results = self.rows.search_batch(
            "image_embeds", np.asarray(embeds, dtype=np.float32), k=min(count, len(self))
        )
        return [
            [
                self._found(int(index), float(cosine))
                for index, cosine in zip(indices, cosines, strict=True)
            ]
            for indices, cosines in zip(results.total_indices, results.total_scores, strict=True)
        ]

    def _found(self, index: int, cosine: float) -> Found:
        row = self.rows[index]
        text = {name: row[name] for name in ("label", "split", "source_id", "attribution")}
        return Found(row["image"]["bytes"], **text, cosine=cosine)
