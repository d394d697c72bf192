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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets import DatasetDict
from filelock import FileLock, Timeout

from nicheclip.domain import Domain, DomainError
from nicheclip.files import read_json, write_json
from nicheclip.processes import processes

# they speak of one model
RESULTS = ("training.json", "trained_on.json", "calibration.json", "scorecard.json")
TRAINED_ON = "trained_on.json"
CLASS_MEANS_FILE = "class_means.safetensors"
SPLITS = ("train", "validation", "calibration", "test")
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
    old = [*checkpoints.glob("checkpoint-*"), *checkpoints.glob("[0-9]*-*/**/checkpoint-*")]
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


def write_trained_on(run: Path, splits: DatasetDict) -> None:
    """RUN/trained_on.json: the files that training and its choice of the epoch saw, by sha256."""
    seen = {name: sorted(set(splits[name]["sha256"][:])) for name in ("train", "validation")}
    write_json(run / TRAINED_ON, seen)


def check_exam(run: Path, splits: DatasetDict) -> None:
    """Refuses to judge a model on images that it, or the choice of its epoch, may have seen.

    Raises:
        ValueError: if near-duplicates of the exam were seen, or the data is another than then.
    """
    remedy = f"run `accelerate launch train.py {run}` again"
    seen = {
        sha256: f"the {name} images of the training"
        for name, images in read_json(run / TRAINED_ON, remedy).items()
        for sha256 in images
    }
    leaks = []
    for name in SPLITS:
        columns = [splits[name][column][:] for column in ("source_id", "sha256", "group_id")]
        if name in ("calibration", "test"):
            for source_id, sha256, group in zip(*columns, strict=True):
                if where := seen.get(sha256) or seen.get(group):
                    leaks.append(f"{source_id} ({name}; it or a near-duplicate is among {where})")
        seen = dict.fromkeys([*columns[1], *columns[2]], f"the {name} split") | seen
    if leaks:
        told = ", ".join([*leaks[:5], "…"] if len(leaks) > 5 else leaks)
        raise ValueError(
            f"{len(leaks)} images of the calibration and test splits of '{run}' have been seen "
            f"before, so the scorecard would flatter: {told}; run `python -m data_prep` again, "
            f"then {remedy}"
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


def features(class_names: list[str]) -> datasets.Features:
    """The columns of a prepared dataset."""
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=class_names),
            "source_id": datasets.Value("string"),
            "group_id": datasets.Value("string"),
            "sha256": datasets.Value("string"),
            # the base's probability of the own label; null outside of train, which is filtered
            "zero_shot_score": datasets.Value("float32"),
            "repeats": datasets.Value("int32"),  # visits in an epoch: oversampling without copies
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
