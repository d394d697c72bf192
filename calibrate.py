"""python calibrate.py RUN

Fits temperature, abstention threshold, prediction sets and the OOD threshold on the calibration
split, then reads the test split once. Writes RUN/scorecard.json, calibration.json,
predictions.parquet, figures and errors.html. Base zero-shot and two probes on the base are
measured on the same images, each with a temperature of its own.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from model_card.errors import read_errors, write_errors
from model_card.figures import draw_figures
from nicheclip.clip import load_clip
from nicheclip.domain import Domain
from nicheclip.evaluation import scorecard
from nicheclip.evaluation.intervals import METRIC_TITLES, Verdict, judge_gate
from nicheclip.evaluation.predictions import Outputs, run_probes, write_predictions
from nicheclip.evaluation.probe import load_strong_probe
from nicheclip.files import replaced_file, replaced_folder, write_json
from nicheclip.processes import keep_freed_memory
from nicheclip.run import CLASS_MEANS_FILE, check_exam, load_prepared, provenance, run_lock


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="calibrate.py", description=__doc__.split("\n", 1)[1])
    parser.add_argument("run", type=Path, help="a run directory that train.py has filled")
    args = parser.parse_args()
    keep_freed_memory()
    try:
        with run_lock(args.run):
            calibrate(args.run)
    except (ValueError, OSError) as error:
        sys.exit(f"calibrate.py: {error}")


def calibrate(run: Path) -> None:
    """Calibrates RUN/model on the calibration split and judges it on test.

    Raises:
        ValueError: if the model was trained on other data, or test images were seen before.
    """
    domain, splits = Domain.load(run), load_prepared(run)
    check_exam(run, splits)
    strong_probe = load_strong_probe(run)
    tuned = Outputs(*load_clip(run / "model"), domain, splits, "fine-tuned")
    base = Outputs(*load_clip(domain.base), domain, splits, "base", reference=True)
    probes = run_probes(strong_probe, base, splits, domain)

    measures = scorecard.compare(tuned, base, probes, domain)
    gates: dict[str, Verdict] = {
        name: judge_gate(name, measures[name], target) for name, target in domain.gates.items()
    }
    calibration = {
        "split": "calibration",
        "n": len(splits["calibration"]),
        **tuned.fitted,
        "trained_logit_scale": tuned.head.trained_logit_scale,
        "ood": tuned.ood,
        "base": base.fitted,
        **{name: probe.fitted for name, probe in probes.items()},
    }
    with replaced_folder(run / "figures") as folder:
        draw_figures(folder, domain, tuned, base, measures, gates)
    with replaced_file(run / CLASS_MEANS_FILE) as unfinished:
        save_file(tuned.head.class_means, unfinished)
    readings = read_errors(tuned, base, np.array(splits["train"]["label"]))
    write_errors(run / "errors.html", domain, splits["test"], readings, splits["train"])
    write_predictions(run / "predictions.parquet", domain, splits["test"], tuned, base)
    write_json(run / "calibration.json", calibration)
    results = {  # last, since it says that the others are there
        "domain": domain.name,
        "provenance": provenance(),
        "base": Path(domain.base).name if Path(domain.base).is_dir() else domain.base,
        "metrics": {name: measures[name].to_dict() for name in METRIC_TITLES if name in measures},
        "gates": {name: asdict(gate) for name, gate in gates.items()},
        **scorecard.tables(tuned, base, domain),
    }
    write_json(run / "scorecard.json", results)
    print(scorecard.scorecard_text(measures, gates, tuned))
    print(f"\nread the errors in {run / 'errors.html'}; the figures are in {run / 'figures'}")
    print(f"next: python -m model_card {run}")


if __name__ == "__main__":
    main()
