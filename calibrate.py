"""python calibrate.py RUN

Fits temperature, abstention threshold, prediction sets and the OOD threshold on the calibration
split, then reads the test split once. In a cross-fitted run each image is answered by the model of
its fold, and each fold is judged with what the answers of the others fit. Writes
RUN/scorecard.json, calibration.json, predictions.parquet, figures and errors.html. Base zero-shot
and two probes on the base are measured on the same images, each with a temperature of its own.
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
from nicheclip.evaluation.exams import Encoder, Exams
from nicheclip.evaluation.intervals import METRIC_TITLES, Verdict, judge_gate
from nicheclip.evaluation.predictions import (
    Outputs,
    encoded,
    head_of,
    run_probes,
    write_predictions,
)
from nicheclip.files import replaced_file, replaced_folder, write_json
from nicheclip.processes import keep_freed_memory
from nicheclip.run import (
    CLASS_MEANS_FILE,
    check_exam,
    load_prepared,
    provenance,
    run_lock,
    trainings,
)
from nicheclip.training.exam_encoder import ExamEncoder


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
    """Calibrates the models of RUN on images that they have not seen, and judges them.

    Raises:
        ValueError: if the model was trained on other data, or images were seen before.
    """
    domain, splits = Domain.load(run), load_prepared(run)
    check_exam(run, splits)
    exams = Exams(*trainings(run, splits))
    models = [load_clip(each.folder / "model") for each in exams.rounds]
    bases = [load_clip(domain.base)] * len(models)
    encoder = Encoder(exams.rows)
    if exams.cross_fitted:  # so many models: exact to the rounding of what training has kept
        encoder = ExamEncoder(run, exams.rows, domain)
    tuned = Outputs(exams, models, encoder, domain, "fine-tuned")
    base = Outputs(exams, bases, encoder, domain, "base", reference=True)
    probes = run_probes(exams, base, domain)

    measures = scorecard.compare(tuned, base, probes, domain)
    gates: dict[str, Verdict] = {
        name: judge_gate(name, measures[name], target) for name, target in domain.gates.items()
    }
    published = tuned.heads[-1]
    if exams.cross_fitted:
        final, trained = load_clip(run / "model"), np.flatnonzero(exams.final.repeats)
        features = encoded(exams, encoder, final, trained, "images, published model")
        published, _ = head_of(exams, exams.final, final, features, domain)
    calibration = {
        "split": exams.split if exams.cross_fitted else "calibration",
        "n": len(exams.asked) if exams.cross_fitted else len(splits["calibration"]),
        **tuned.fitted,
        "trained_logit_scale": published.trained_logit_scale,
        "ood": tuned.ood,
        "base": base.fitted,
        **{name: probe.fitted for name, probe in probes.items()},
    }
    with replaced_folder(run / "figures") as folder:
        draw_figures(folder, domain, tuned, base, measures, gates)
    with replaced_file(run / CLASS_MEANS_FILE) as unfinished:
        save_file(published.class_means, unfinished)
    write_errors(run / "errors.html", domain, exams, read_errors(tuned, base))
    write_predictions(run / "predictions.parquet", domain, tuned, base)
    write_json(run / "calibration.json", calibration)
    results = {  # last, since it says that the others are there
        "domain": domain.name,
        "evaluation": exams.told,
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
