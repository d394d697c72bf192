"""One model of a run: from the base to a folder that holds it, and how it came about."""

import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import set_seed

from nicheclip import run as run_directory
from nicheclip.clip import load_clip
from nicheclip.domain import Domain
from nicheclip.evaluation.probe import fit_strong_probe, save_strong_probe
from nicheclip.files import replaced_folder, write_json
from nicheclip.processes import processes
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.trainer import StagedTrainer
from nicheclip.training.wise_ft import mix_with_base


def begin(
    domain: Domain,
    args: StagedTrainingArguments,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    repeats: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    judged: bool = True,
) -> StagedTrainer:
    """The trainer of a model, from the base on.

    Args:
        train, validation: prepared images; where they are one, kept features serve for both.
        repeats: as in `TrainingSamples`.
        chosen: the rows that choose; they may train as well if they don't judge.
        judged: as in `StagedTrainer`.
    """
    set_seed(args.seed)
    model, processor = load_clip(domain.base)
    of_samples = domain.prompt_bank[1], domain.augmentation, processor, args.seed
    samples = TrainingSamples(train, *of_samples, repeats)
    views = Views(validation, processor, chosen)
    return StagedTrainer(model, args, domain, processor, samples, views, judged)


def fit(
    trainer: StagedTrainer,
    run: Path,
    folder: Path,
    data_fingerprint: str,
    resume: str | bool,
    **told: Any,
) -> dict[str, Any]:
    """Trains, and writes FOLDER/model, training.json, trained_on.json and the strong probe.

    Args:
        run: whose retention task is asked.
        resume: as in `StagedTrainer.train`.
        told: more for training.json.

    Returns:
        training.json; of the main process.
    """
    domain, args, samples = trainer.domain, trainer.args, trainer.train_dataset
    views, judged = trainer.features.validation, trainer.judged_by is not None
    started = time.perf_counter()
    parts = trainer.features.of_base
    strong_probe = fit_strong_probe(*parts, len(domain.classes), refit=not judged)
    trainer.train(resume_from_checkpoint=resume)
    if not processes().is_main_process:
        return {}
    seconds = round(time.perf_counter() - started, 1)
    validation = views.rows.select(views.chosen) if judged else None
    mixed = mix_with_base(domain, trainer.model, args, validation, run)
    with replaced_folder(folder / "model") as unfinished:
        trainer.model.save_pretrained(unfinished)
        trainer.processor.save_pretrained(unfinished)
    save_strong_probe(strong_probe, folder)
    seen = {
        name: sorted(set(np.array(each.rows["sha256"])[each.chosen].tolist()))
        for name, each in (("train", samples), ("validation", views))
    }
    write_json(folder / run_directory.TRAINED_ON, seen)
    training = {
        "data_fingerprint": data_fingerprint,
        "seconds": seconds,
        "resumed": bool(resume),
        "wise_ft": mixed,
        **trainer.record(),
        **told,
        "provenance": run_directory.provenance(),
    }
    write_json(folder / "training.json", training)  # last, since it says that the others are there
    return training
