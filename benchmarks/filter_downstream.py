"""python -m benchmarks.filter_downstream --seeds 501 502 503

What the quality filter is worth: accuracy on clean test façades after training on what each filter
leaves, the same drawings and seeds for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import calibrate
import train
from data_prep.prepare import prepare
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.summary import format_table
from nicheclip.files import read_json

MODES = ("none", "zero_shot", "linear_probe")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[501, 502, 503])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/filter_downstream"))
    args = parser.parse_args()
    facades = Domain.load("domains/facades")
    rows, hits = [], {mode: [] for mode in MODES}
    for seed in args.seeds:
        for mode in MODES:
            run = args.out / f"{seed}-{mode}"
            domain = facades.model_copy(update={"quality_filter": QualityFilter(mode=mode)})
            if not (run / "scorecard.json").is_file():
                prepare(domain, run, seed=seed)
                train.train([str(run), "--seed", str(seed)])
                calibrate.calibrate(run)
            metrics = read_json(run / "scorecard.json", "")["metrics"]
            counts = read_json(run / "data" / "report.json", "")["counts"]
            accuracy = metrics["accuracy"]
            hits[mode].append(accuracy["value"])
            rows.append(
                [
                    f"{seed} {mode}",
                    f"{counts['dropped_by_filter']}",
                    f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
                    f"{metrics['macro_f1']['value']:.3f}",
                    f"{accuracy['n']}",
                ]
            )
    print(format_table(["seed and filter", "dropped", "accuracy [95 %]", "macro F1", "n"], rows))
    for mode in MODES[1:]:
        gains = np.array(hits[mode]) - np.array(hits["none"])
        each = ", ".join(f"{gain:+.3f}" for gain in gains)
        print(f"{mode} against none, mean of {len(gains)} seeds: {gains.mean():+.3f} ({each})")


if __name__ == "__main__":
    main()
