"""python -m data_prep DOMAIN [--images FOLDER_OR_DATASET] [--base MODEL] [--run RUN]

Reads class folders, a dataset or Wikimedia Commons (or lets a module draw), verifies each
image, groups near-duplicates, makes the four splits or the folds, suspects wrong labels, and writes
RUN/data with report.html, and RUN/review.csv for a person to decide on the suspects. A killed run
goes on where it was. On several GPUs: accelerate launch -m data_prep DOMAIN; in two processes on a
CPU: torchrun --nproc_per_node 2 -m -- data_prep DOMAIN.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import format_table
from nicheclip.processes import keep_freed_memory


def main() -> None:
    """The command line."""
    about = __doc__.split("\n", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=about)
    add = parser.add_argument
    add("domain", help="a domain file, or the folder that holds it as domain.yaml")
    add("--images", help="class folders or a dataset to read instead of the domain's own source")
    add("--base", help="a Hub id or a folder, instead of the domain's own base model")
    add("--run", type=Path, help="where the run lives (default: runs/<domain name>)")
    add("--seed", type=int, default=0)
    add("--contact", help="your e-mail or web address, which Wikimedia Commons asks for")
    args = parser.parse_args()
    keep_freed_memory()
    try:
        domain = Domain.load(args.domain, base=args.base)
        run = args.run or Path("runs") / domain.name
        report = prepare(domain, run, args.images, args.seed, args.contact)
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep: {error}")
    if report:
        print(summary(report))
        print(f"\nwritten to {run / 'data'}: look at report.html, decide in {run / 'review.csv'}")
        print(f"next: accelerate launch train.py {run}")


def summary(report: dict[str, Any]) -> str:
    """What was read, what became of it, and the classes, in plain text."""
    counts, splits = report["counts"], list(report["counts"]["kept"])
    aside = [f"{number} {reason}" for reason, number in counts["quarantined"].items()]
    kept = ", ".join(f"{number} {split}" for split, number in counts["kept"].items())
    lines = [
        f"{counts['read']} images read; quarantined: {', '.join(aside) or 'none'}; dropped by the "
        f"filter: {counts['dropped_by_filter']}, left out of training only: "
        f"{counts['left_out_of_training']}",
        f"kept: {kept}; an epoch visits {counts['train_samples_per_epoch']} training views",
        *report["warnings"],
    ]
    rows = [
        [entry["name"], *(str(entry[split]) for split in splits), str(entry["filter"]["suspect"])]
        for entry in report["classes"]
    ]
    return "\n".join([*lines, "", format_table(["class", *splits, "suspects"], rows)])


if __name__ == "__main__":
    main()
