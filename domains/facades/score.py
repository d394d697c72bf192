"""python -m domains.facades.score RUN

How many of the painter's planted faults data_prep has found in RUN, and how often it was wrong.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from nicheclip.files import read_json
from nicheclip.run import load_prepared


def score(run: Path) -> dict[str, dict[str, int]]:
    """For each fault how many were `planted`, `found`, and found `falsely`.

    Planted are those among the images that could show it. A leak is a train copy of a held-out
    drawing. Near-duplicates are judged among what is kept or set aside, not what the filter drops.
    """
    remedy = f"run `python -m data_prep domains/facades/domain.yaml --run {run}` first"
    truth = read_json(run / "images" / "truth.json", remedy)
    report = read_json(run / "data" / "report.json", remedy)
    aside = defaultdict(set)
    for entry in report["quarantined"]:
        aside[entry["kind"]].add(entry["source_id"])
    group_of = _groups(run, report)
    copies = truth["near_duplicates"]
    originals = {copy: copies[copy] for copy in copies if {copy, copies[copy]} <= set(group_of)}
    drawings = {(group, originals.get(name, name)) for name, group in group_of.items()}
    leaks = {copy for copy, original in originals.items() if not original.startswith("train/")}
    suspects = {entry["source_id"] for entry in report["suspects"]}
    return {
        "wrong labels": _count(set(truth["wrong_labels"]).difference(*aside.values()), suspects),
        "near-duplicates": {
            "planted": len(originals),
            "found": sum(group_of[copy] == group_of[own] for copy, own in originals.items()),
            "falsely": len(drawings) - len(set(group_of.values())),
        },
        "leaks": _count(leaks, aside["leak"]),
        "unreadable": _count(set(truth["unreadable"]), aside["unreadable"]),
    }


def _groups(run: Path, report: dict[str, Any]) -> dict[str, str]:
    """The near-duplicate group of each image that is kept, or set aside for another one."""
    group_of: dict[str, str] = {}
    for rows in load_prepared(run).values():
        group_of |= zip(rows["source_id"][:], rows["group_id"][:], strict=True)
    others = {e["source_id"]: e["other"] for e in report["quarantined"] if e["other"]}
    for source_id in others:
        chain = [source_id]  # each the reason why the one before it is set aside
        while (other := others.get(chain[-1])) and other not in chain:
            chain.append(other)
        known = (group_of[name] for name in chain if name in group_of)
        group_of[source_id] = next(known, chain[-1])
    return group_of


def _count(planted: set[str], named: set[str]) -> dict[str, int]:
    return dict(planted=len(planted), found=len(planted & named), falsely=len(named - planted))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1])
    parser.add_argument("run", type=Path, help="a run directory of painted façades")
    print(pd.DataFrame(score(parser.parse_args().run)).T)
