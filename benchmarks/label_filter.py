"""python -m benchmarks.label_filter --seeds 301 302 303

How well data_prep finds the faults that the façade painter plants: wrong labels by each filter,
near-duplicates, unreadable files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.prepare import prepare
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.summary import format_table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/label_filter"))
    args = parser.parse_args()
    facades = Domain.load("domains/facades")
    rows = []
    for seed in args.seeds:
        for mode in ("zero_shot", "linear_probe"):
            domain = facades.model_copy(update={"quality_filter": QualityFilter(mode=mode)})
            report = prepare(domain, args.out / str(seed), seed=seed)
            faults = report["planted_faults"]
            wrong = faults["wrong_labels"]
            precision = wrong["found"] / max(1, wrong["found"] + wrong["falsely"])
            recall = wrong["found"] / wrong["planted"]
            worst = max(
                entry["filter"]["dropped"] / entry["filter"]["images"]
                for entry in report["classes"]
            )
            rows.append(
                [
                    f"{seed} {mode}",
                    f"{wrong['found']} + {wrong['falsely']} of {wrong['planted']}",
                    f"{precision:.2f}",
                    f"{recall:.2f}",
                    f"{2 * precision * recall / max(1e-9, precision + recall):.2f}",
                    f"{worst:.0%}",
                    *(f"{faults[name]['found']} + {faults[name]['falsely']} of {faults[name]['planted']}"
                      for name in ("near_duplicates", "leaks", "unreadable")),
                ]
            )  # fmt: skip
    header = [
        "seed and filter",
        "wrong labels",
        "precision",
        "recall",
        "F1",
        "worst class",
        "copies",
        "leaks",
        "broken",
    ]
    print(format_table(header, rows))
    print(
        "\n'a + b of c': a found and b falsely, of c planted; worst class: the largest share that "
        "one class loses"
    )


if __name__ == "__main__":
    main()
