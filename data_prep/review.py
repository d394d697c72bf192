"""RUN/review.csv: what data_prep suspects, for a person to decide; it holds for the next run."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from nicheclip.files import replaced_file

DECISIONS = ("", "keep", "drop")


@dataclass(frozen=True)
class Suspicion:
    """One line of review.csv; `decision` is for a person: keep, drop, or nothing."""

    source_id: str
    label: str
    sha256: str  # of the file: with the label, what a decision is about
    reason: str
    suspected_label: str = ""
    score: str = ""
    outcome: str = ""  # what data_prep did without a decision
    decision: str = ""


def read_decisions(path: Path) -> dict[tuple[str, str], Suspicion]:
    """The decided lines of review.csv by sha256 and label; none if there is no such file.

    Takes what spreadsheets make of it: semicolons or tabs, a byte-order mark, Windows' code page.

    Raises:
        ValueError: for a column that is missing or a decision that is none.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    missing = {"sha256", "label", "decision"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(
            f"'{path}' lacks the column {', '.join(sorted(missing))}; its first line should be "
            f"{','.join(field.name for field in fields(Suspicion))}"
        )
    decided = {}
    for number, line in enumerate(reader, start=2):
        decision = (line["decision"] or "").strip().lower()
        if decision not in DECISIONS:
            raise ValueError(
                f"'{path}', line {number}: decision '{decision}'; expected keep, drop or nothing"
            )
        if decision:
            values = {field.name: line.get(field.name) or "" for field in fields(Suspicion)}
            entry = Suspicion(**values | {"decision": decision})
            decided[entry.sha256, entry.label] = entry
    return decided


def write_review(path: Path, suspicions: Iterable[Suspicion]) -> None:
    """Writes the suspicions; decisions stay, those on what is no longer suspected too."""
    decided = read_decisions(path)
    lines = {(entry.sha256, entry.label): entry for entry in suspicions} | decided
    columns = [field.name for field in fields(Suspicion)]
    table = pd.DataFrame(list(lines.values()), columns=columns).sort_values(["reason", "source_id"])
    with replaced_file(path) as unfinished:
        # Without its mark, Excel garbles accents.
        table.to_csv(unfinished, index=False, encoding="utf-8-sig", lineterminator="\r\n")
