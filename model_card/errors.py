"""RUN/errors.html: where the model was wrong, with pictures, for who knows the niche.

The page needs nothing but itself. Lines ticked on it are saved as review_errors.csv, which
data_prep reads.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from data_prep.review import Suspicion
from nicheclip.domain import Domain
from nicheclip.evaluation.exams import Exams
from nicheclip.evaluation.predictions import Outputs
from nicheclip.publishing.pages import Thumbnails, environment

NEIGHBOURS = 10  # training images that are asked about a label
DOUBTED = 0.8  # share of them that agree on another label, from which the label looks wrong
MOST_ERRORS, MOST_RIGHT = 300, 60  # shown; each has up to three pictures


@dataclass(frozen=True)
class Reading:
    """One image that was examined, as the page shows it."""

    row: int  # of all prepared images
    label: int
    predicted: int
    own: float  # probability of the label
    best: float  # and of the predicted class
    base_predicted: int
    doubt: float  # share of the nearest training images that have the most frequent other label
    other: int  # which that is
    # row and cosine of the nearest training image of the label and of the predicted class, if any
    nearest: dict[int, tuple[int, float]]

    @property
    def wrong(self) -> bool:
        """Whether the prediction is not the label."""
        return self.label != self.predicted


def read_errors(tuned: Outputs, base: Outputs) -> list[Reading]:
    """All images that were examined, the most confident answers first.

    Their neighbours are among what their own model was trained on.
    """
    readings, exams = [], tuned.exams
    trained = [np.flatnonzero(each.repeats) for each in exams.rounds]
    for index, row in enumerate(exams.asked.tolist()):
        label = int(tuned.labels[index])
        probabilities, number = tuned.calibrated[index], exams.round_of[index]
        predicted, base_predicted = int(probabilities.argmax()), int(base.predicted[index])
        cosine = tuned.embeds[number][trained[number]] @ tuned.embeds[number][row]  # (M,)
        known = exams.labels[trained[number]]
        near = known[np.argpartition(-cosine, min(NEIGHBOURS, len(known)) - 1)[:NEIGHBOURS]]
        others = np.bincount(near, minlength=len(probabilities)) / len(near)  # (C,)
        others[label] = 0
        doubt, other = float(others.max()), int(others.argmax())
        nearest = {}
        for each in (label, predicted):
            if len(own := np.flatnonzero(known == each)):
                place = own[cosine[own].argmax()]
                nearest[each] = int(trained[number][place]), float(cosine[place])
        of_label, best = float(probabilities[label]), float(probabilities[predicted])
        readings.append(
            Reading(row, label, predicted, of_label, best, base_predicted, doubt, other, nearest)
        )
    return sorted(readings, key=lambda reading: (-reading.best, reading.row))


def write_errors(path: Path, domain: Domain, exams: Exams, readings: Sequence[Reading]) -> None:
    """Writes the page, from the readings of all images that were examined."""
    wrong = [reading for reading in readings if reading.wrong]
    doubted = [each for each in readings if not each.wrong and each.doubt >= DOUBTED]
    doubted.sort(key=lambda reading: -reading.doubt)
    names, hashes = domain.class_names, exams.rows["sha256"][:]
    sources = exams.rows["source_id"][:]
    place = {source_id: row for row, source_id in enumerate(sources)}

    def review_line(reading: Reading) -> str:
        image = sources[reading.row], names[reading.label], hashes[reading.row]
        found = "read in errors.html", names[reading.other], f"{reading.doubt:.2f}"
        line = io.StringIO()
        suspicion = Suspicion(*image, *found, decision="drop")
        csv.writer(line, lineterminator="").writerow(astuple(suspicion))
        return line.getvalue()

    page = environment(Path(__file__).parent).get_template("errors.html.jinja")
    content = page.render(
        domain=domain,
        names=names,
        first_of_cluster={members[0] for members in domain.clusters.values()},
        cells=Counter((reading.label, reading.predicted) for reading in readings),
        sizes=Counter(reading.label for reading in readings),
        readings=readings,
        wrong=wrong,
        doubted=doubted,
        limits=(MOST_ERRORS, MOST_RIGHT),
        doubt=DOUBTED,
        neighbours=NEIGHBOURS,
        exams=exams,
        sources=sources,
        review_line=review_line,
        header=",".join(field.name for field in fields(Suspicion)),
        thumbnails=Thumbnails(lambda source_id: exams.rows[place[source_id]]["image"]),
    )
    path.write_text(content, encoding="utf-8", newline="\n")
