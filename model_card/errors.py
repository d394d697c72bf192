"""RUN/errors.html: where the model was wrong on the test split, with pictures, for someone who knows the niche.

The page needs nothing but itself. Lines ticked on it are saved as review_errors.csv, which
data_prep reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from datasets import Dataset

from data_prep.review import Suspicion
from nicheclip.domain import Domain
from nicheclip.evaluation.metrics import confusion_matrix
from nicheclip.publishing.pages import Thumbnails, environment

NEIGHBOURS = 10  # training images that are asked about a label
DOUBTED = 0.8  # share of them that agree on another label, from which the label looks wrong
MOST_ERRORS, MOST_RIGHT = 300, 60  # shown; each has up to three pictures
CHUNK = 512  # test images compared with all training images at a time


@dataclass(frozen=True)
class Neighbour:
    """A training image, and its cosine with the test image."""

    row: int
    cosine: float


@dataclass(frozen=True)
class Reading:
    """One test image as the page shows it.

    Attributes:
        row: in the test split.
        own: probability of its label, `best` of the predicted class.
        doubt: share of the nearest training images that have one other label.
        other: that label, the most frequent of the others.
        nearest: training image by class, of the label and of the predicted class; absent if the
            class has none.
    """

    row: int
    label: int
    predicted: int
    own: float
    best: float
    base_predicted: int
    doubt: float
    other: int
    nearest: dict[int, Neighbour]

    @property
    def wrong(self) -> bool:
        """Whether the prediction is not the label."""
        return self.label != self.predicted


def read_errors(
    calibrated: np.ndarray,
    base_calibrated: np.ndarray,
    image_embeds: np.ndarray,
    labels: np.ndarray,
    train_embeds: np.ndarray,
    train_labels: np.ndarray,
) -> list[Reading]:
    """All test images, the most confident answers first.

    Args:
        calibrated, base_calibrated: (N, C) probabilities of the test images, of the model and of
            its base.
        image_embeds: (N, D) of the model.
        labels: (N,) int.
        train_embeds, train_labels: (M, D) and (M,) int.
    """
    predicted, base_predicted = calibrated.argmax(axis=1), base_calibrated.argmax(axis=1)
    readings = []
    for start in range(0, len(labels), CHUNK):
        cosines = image_embeds[start : start + CHUNK] @ train_embeds.T  # (CHUNK, M)
        for row, cosine in enumerate(cosines, start):
            label, answer = int(labels[row]), int(predicted[row])
            near = train_labels[np.argsort(-cosine, kind="stable")[:NEIGHBOURS]]
            others = np.bincount(near, minlength=int(max(label, train_labels.max())) + 1) / len(
                near
            )
            others[label] = 0
            nearest = {}
            for each in (label, answer):
                of_class = np.flatnonzero(train_labels == each)
                if len(of_class):
                    found = int(of_class[cosine[of_class].argmax()])
                    nearest[each] = Neighbour(found, float(cosine[found]))
            probabilities = calibrated[row]
            readings.append(
                Reading(
                    row, label, answer, float(probabilities[label]), float(probabilities[answer]),
                    int(base_predicted[row]), float(others.max()), int(others.argmax()), nearest,
                )
            )  # fmt: skip
    return sorted(readings, key=lambda reading: (-reading.best, reading.row))


def write_errors(
    path: Path, domain: Domain, test: Dataset, readings: Sequence[Reading], training_set: Dataset
) -> int:
    """Writes the page; gives the number of errors.

    Args:
        readings: of all test images.
    """
    wrong = [reading for reading in readings if reading.wrong]
    doubtful = sorted(
        (reading for reading in readings if not reading.wrong and reading.doubt >= DOUBTED),
        key=lambda reading: -reading.doubt,
    )
    labels, predicted = (
        np.array([getattr(each, name) for each in readings]) for name in ("label", "predicted")
    )
    rows_of = {"test": test, "train": training_set}
    sources = {split: rows["source_id"][:] for split, rows in rows_of.items()}
    names, shown = domain.class_names, [*wrong[:MOST_ERRORS], *doubtful[:MOST_RIGHT]]
    hashes = test["sha256"][:]

    def picture(place: str):
        split, row = place.split(":")
        return rows_of[split][int(row)]["image"]

    def review_line(reading: Reading) -> dict[str, str]:
        line = Suspicion(
            sources["test"][reading.row], names[reading.label], hashes[reading.row], "read in errors.html",
            names[reading.other], f"{reading.doubt:.2f}", decision="drop",
        )  # fmt: skip
        return asdict(line)

    page = environment(Path(__file__).parent).get_template("errors.html.jinja")
    content = page.render(
        domain=domain,
        order=domain.by_cluster,
        names=names,
        matrix=confusion_matrix(predicted, labels, len(names)).tolist(),
        total=len(readings),
        wrong=wrong,
        doubtful=doubtful,
        shown=shown,
        limits={
            "errors": MOST_ERRORS,
            "right": MOST_RIGHT,
            "doubted": DOUBTED,
            "neighbours": NEIGHBOURS,
        },
        sources=sources,
        lines=[review_line(reading) for reading in shown],
        header=[field.name for field in fields(Suspicion)],
        thumbnails=Thumbnails(picture),
    )
    path.write_text(content, encoding="utf-8", newline="\n")
    return len(wrong)
