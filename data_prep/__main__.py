"""python -m data_prep DOMAIN [--images FOLDER] [--base MODEL] [--run RUN]

Reads class folders (or paints the embedded façades), checks that each file decodes, groups near-duplicates, makes the
four splits, lets the base model filter train, and writes RUN/data with its report.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.prepare import prepare
from nicheclip.domain import Domain
from nicheclip.results import format_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__.split("\n", 1)[1])
    parser.add_argument("domain", help="a domain file, or the folder that holds it as domain.yaml")
    parser.add_argument("--images", help="class folders to read instead of the domain's own source")
    parser.add_argument("--base", help="a Hub id or a folder, instead of the domain's own base model")
    parser.add_argument("--run", type=Path, help="where the run lives (default: runs/<domain name>)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        domain = Domain.load(args.domain, base=args.base)
        run = args.run or Path("runs") / domain.name
        report = prepare(domain, run, args.images, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep: {error}")
    print(summary(report))
    print(f"\nwritten to {run / 'data'}; next: accelerate launch train.py {run}")


def summary(report: dict) -> str:
    """What was read, what became of it, and the classes, in plain text."""
    counts = report["counts"]
    rejected = ", ".join(f"{number} {reason}" for reason, number in counts["rejected"].items()) or "none"
    kept = ", ".join(f"{number} {split}" for split, number in counts["kept"].items())
    lines = [
        f"{counts['read']} images read; rejected: {rejected}; dropped by the filter: {counts['dropped_by_filter']}",
        f"kept: {kept}; an epoch visits {counts['train_visits_per_epoch']} training views",
    ]
    for fault, found in report.get("planted_faults", {}).items():
        lines.append(f"planted {fault.replace('_', ' ')}: " + ", ".join(f"{n} {what}" for what, n in found.items()))
    capped = [entry["name"] for entry in report["classes"] if entry["filter"]["wanted"] > entry["filter"]["dropped"]]
    if capped:
        lines.append(
            f"the filter wanted more than its cap allows of: {', '.join(capped)}. "
            "That many are hardly wrong labels: the base model does not know these classes."
        )
    rows = [
        [entry["name"], *(str(entry[split]) for split in counts["kept"]), f"{entry['filter']['dropped']}"]
        for entry in report["classes"]
    ]
    return "\n".join([*lines, "", format_table(["class", *counts["kept"], "dropped"], rows)])


if __name__ == "__main__":
    main()
