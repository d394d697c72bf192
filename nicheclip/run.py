"""The run directory: no result in it may speak of another model or of other data."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import DatasetDict
from filelock import FileLock, Timeout

from nicheclip.domain import SPLITS, Domain, DomainError
from nicheclip.files import read_json, write_json
from nicheclip.processes import processes

# they speak of one model
RESULTS = ("training.json", "trained_on.json", "calibration.json", "scorecard.json")
TRAINED_ON = "trained_on.json"
FOLDS = "folds"  # the folder of a cross-fitted run that holds the models of the folds
CLASS_MEANS_FILE = "class_means.safetensors"
BEGUN = "begun.json"  # beside the checkpoints: the data and the settings that they depend on
# filelock may empty the file that it locks, so who holds it stands in another
LOCK, HOLDER = ".lock", ".holder"
LOCK_SECONDS = 2  # the workers of a command that was killed hold its lock until they notice
PACKAGES = ("accelerate", "datasets", "numpy", "pillow", "torch", "transformers")


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Keeps other commands from writing to the same run directory.

    The main process holds the lock for the others. The system lets go of it when its holder ends,
    however it ends: a lock file that is left behind is no lock.

    Raises:
        BlockingIOError: if another live process holds it; names the process and its command.
    """
    if not processes().is_main_process:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(run / LOCK).acquire(timeout=LOCK_SECONDS)
    except Timeout:
        named = run / HOLDER
        holder = named.read_text(encoding="utf-8") if named.is_file() else "another command"
        raise BlockingIOError(
            f"{holder} is at work on '{run}'; wait for it, end it, or choose another run"
        ) from None
    with held:
        (run / HOLDER).write_text(f"process {os.getpid()} ({_command()})", encoding="utf-8")
        yield


def provenance() -> dict[str, Any]:
    """What a result was made with: command, versions, and the commit if this is a git clone."""
    root = Path(__file__).parents[1]
    commit = None
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": _command(),
        "git_commit": commit,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _command() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])


def begin_training(run: Path, checkpoints: Path, settings: dict[str, Any], resume: bool) -> None:
    """Removes what speaks of the model that goes and, but for a resume, its checkpoints.

    Raises:
        ValueError: if they are of an unfinished training that is not resumed, or of one that was
            begun on other data or with other settings; names the setting.
    """
    if resume:
        begun = read_json(checkpoints / BEGUN, "there is no training to resume")
        for name, value in json.loads(json.dumps(settings)).items():
            if (then := begun.get(name)) != value:
                compound = isinstance(value, dict | list)
                change = "has changed" if compound else f"was {then} and is {value} now"
                raise ValueError(
                    f"since '{checkpoints}' was begun, {name} {change}; change it back or remove it"
                )
    patterns = "checkpoint-*", "[0-9]*-*/**/checkpoint-*", "fold_*", "final"
    old = [path for pattern in patterns for path in checkpoints.glob(pattern)]
    if not resume and old and not (run / "training.json").is_file():
        raise ValueError(
            f"'{checkpoints}' holds an unfinished training; go on with --resume_from_checkpoint "
            "True, or remove it"
        )
    processes().wait_for_everyone()  # so that all have looked before one of them writes
    if processes().is_main_process:
        for name in RESULTS:
            (run / name).unlink(missing_ok=True)
        if not resume:
            for checkpoint in old:
                shutil.rmtree(checkpoint)
            write_json(checkpoints / BEGUN, settings)


@dataclass(frozen=True)
class Training:
    """What one model of a run is trained on and asked; row numbers of `trainings`.

    Attributes:
        folder: holds its model.
        repeats: (R,) how often a balanced epoch has each row; 0: never.
        validation: the rows that choose.
        calibration: the rows whose answers calibrate it, each by a model that has not seen it.
        exam: what it is examined on; none for the final model of a cross-fitted run.
    """

    folder: Path
    repeats: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray
    exam: np.ndarray


def trainings(run: Path, splits: DatasetDict) -> tuple[datasets.Dataset, list[Training]]:
    """The rows of all splits, one after the other, and the models of the run, the published last.

    Of a cross-fitted run those of the folds, which validate on the fold after their own, are
    calibrated on all others', and examined on their own; and the final one.
    """
    rows = datasets.concatenate_datasets(list(splits.values()))
    ends = np.cumsum([len(each) for each in splits.values()])
    places = np.split(np.arange(len(rows)), ends[:-1])
    repeats = np.array(rows["repeats"])
    if "train" in splits:
        train, validation, calibration, test = (places[list(splits).index(name)] for name in SPLITS)
        repeats[len(train) :] = 0
        return rows, [Training(run, repeats, validation, calibration, test)]
    found, everything = [], np.arange(len(rows))
    for number, (name, own) in enumerate(zip(splits, places, strict=True)):
        validation, others = places[(number + 1) % len(places)], np.setdiff1d(everything, own)
        own_folder = run / FOLDS / name
        found.append(Training(own_folder, repeats[:, number], validation, others, own))
    final = Training(run, repeats[:, -1], places[0], everything, everything[:0])
    return rows, [*found, final]


def check_exam(run: Path, splits: DatasetDict) -> None:
    """Refuses to judge a model on images that it, or a choice made for it, may have seen.

    Raises:
        ValueError: if near-duplicates of the exam were seen, or the data is another than then.
    """
    remedy = f"run `accelerate launch train.py {run}` again"
    rows, models = trainings(run, splits)
    names = np.repeat(list(splits), [len(each) for each in splits.values()])
    columns = "source_id", "sha256", "group_id"
    source_ids, hashes, groups = (np.array(rows[column]) for column in columns)
    leaks = {}
    for model in models:
        files = read_json(model.folder / TRAINED_ON, remedy)
        trained = np.union1d(np.flatnonzero(model.repeats), model.validation)
        asked = [(model.exam, np.setdiff1d(np.arange(len(rows)), model.exam))]
        if len(models) == 1:
            asked.append((model.calibration, trained))
        for images, others in asked:
            known = zip(names[others].tolist() * 2, [*hashes[others], *groups[others]], strict=True)
            seen = {key: f"the {name} split" for name, key in known}
            for name, own in files.items():
                seen |= dict.fromkeys(own, f"the {name} images of the training")
            for row in images.tolist():
                if where := seen.get(hashes[row]) or seen.get(groups[row]):
                    told = f"({names[row]}; it or a near-duplicate is among {where})"
                    leaks[row] = f"{source_ids[row]} {told}"
    if leaks:
        first = ", ".join([*list(leaks.values())[:5], *(["…"] if len(leaks) > 5 else [])])
        raise ValueError(
            f"{len(leaks)} images that '{run}' is examined on have been seen before, so the "
            f"scorecard would flatter: {first}; run `python -m data_prep` again, then {remedy}"
        )
    trained_on = read_json(run / "training.json", remedy, ["data_fingerprint"])
    if trained_on["data_fingerprint"] != read_report(run)["fingerprint"]:
        raise ValueError(
            f"'{run / 'model'}' was trained on other data than '{run / 'data'}' holds now; {remedy}"
        )


def read_report(run: Path) -> dict[str, Any]:
    """RUN/data/report.json. Raises: FileNotFoundError or ValueError, as `read_json`."""
    remedy = f"run `python -m data_prep DOMAIN --run {run}` again"
    return read_json(run / "data" / "report.json", remedy, ["base", "settings", "fingerprint"])


def check_unchanged(domain: Domain, report: dict, class_names: list[str]) -> None:
    """Prompts, stages and augmentation may change after data_prep; what it depends on may not.

    Raises: DomainError if it has.
    """
    if class_names != domain.class_names or report["base"] != domain.base:
        raise DomainError(
            f"the data was prepared for {len(class_names)} classes and '{report['base']}', the "
            f"domain has {len(domain.classes)} classes and '{domain.base}'; run `python -m "
            "data_prep` again, or give train.py the run directory"
        )
    now = domain.model_dump(mode="json")
    changed = [name for name, value in report["settings"].items() if now[name] != value]
    if changed:
        raise DomainError(
            f"{', '.join(changed)} changed in the domain file after data_prep; run `python -m "
            "data_prep` again, or change it back"
        )


def features(class_names: list[str], cross_fit: bool = False) -> datasets.Features:
    """The columns of a prepared dataset."""
    visits: Any = datasets.Value("int32")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=class_names),
            "source_id": datasets.Value("string"),
            "group_id": datasets.Value("string"),
            "sha256": datasets.Value("string"),
            # the base's probability of the own label; null for what never trains
            "zero_shot_score": datasets.Value("float32"),
            # visits in an epoch: oversampling without copies; with cross-fitting those of the model
            # of each fold (none of its own images), and of the final model
            "repeats": datasets.List(visits) if cross_fit else visits,
            "attribution": datasets.Value("string"),
        }
    )


def load_prepared(run: str | Path) -> datasets.DatasetDict:
    """RUN/data. Raises: ValueError if data_prep has not made it, or it is damaged."""
    folder = Path(run) / "data"
    try:
        return DatasetDict.load_from_disk(str(folder))
    # a file of it is missing, cut short or foreign
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"'{folder}' holds no prepared data, or it is damaged ({error}); run `python -m "
            f"data_prep DOMAIN --run {run}`"
        ) from error


def load_retention(run: str | Path) -> datasets.Dataset | None:
    """RUN/data/retention: images and labels of the task that should not be forgotten, if any."""
    folder = Path(run) / "data" / "retention"
    return datasets.load_from_disk(folder) if folder.is_dir() else None
