"""python calibrate.py RUN [--objective nll|ece]

Fits temperature, abstention threshold, prediction sets and the OOD threshold on the
calibration split, then reads the test split once. Writes RUN/scorecard.json, RUN/calibration.json,
RUN/predictions.parquet, RUN/figures and RUN/errors.html. Base zero-shot and a linear probe on the
base are measured on the same images, each with a temperature of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
from datasets import Dataset, DatasetDict
from safetensors.numpy import save_file

from model_card.errors import read_errors, write_errors
from model_card.figures import draw_figures
from nicheclip.classifier import CLASS_MEANS_FILE
from nicheclip.clip import load_clip
from nicheclip.domain import Domain, GatedMetric
from nicheclip.evaluation.calibration import Objective
from nicheclip.evaluation.intervals import METRIC_TITLES, Measure, Verdict, format_table, judge_gate
from nicheclip.evaluation.predictions import (
    DomainClassifier,
    Outputs,
    Predictions,
    fit,
    fit_and_run,
)
from nicheclip.evaluation.probe import fit_probe
from nicheclip.evaluation.scorecard import (
    class_table,
    clip_statistics,
    compare,
    ood_table,
    perfect_ece,
    stability_table,
)
from nicheclip.evaluation.scorecard import statistics as statistics_of
from nicheclip.files import quiet_datasets, replaced_file, replaced_folder, write_json
from nicheclip.processes import keep_freed_memory
from nicheclip.run import (
    check_not_trained_on,
    check_trained_on,
    load_prepared,
    provenance,
    run_lock,
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="calibrate.py", description=__doc__.split("\n", 1)[1])
    parser.add_argument("run", type=Path, help="a run directory that train.py has filled")
    parser.add_argument(
        "--objective",
        choices=get_args(Objective),
        default="nll",
        help="what the temperature minimises (default: nll)",
    )
    args = parser.parse_args()
    keep_freed_memory()
    try:
        with run_lock(args.run):
            calibrate(args.run, args.objective)
    except (ValueError, OSError) as error:
        sys.exit(f"calibrate.py: {error}")


def calibrate(run: Path, objective: Objective = "nll") -> None:
    """Calibrates RUN/model on the calibration split and judges it on test, beside the base and the probe.

    Raises:
        ValueError: if the model was trained on other data, or test images were seen before.
    """
    domain, splits = Domain.load(run), load_prepared(run)
    check_not_trained_on(run, splits)
    check_trained_on(run)
    test, training_set = splits["test"], splits["train"]
    labels, groups = np.array(test["label"]), np.array(test["group_id"])

    outputs, train_embeds = [], []
    for title, folder in (("fine-tuned", run / "model"), ("base", domain.base)):
        classifier = DomainClassifier(*load_clip(folder), domain, title)
        train_embeds.append(classifier.embed_rows(training_set, "train split"))
        is_base = folder == domain.base
        outputs.append(
            fit_and_run(classifier, splits, train_embeds[-1], domain, objective, reference=is_base)
        )
    tuned, base = outputs
    probe = run_probe(classifier, splits, train_embeds[1], base, domain, objective)

    measures = compare(
        clip_statistics(tuned, labels, groups, domain),
        clip_statistics(base, labels, groups, domain),
        statistics_of(probe, labels, groups, domain),
    )
    measures["ece_of_perfect"] = perfect_ece(tuned)
    gates: dict[GatedMetric, Verdict] = {
        name: judge_gate(name, measures[name], target) for name, target in domain.gates.items()
    }
    scorecard = {
        "domain": domain.name,
        "provenance": provenance(),
        "base": Path(domain.base).name if Path(domain.base).is_dir() else domain.base,
        "metrics": {name: measures[name].to_dict() for name in METRIC_TITLES if name in measures},
        "gates": {name: asdict(gate) for name, gate in gates.items()},
        "classes": class_table(tuned, base, labels, domain),
        "ood": ood_table(tuned),
        "stability": stability_table(tuned),
    }
    calibration = {
        "split": "calibration",
        "n": len(splits["calibration"]),
        **tuned.fitted.to_dict(),
        "trained_logit_scale": tuned.log_logit_scale,
        "calibrated_logit_scale": tuned.log_logit_scale - math.log(tuned.fitted.temperature.value),
        "ood": asdict(tuned.ood),
        "base": base.fitted.to_dict(),
        "probe": probe.fitted.to_dict(),
    }
    with replaced_folder(run / "figures") as folder:
        draw_figures(folder, domain, labels, tuned, base, measures, gates)
    save_file(tuned.class_means, run / CLASS_MEANS_FILE)
    train_labels = np.array(training_set["label"])
    readings = read_errors(
        tuned.calibrated, base.calibrated, tuned.image_embeds, labels, train_embeds[0], train_labels
    )
    write_errors(run / "errors.html", domain, test, readings, training_set)
    save_predictions(run, domain, test, labels, tuned, base)
    write_json(run / "calibration.json", calibration)
    write_json(run / "scorecard.json", scorecard)  # last, since it says that the others are there
    print_scorecard(measures, gates)
    print_calibration(tuned)
    print(f"\nread the errors in {run / 'errors.html'}; the figures are in {run / 'figures'}")
    print(f"next: python -m model_card {run}")


def run_probe(
    classifier: DomainClassifier,
    splits: DatasetDict,
    train_embeds: np.ndarray,
    base: Outputs,
    domain: Domain,
    objective: Objective,
) -> Predictions:
    """A linear probe on the base's image_embeds, calibrated as the others are."""
    labels = {name: np.array(rows["label"]) for name, rows in splits.items()}
    validation_embeds = classifier.embed_rows(splits["validation"], "validation split")
    probe = fit_probe(
        (train_embeds, labels["train"]),
        (validation_embeds, labels["validation"]),
        len(domain.classes),
    )
    calibration = splits["calibration"]
    logits, groups = probe.logits(base.calibration_embeds), np.array(calibration["group_id"])
    fitted = fit(logits, labels["calibration"], groups, domain, objective, reference=True)
    return Predictions(probe.logits(base.image_embeds), fitted)


def save_predictions(
    run: Path, domain: Domain, test: Dataset, labels: np.ndarray, tuned: Outputs, base: Outputs
) -> None:
    """RUN/predictions.parquet: each test image with its label, probabilities, prediction set and domain score."""
    predictions = {
        "source_id": test["source_id"][:],
        "sha256": test["sha256"][:],
        "label": [domain.class_names[label] for label in labels],
        "probabilities": tuned.calibrated.tolist(),
        "base_probabilities": base.calibrated.tolist(),
        "prediction_set": [
            [domain.class_names[c] for c in np.flatnonzero(row)] for row in tuned.sets
        ],
        "domain_score": tuned.own_scores[tuned.ood.score].tolist(),
    }
    with quiet_datasets(), replaced_file(run / "predictions.parquet") as unfinished:
        Dataset.from_dict(predictions).to_parquet(unfinished)


def print_scorecard(measures: dict[str, Measure], gates: dict[GatedMetric, Verdict]) -> None:
    """All measures, those with a gate first."""
    names: list = [
        *gates,
        *(name for name in METRIC_TITLES if name in measures and name not in gates),
    ]
    rows = []
    for name in names:
        result, gate = measures[name], gates.get(name)
        others = [f"{each.value:.3f}" if each else "" for each in (result.base, result.probe)]
        gain = result.difference
        gained = f"{gain.value:+.3f}{' ?' if gain.low <= 0 <= gain.high else ''}" if gain else ""
        rows.append(
            [
                METRIC_TITLES[name],
                *others,
                str(result),
                gained,
                str(gate or ""),
                f"{result.n} {result.split}",
            ]
        )
    header = ["metric", "base", "probe", "fine-tuned [95 % interval]", "gained", "gate", "n"]
    print(format_table(header, rows))
    print(
        "probe: logistic regression on the base's image_embeds; ?: the interval of the gain holds 0"
    )


def print_calibration(tuned: Outputs) -> None:
    """Temperature, abstention and the OOD threshold in words."""
    temperature, abstention = tuned.fitted.temperature, tuned.fitted.abstention
    aim = "reached" if abstention.target_reached else "not reached, so the best at half coverage"
    print(
        f"\ntemperature {temperature.value:.3f} [{temperature.low:.3f}, {temperature.high:.3f}]; "
        f"below a confidence of {abstention.threshold:.2f} the answer is 'not sure' (aim: "
        f"{abstention.aim.replace('_', ' ')} of {abstention.target:.0%}, {aim} on calibration)"
    )
    if temperature.warning:
        print(f"warning: {temperature.warning}")
    ood = tuned.ood
    print(
        f"outside of the domain: {ood.score.replace('_', ' ')} below {ood.threshold:.3f} "
        "(AUROC on calibration: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in ood.auroc.items())
        + ")"
    )


if __name__ == "__main__":
    main()
