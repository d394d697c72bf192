"""Cross-fitting: a model for each fold, which has not seen it, and one that has seen all.

The principle of scikit-learn's `CalibratedClassifierCV(ensemble=False)`. What a fold's model is
asked has no say in it: its choices (rates, start, sampling, mixtures) are made by a training on the
folds but its own and the next one, which validates; then it is trained on both without a choice.
The final model's choices are the folds' own, taken together.

Processes of one launch share the folds: each takes the next one that nobody is at.
"""

import copy
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock, Timeout

from nicheclip.domain import Domain
from nicheclip.files import read_json, write_json
from nicheclip.recipe import GRIDS, Stage
from nicheclip.run import FOLDS, Training
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.fit import begin, fit
from nicheclip.training.wise_ft import best_alpha

RECORD = "training.json"
LAUNCH = "launch.json"  # tells the other processes of a launch that the folds may begin


def settled(
    domain: Domain, choices: Sequence[dict[str, Any]], repeats: float, retention_drop: float
) -> tuple[Domain, float]:
    """The domain without anything left to choose: what had the lowest mean NLL on validation.

    Args:
        choices: training.json of trainings with the same stages.
        repeats: as in `Stage.variants`.

    Returns:
        its stages have one variant each, keep their last epoch, and a mix of 0 where they gain
        nothing; and the alpha of WiSE-FT.
    """
    stages = []
    for stage, *noted in zip(domain.stages, *(each["stages"] for each in choices), strict=True):
        if stage.mix == [0.0]:
            stages.append(stage)
            continue
        variants = stage.variants(repeats)
        losses = [
            np.mean([each["tried"][index].get("eval_nll", np.inf) for each in noted])
            for index in range(len(variants))
        ]
        index = int(np.argmin(losses))
        update: dict[str, Any] = {"keep": "last", "mix": [_mix(stage, noted)]}
        epochs = [each["tried"][index].get("epoch") for each in noted]
        if stage.keep == "best":
            seen = [epoch for epoch in epochs if epoch]
            update |= {"epochs": [round(np.median(seen))]} if seen else {"mix": [0.0]}
        stages.append(variants[index].model_copy(update=update))
    tables = [each["wise_ft"]["mixtures"] for each in choices]
    together = [_mean(rows) for rows in zip(*tables, strict=True)]
    asked = choices[0]["wise_ft"]["asked"]
    alpha = best_alpha(together, retention_drop) if asked == "auto" else float(asked)
    return domain.model_copy(update={"stages": stages}), alpha


def _mix(stage: Stage, noted: list[dict[str, Any]]) -> float:
    """The share of a stage that has the lowest mean NLL."""
    losses = {share: 0.0 for share in stage.mix}
    for each in noted:
        found = {row["mix"]: row.get("eval_nll", 0.0) for row in each["mixes"]}
        for share in losses:
            losses[share] += found.get(share, np.inf)
    return min(losses, key=losses.__getitem__) if np.isfinite(min(losses.values())) else 0.0


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the same alpha in several tables of `choose_alpha`."""
    kept = [row["retention"] and row["retention"]["value"] for row in rows]
    return {
        "alpha": rows[0]["alpha"],
        "nll": np.mean([row["nll"] for row in rows]),
        "retention": None if None in kept else {"value": np.mean(kept)},
    }


class CrossFit:
    """The trainings of a cross-fitted run.

    Args:
        rows: all images of the run.
        models: as `nicheclip.run.trainings` gives them.
        args: `output_dir` is replaced by a folder for each training.
        data_fingerprint: for the records.
        resume: whether trainings go on from their checkpoints.
    """

    def __init__(
        self,
        domain: Domain,
        run: Path,
        rows: datasets.Dataset,
        models: list[Training],
        args: StagedTrainingArguments,
        data_fingerprint: str,
        resume: bool | str,
    ):
        if isinstance(resume, str):
            raise ValueError(
                f"--resume_from_checkpoint is '{resume}'; with evaluation: cross_fit expected True"
            )
        self.domain, self.run, self.rows, self.args = domain, run, rows, args
        self.data_fingerprint, self.resume = data_fingerprint, resume
        *self.folds, self.final = models

    def train(self) -> dict[str, Any]:
        """All folds, and then the model that is published; its training.json."""
        self._encode()
        write_json(self.run / FOLDS / LAUNCH, {"launcher": os.getppid()})  # the others may begin
        self.train_folds()
        self.train_folds(waits=True)
        choices = [read_json(fold.folder / "choice" / RECORD, "") for fold in self.folds]
        print("the published model: training on all folds", flush=True)
        return self._train_settled(choices, self.run, self.final)

    def _encode(self) -> None:
        """What all trainings see of the images, so that they find it."""
        final = self.final
        args = copy.copy(self.args)
        args.output_dir = str(self.run / FOLDS / "final")
        trainer = begin(
            self.domain, args, self.rows, self.rows, final.repeats, final.validation, judged=False
        )
        _ = trainer.features.of_base

    def train_folds(self, waits: bool = False) -> None:
        """Trains the folds that nobody has trained; those that others are at, if it `waits`."""
        for number, fold in enumerate(self.folds, 1):
            fold.folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(fold.folder / ".lock", timeout=-1 if waits else 0):
                    if not (fold.folder / RECORD).is_file():
                        self._train_fold(fold, number)
            except Timeout:  # another process is at it
                continue

    def _train_fold(self, fold: Training, number: int) -> None:
        name = f"fold {number} of {len(self.folds)}"
        choosing = fold.folder / "choice"
        if not (choosing / RECORD).is_file():
            print(f"{name}: choosing, by the fold after it", flush=True)
            repeats = fold.repeats.copy()
            repeats[fold.validation] = 0
            self._train(self.domain, choosing, repeats, fold.validation)
            shutil.rmtree(choosing / "model")
        choice = read_json(choosing / RECORD, "")
        print(f"{name}: training on all other folds", flush=True)
        self._train_settled([choice], fold.folder, fold)

    def _train_settled(
        self, choices: list[dict[str, Any]], folder: Path, of: Training
    ) -> dict[str, Any]:
        repeats = float(of.repeats[of.repeats > 0].mean())
        domain, alpha = settled(self.domain, choices, repeats, self.args.retention_drop)
        return self._train(domain, folder, of.repeats, of.validation, alpha)

    def _train(
        self,
        domain: Domain,
        folder: Path,
        repeats: np.ndarray,
        validation: np.ndarray,
        alpha: float | None = None,
    ) -> dict[str, Any]:
        """Fits one model, and removes its checkpoints; with an alpha nothing is left to choose."""
        args = copy.copy(self.args)
        own = self.run / FOLDS / "final" if folder == self.run else folder
        args.output_dir = str(own / "checkpoints")
        if alpha is not None:
            args.wise_ft = str(alpha)
        trainer = begin(
            domain, args, self.rows, self.rows, repeats, validation, judged=alpha is None
        )
        told = {}
        if alpha is not None:
            fields = {"name", *GRIDS, "mix"}
            told["settled"] = [stage.model_dump(include=fields) for stage in domain.stages]
        record = fit(trainer, self.run, folder, self.data_fingerprint, self.resume, **told)
        shutil.rmtree(own / "checkpoints", ignore_errors=True)
        return record


def leave_launch() -> int:
    """Makes this process one of its own, on a GPU of its own; which of the launch it was.

    To be called before anything asks how many processes there are.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return 0
    local, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        del os.environ[name]
    return int(os.environ.pop("RANK"))


def wait_for_first(run: Path) -> None:
    """Until the first process of the launch has prepared all; the launcher ends us if it fails."""
    path = run / FOLDS / LAUNCH
    while not (path.is_file() and read_json(path, "")["launcher"] == os.getppid()):
        time.sleep(0.5)
