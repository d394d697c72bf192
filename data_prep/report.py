"""RUN/data/report.html: one page with pictures that shows in a minute whether the data is sane.

The page needs nothing but itself, and the same report and pictures give the same bytes. The markup,
and which pictures are shown, is in report.html.jinja.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.spatial.distance import squareform

from data_prep.clusters import agreement, propose
from data_prep.findings import SMALL_EXAM, Report
from data_prep.quality import threshold_of
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.intervals import detectable_difference
from nicheclip.publishing.pages import Thumbnails, environment

SHOWN = 60  # entries of a gallery

# The kinds of what is set aside, those worth a look first: after which step of the funnel they are
# missing, and what they mean.
READING, COPIES, LEAKS = "readable, with a label", "unique, uncontradicted", "without leaks"
KINDS = {
    "conflict": (COPIES, "The same picture under two labels: at least one of them is wrong."),
    "leak": (
        LEAKS,
        "Nearly the same as an image of the split named here, which it would make too easy.",
    ),
    "exact duplicate": (COPIES, "The same file again, under the same label. It is used once."),
    "dropped by hand": (COPIES, "Someone wrote “drop” into review.csv."),
    "unreadable": (READING, "The file does not decode, or not to its end."),
    "too small": (READING, "Below smallest_side of the domain file."),
    "blank": (READING, "Every pixel has the same colour."),
    "no class": (READING, "Beside the class folders, or labelled with none of the classes."),
}


def write_report(
    path: Path, report: Report, domain: Domain, picture: Callable[[str], Image.Image]
) -> None:
    """Writes the page.

    Args:
        report: as in report.json.
        picture: gives the stored image of a source_id; raises KeyError for an image that can't be
            read.
    """
    aside, suspects = report["quarantined"], report["suspects"]
    mistaken = Counter((entry["label"], entry["suspected_label"]) for entry in suspects)
    proposed = propose(domain.class_names, squareform(report["confusions"]["affinity"]))
    page = environment(Path(__file__).parent).get_template("report.html.jinja")
    content = page.render(
        report=report,
        domain=domain,
        thumbnails=Thumbnails(picture),
        funnel=_funnel(report["counts"], Counter(entry["kind"] for entry in aside)),
        aside={kind: _pairs(kind, aside) for kind in KINDS},
        kinds=KINDS,
        alike=[
            [
                {"source_id": source_id, "split": split, "cosine": pair["cosine"]}
                for source_id, split in zip(pair["source_ids"], pair["splits"], strict=True)
            ]
            for pair in report["alike_across_splits"]
        ],
        mistaken=[(pair, number) for pair, number in mistaken.most_common(5) if number > 1],
        proposed=proposed,
        cluster_of={name: key for key, members in domain.clusters.items() for name in members},
        agreement=agreement(domain, proposed),
        threshold=threshold_of(QualityFilter(**report["filter"])),
        detectable_difference=detectable_difference,
        small_exam=SMALL_EXAM,
        most=SHOWN,
    )
    path.write_text(content, encoding="utf-8", newline="\n")


def _funnel(counts: dict[str, Any], aside: Counter[str]) -> list[tuple]:
    """The steps from reading to training: title, pieces of the bar, number of images, remark."""
    left, kept, dropped = counts["read"], counts["kept"], counts["dropped_by_filter"]
    steps: list[tuple] = [("images read", [("before", left)], left, "")]
    for step in (READING, COPIES, LEAKS):
        lost = {kind: number for kind, number in aside.items() if KINDS[kind][0] == step}
        left -= sum(lost.values())
        remark = ", ".join(f"{number:,} {kind}" for kind, number in lost.items())
        steps.append((step, [("before", left), ("lost", sum(lost.values()))], left, remark))
    remark = f"{dropped:,} suspected of a wrong label"
    steps.append(("kept", [*kept.items(), ("lost", dropped)], left - dropped, remark))
    train, samples = kept["train"], counts["train_samples_per_epoch"]
    remark = f"{samples / train:.1f} of each train image on average"
    return [*steps, ("samples", [("train", train), ("again", samples - train)], samples, remark)]


def _pairs(kind: str, aside: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each entry of a kind with the other image that it names; two that name each other once."""
    entries = {entry["source_id"]: entry for entry in aside}
    pairs = {}
    for entry in aside:
        if entry["kind"] == kind:
            named = [entry["source_id"], *([entry["other"]] if entry["other"] else [])]
            pairs[frozenset(named)] = [entries.get(each, {"source_id": each}) for each in named]
    return list(pairs.values())
