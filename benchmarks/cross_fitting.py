"""python -m benchmarks.cross_fitting DOMAIN --images FOLDER [--repetitions 5] [--processes 2]

Does a cross-fitted scorecard tell the truth, and what does it give beside hold-out? Each repetition
keeps an outer part of the images (a fifth of five) out of everything. The rest goes through
data_prep, train, calibrate and model_card twice, cross-fitted and held out; then both published
models are asked about the outer part. Finished runs stay, so that it goes on where it was.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import calibrate
from data_prep.prepare import prepare
from model_card.build import build
from nicheclip.classifier import NicheClassifier
from nicheclip.domain import Domain
from nicheclip.evaluation.metrics import class_scores, expected_calibration_error
from nicheclip.files import read_json, write_json
from nicheclip.images import open_image
from nicheclip.run import load_prepared

METRICS = "accuracy macro_f1 ece conformal_coverage coverage selective_accuracy".split()


def publish(domain: Domain, images: Path, run: Path, seed: int, processes: int) -> float:
    """RUN/hub from the images; the seconds that it took."""
    started = time.perf_counter()
    if not (run / "data").is_dir():
        prepare(domain, run, images, seed)
    if not (run / "training.json").is_file():
        command = ["train.py", str(run), "--disable_tqdm", "True"]
        if processes > 1:
            shared = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command = ["-m", *shared, "--", *command]
        with (run / "log.txt").open("w") as log:
            subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=log)
    calibrate.calibrate(run)
    build(run)
    return time.perf_counter() - started


def outside(run: Path, files: list[Path], labels: np.ndarray) -> dict[str, float]:
    """What the published model is worth on files that it has never seen."""
    classifier = NicheClassifier.from_pretrained(run / "hub")
    found = [each for file in files for each in classifier([open_image(str(file))])]
    names = classifier.class_names
    predicted = np.array([names.index(each.best) for each in found])
    right = predicted == labels
    answered = np.array([each.confidence >= each.threshold for each in found])
    sets = [names[label] in each.prediction_set for label, each in zip(labels, found, strict=True)]
    return {
        "accuracy": right.mean(),
        "macro_f1": np.nanmean(class_scores(predicted, labels, len(names))[2]),
        "ece": expected_calibration_error(np.array([each.confidence for each in found]), right),
        "conformal_coverage": np.mean(sets),
        "coverage": answered.mean(),
        "selective_accuracy": right[answered].mean() if answered.any() else np.nan,
        "n": len(found),
    }


def compare(domain: Domain, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each repetition and way of examining."""
    args.out.mkdir(parents=True, exist_ok=True)
    parts = domain.model_copy(update={"evaluation": "cross_fit", "folds": args.repetitions})
    if not (args.out / "parts" / "data").is_dir():
        prepare(parts, args.out / "parts", args.images)
    dealt, rows = load_prepared(args.out / "parts"), []
    for number, (name, outer) in enumerate(dealt.items(), 1):
        images = args.out / name / "images"
        for part, inner in dealt.items():
            for source_id in inner["source_id"] if part != name else []:
                link = images / source_id
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to((args.images / source_id).resolve())
        files = [args.images / source_id for source_id in outer["source_id"]]
        for way, processes in (("cross_fit", args.processes), ("holdout", 1)):
            run, of_way = args.out / name / way, domain.model_copy(update={"evaluation": way})
            if not (run / "outside.json").is_file():
                seconds = publish(of_way, images, run, number, processes)
                told = outside(run, files, np.array(outer["label"]))
                write_json(run / "outside.json", told | {"seconds": seconds})
            found = read_json(run / "outside.json", "")
            card = read_json(run / "scorecard.json", "")["metrics"]
            for metric in METRICS:
                own = {key: card[metric][key] for key in ("value", "low", "high", "n")}
                rows.append({"part": name, "way": way, "metric": metric, "outside": found[metric]})
                rows[-1] |= own | {"outer": found["n"], "seconds": found["seconds"]}
            said, true = card["accuracy"]["value"], found["accuracy"]
            print(f"{name}, {way}: accuracy by the card {said:.3f}, outside {true:.3f}", flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1])
    parser.add_argument("domain", help="a domain file")
    parser.add_argument("--images", type=Path, required=True, help="class folders")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="that share the folds")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cross_fitting"))
    args = parser.parse_args()
    table = pd.DataFrame(compare(Domain.load(args.domain), args))
    table.to_json(args.out / "cross_fitting.json", orient="records", indent=1)
    table["inside"] = table.outside.between(table.low, table.high)
    columns = ["value", "outside", "inside", "n", "outer", "seconds"]
    print(table.groupby(["metric", "way"], sort=False)[columns].mean().round(3).to_string())


if __name__ == "__main__":
    main()
