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

from data_prep.quality import threshold_of
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.intervals import detectable_difference
from nicheclip.publishing.pages import Thumbnails, environment

SMALL_EXAM = 10  # test images of a class; with fewer, its own accuracy says next to nothing
SHOWN = 60  # entries of a gallery

# The kinds of reasons for the quarantine, those worth a look first: after which step of the funnel
# they are missing, and what they mean. Other kinds count as lost on reading.
READING, COPIES, LEAKS = "readable, with a label", "unique, uncontradicted", "without leaks"
KINDS = {
    "conflict": (COPIES, "The same picture under two labels: at least one of them is wrong."),
    "leak": (
        LEAKS,
        "It is nearly the same as a held-out image, which would make that image too easy.",
    ),
    "exact duplicate": (COPIES, "The same file again, under the same label. It is used once."),
    "dropped by hand": (COPIES, "Someone wrote “drop” into review.csv."),
    "unreadable": (READING, "The file does not decode, or not to its end."),
    "too small": (READING, "Below smallest_side of the domain file."),
    "blank": (READING, "Every pixel has the same colour."),
    "no class": (READING, "Beside the class folders, or without a label."),
}

ENVIRONMENT = environment(Path(__file__).parent)


def write_report(
    path: Path, report: dict[str, Any], domain: Domain, picture: Callable[[str], Image.Image]
) -> None:
    """Writes the page.

    Args:
        report: as in report.json.
        picture: gives the stored image of a source_id; raises KeyError for an image that can't be
            read.
    """
    thumbnails = Thumbnails(picture)
    page = ENVIRONMENT.get_template("report.html.jinja").render(
        report=report,
        domain=domain,
        thumbnails=thumbnails,
        funnel=_funnel(report["counts"]),
        kinds=_quarantine(report["quarantined"]),
        confusions=_confusions(report["suspects"]),
        threshold=threshold_of(QualityFilter(**report["filter"])),
        detectable_difference=detectable_difference,
        small_exam=SMALL_EXAM,
        shown=SHOWN,
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _funnel(counts: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps from reading to the filter: how many images are left, and what was lost by kind."""
    left = counts["read"]
    steps = [{"title": "images read", "left": left, "lost": {}}]
    for title in (READING, COPIES, LEAKS):
        lost = {
            kind: number
            for kind, number in counts["quarantined"].items()
            if KINDS.get(kind, (READING,))[0] == title
        }
        left -= sum(lost.values())
        steps.append({"title": title, "left": left, "lost": lost})
    lost = {"suspected of a wrong label": counts["dropped_by_filter"]}
    return [
        *steps,
        {"title": "kept after the filter", "left": left - sum(lost.values()), "lost": lost},
    ]


def _quarantine(quarantined: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries by kind of reason, two that name each other as one.

    And how many of each kind are shown.
    """
    kinds: dict[str, dict] = {kind: {} for kind in KINDS}
    for entry in quarantined:
        kind, other = entry["kind"], entry["other"]
        entry = entry | {"particulars": entry["detail"] or "", "other_label": None}
        kinds.setdefault(kind, {}).setdefault(frozenset({entry["source_id"], other}), entry)
    filled = sorted((kind for kind in kinds if kinds[kind]), key=lambda kind: len(kinds[kind]))
    room, shown = SHOWN, {}
    # the same for each; what small kinds leave over goes to the larger
    for position, kind in enumerate(filled):
        shown[kind] = min(len(kinds[kind]), room // (len(filled) - position))
        room -= shown[kind]
    meanings = {kind: meaning for kind, (_, meaning) in KINDS.items()}
    return [
        {
            "name": kind,
            "meaning": meanings.get(kind, ""),
            "entries": list(kinds[kind].values()),
            "shown": shown[kind],
        }
        for kind in kinds
        if kinds[kind]
    ]


def _confusions(suspects: list[dict[str, Any]]) -> list[tuple[tuple[str, str], int]]:
    """The pairs of label and suspected label that come up most, if they come up more than once."""
    pairs = Counter((entry["label"], entry["suspected_label"]) for entry in suspects)
    return [(pair, number) for pair, number in pairs.most_common(5) if number > 1]
