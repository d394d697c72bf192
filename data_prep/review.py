"""RUN/review.csv: what data_prep suspects, for a person to decide; the decisions hold for the next run."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

DECISIONS = ("", "keep", "drop")


@dataclass(frozen=True)
class Suspicion:
    """One line of review.csv; `decision` is for a person: keep, drop, or nothing."""

    source_id: str
    label: str
    reason: str
    suspected_label: str = ""
    score: str = ""
    outcome: str = ""  # what data_prep did without a decision
    decision: str = ""


def read_decisions(path: Path) -> dict[tuple[str, str], Suspicion]:
    """The decided lines of review.csv by source_id and label; none if there is no such file.

    Raises:
        ValueError: for a column that is missing or a decision that is none.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets like to add a byte-order mark
        reader = csv.DictReader(file)
        missing = {"source_id", "label", "decision"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"'{path}' lacks the column {', '.join(sorted(missing))}; restore it, or remove the file")
        decided = {}
        names = [field.name for field in fields(Suspicion)]
        for number, line in enumerate(reader, start=2):
            decision = (line["decision"] or "").strip().lower()
            if decision not in DECISIONS:
                raise ValueError(
                    f"'{path}', line {number}: decision '{line['decision']}'; expected keep, drop or nothing"
                )
            if decision:
                entry = Suspicion(**{name: line.get(name) or "" for name in names} | {"decision": decision})
                decided[entry.source_id, entry.label] = entry
    return decided


def write_review(path: Path, suspicions: Iterable[Suspicion], decided: dict[tuple[str, str], Suspicion]) -> None:
    """Writes the suspicions; earlier decisions stay, also those on images that are no longer suspected."""
    lines = decided | {
        (entry.source_id, entry.label): entry for entry in suspicions if (entry.source_id, entry.label) not in decided
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Suspicion)])
        writer.writeheader()
        writer.writerows(
            asdict(entry) for entry in sorted(lines.values(), key=lambda entry: (entry.reason, entry.source_id))
        )
    temporary.replace(path)
