"""python calibrate.py RUN

Fits the temperature and the abstention threshold on the calibration split, then reads the test split once, for
RUN/scorecard.json, RUN/calibration.json, RUN/predictions.parquet and RUN/figures. Base zero-shot is measured on the
same images, with a temperature of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from datasets import Dataset

from model_card.figures import draw_figures
from nicheclip.data import load_prepared, quiet_datasets
from nicheclip.domain import Domain
from nicheclip.launch import keep_freed_memory
from nicheclip.results import METRIC_TITLES, Measure, format_table, replaced_folder, write_json
from nicheclip.run import check_trained_on
from nicheclip.scorecard import DomainClassifier, Outputs, beside_base, judge, measure, run_classifier
from nicheclip.zero_shot import load_clip


def main() -> None:
    parser = argparse.ArgumentParser(prog="calibrate.py", description=__doc__.split("\n", 1)[1])
    parser.add_argument("run", type=Path, help="a run directory that train.py has filled")
    run = parser.parse_args().run
    keep_freed_memory()
    try:
        calibrate(run)
    except (ValueError, OSError) as error:
        sys.exit(f"calibrate.py: {error}")


def calibrate(run: Path) -> None:
    domain, splits = Domain.load(run), load_prepared(run)
    check_trained_on(run)
    tuned = DomainClassifier(*load_clip(run / "model"), domain)
    base = DomainClassifier(*load_clip(domain.base), domain)

    tuned_fit = tuned.fit(splits["calibration"], "calibration split, fine-tuned")
    base_fit = base.fit(splits["calibration"], "calibration split, base", reference=True)
    calibration = {
        "split": "calibration",
        "n": len(splits["calibration"]),
        "temperature": tuned.temperature,
        **tuned_fit,
        "trained_logit_scale": tuned.model.logit_scale.item(),
        "calibrated_logit_scale": tuned.model.logit_scale.item() - math.log(tuned.temperature),
        "abstention": asdict(tuned.abstention),
        "base": {"temperature": base.temperature, **base_fit, "abstention": asdict(base.abstention)},
    }

    test = splits["test"]
    labels, groups = np.array(test["label"]), np.array(test["group_id"])
    tuned_outputs = run_classifier(tuned, test, "test split, fine-tuned")
    base_outputs = run_classifier(base, test, "test split, base")
    measures = beside_base(
        measure(tuned_outputs, labels, groups, domain, "test"), measure(base_outputs, labels, groups, domain, "test")
    )
    gates = judge(measures, domain)

    scorecard = {
        "domain": domain.name,
        "base": Path(domain.base).name if Path(domain.base).is_dir() else domain.base,
        "metrics": {name: result.to_dict() for name, result in measures.items()},
        "gates": gates,
    }
    save(run, domain, test, labels, tuned_outputs, base_outputs, calibration, scorecard)
    print_scorecard(measures, gates)
    abstention = tuned.abstention
    aim = "reached" if abstention.target_reached else "not reached, so the best at half coverage"
    print(
        f"\ntemperature {tuned.temperature:.3f}; below a confidence of {abstention.threshold:.2f} the answer is "
        f"'not sure' (aim: {abstention.target_accuracy:.0%} right among the answers, {aim} on calibration)"
    )
    print(f"figures in {run / 'figures'}; next: python -m model_card {run}")


def save(
    run: Path,
    domain: Domain,
    test: Dataset,
    labels: np.ndarray,
    tuned: Outputs,
    base: Outputs,
    calibration: dict,
    scorecard: dict,
) -> None:
    """Writes all results; the scorecard last, since it says that the others are there."""
    with replaced_folder(run / "figures") as folder:
        draw_figures(folder, domain, labels, tuned, base, scorecard)
    predictions = {
        "source_id": test["source_id"][:],
        "sha256": test["sha256"][:],
        "label": [domain.class_names[label] for label in labels],
        "probabilities": tuned.calibrated.tolist(),
        "base_probabilities": base.calibrated.tolist(),
    }
    with quiet_datasets():
        Dataset.from_dict(predictions).to_parquet(run / "predictions.parquet.tmp")
    (run / "predictions.parquet.tmp").rename(run / "predictions.parquet")
    write_json(run / "calibration.json", calibration)
    write_json(run / "scorecard.json", scorecard)


def print_scorecard(measures: dict[str, Measure], gates: dict[str, dict[str, str]]) -> None:
    rows = []
    for name in sorted(measures, key=lambda name: (name not in gates, list(measures).index(name))):
        result, gate = measures[name], gates.get(name, {"target": "", "verdict": ""})
        rows.append(
            [
                METRIC_TITLES[name],
                str(result.base),
                str(result),
                gate["target"],
                gate["verdict"],
                f"{result.n} {result.split}",
            ]
        )
    print(format_table(["metric [95 % interval]", "base zero-shot", "fine-tuned", "gate", "verdict", "n"], rows))


if __name__ == "__main__":
    main()
