"""Images that can be searched by words or by a photo: one Parquet file with their image_embeds.

    index = ImageIndex(folder / INDEX_FILE)
    for found in index.nearest(classifier.text_embeds(["a house with pointed arches"])[0], 5): ...

Published only by option, since the images go along.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def write_index(
    classifier: NicheClassifier, splits: DatasetDict, names: Sequence[str], path: Path
) -> None:
    """Writes the images of the splits of these names ("all": of all), with their image_embeds.

    Raises:
        ValueError: if there is no such split.
    """
    names = list(splits) if list(names) == ["all"] else names
    if unknown := [name for name in names if name not in splits]:
        raise ValueError(
            f"no split '{unknown[0]}' to index; expected all, or some of {', '.join(splits)}"
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
    texts = dict.fromkeys(TEXTS, Value("string"))
    columns = {"image": Image(), **texts, "image_embeds": List(Value("float32"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_datasets():
        Dataset.from_list(rows, features=Features(columns)).to_parquet(path)


class ImageIndex:
    """The index of a published folder; exact search, by cosine."""

    def __init__(self, path: Path):
        with quiet_datasets():
            rows = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))
        self.rows = rows.remove_columns("image_embeds")
        self.image_embeds = rows.with_format("numpy")["image_embeds"][:]  # (N, D)

    def nearest(self, embed: np.ndarray, count: int) -> list[dict[str, Any]]:
        """The rows most like a unit-length embedding (D,), each with its `cosine`."""
        cosines = self.image_embeds @ np.asarray(embed)  # (N,)
        places = np.argsort(-cosines, kind="stable")[:count].tolist()
        return [self.rows[place] | {"cosine": float(cosines[place])} for place in places]
