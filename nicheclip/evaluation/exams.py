"""Which images are examined, of which model, and what models are shown of them."""

from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from nicheclip.clip import encode_images
from nicheclip.run import Training

Model = tuple[CLIPModel, CLIPProcessor]


class Encoder:
    """What models make of prepared images and of other pictures; titles are of progress bars."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def images(self, model: Model, chosen: np.ndarray, title: str) -> np.ndarray:
        """Pooled features (N, F) of the rows chosen."""
        images = (row["image"] for row in self.rows.select(chosen))
        return encode_images(*model, images, len(chosen), description=title, pooled=True)

    def pictures(
        self, model: Model, pictures: Iterable[Image.Image], total: int, title: str, key: str
    ) -> np.ndarray:
        """image_embeds (N, D); pictures of one key are the same for all models."""
        return encode_images(*model, pictures, total, description=title)


class Exams:
    """Which images are examined, each once.

    Args:
        rows: all prepared images, R of them.
        models: as `nicheclip.run.trainings` gives them.

    Attributes:
        rounds: one for each model that is examined: one, or one a fold.
        asked: (N,) the rows that are examined, rising.
        round_of: (N,) in which of the rounds.
        split: how the images are called in the scorecard; told: what that means.
    """

    def __init__(self, rows: Dataset, models: Sequence[Training]):
        self.rows, self.rounds = rows, models[:-1] or models
        self.cross_fitted, self.final = len(models) > 1, models[-1]
        self.labels, self.groups = np.array(rows["label"]), np.array(rows["group_id"])
        round_of = np.full(len(rows), -1)
        for number, each in enumerate(self.rounds):
            round_of[each.exam] = number
        self.asked = np.flatnonzero(round_of >= 0)
        self.round_of = round_of[self.asked]
        self.split = "out of fold" if self.cross_fitted else "test"
        n = f"n = {len(self.asked):,}"
        self.told = (
            f"Test split, {n}: images that took no part in training, choice of settings, or "
            "calibration."
        )
        if self.cross_fitted:
            more = f"{1 / (len(self.rounds) - 1):.0%}"
            self.told = (
                f"Cross-fitted, {len(self.rounds)} folds, {n}: each image is answered by a model "
                "that has not seen it, and calibrated on other folds' answers. The published model "
                f"was trained on all of them, which is {more} more than those had seen."
            )

    def told_by(self, each: Training) -> np.ndarray:
        """The rows whose answers are those of this model."""
        return each.exam if self.cross_fitted else np.union1d(each.calibration, each.exam)

    def out_of_fold(self, of_rounds: Sequence[np.ndarray]) -> np.ndarray:
        """(R, ...) of each row what its own model says, from (R, ...) of each model."""
        found = np.full_like(of_rounds[0], np.nan)
        for each, values in zip(self.rounds, of_rounds, strict=True):
            found[self.told_by(each)] = values[self.told_by(each)]
        return found
