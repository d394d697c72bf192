"""accelerate launch train.py [DOMAIN_OR_RUN] [--any_training_argument VALUE]

Fine-tunes the domain's base model stage by stage and keeps the epoch that is best on validation in RUN/model.
DOMAIN_OR_RUN is a domain file (the run is runs/<domain name>), or a run directory that data_prep made. Without it, the
embedded façades are trained. `--resume_from_checkpoint True` goes on where a run was interrupted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import accelerate
import torch
import transformers
from transformers import HfArgumentParser, set_seed

from data_prep.prepare import prepare
from data_prep.shards import processes
from nicheclip.data import TrainingVisits, image_side, load_prepared
from nicheclip.domain import Domain, DomainError
from nicheclip.results import format_table, read_json, replaced_folder, write_json
from nicheclip.run import check_same_data, start_afresh
from nicheclip.trainer import StagedTrainer, StagedTrainingArguments
from nicheclip.zero_shot import load_clip

DEFAULT_DOMAIN = Path(__file__).parent / "domains" / "facades"


def main() -> None:
    try:
        train(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


def train(argv: list[str]) -> StagedTrainer:
    target, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("--") else (DEFAULT_DOMAIN, argv)
    state = processes()  # before the arguments make a process group that waits for half an hour only
    domain, run = locate(Path(target))
    args = parse_arguments(domain, run, options)
    resume = parse_resume(args.resume_from_checkpoint)
    unprepared = not (run / "data").is_dir()
    state.wait_for_everyone()  # so that all have looked before one of them writes
    if unprepared:
        prepare(domain, run)
    with args.main_process_first(desc="preparing data"):
        splits = load_prepared(run)
        report = read_json(run / "data" / "report.json", f"run `python -m data_prep {target}` again")
        check_unchanged(domain, report, splits["train"].features["label"].names)
        if resume is not None:
            check_same_data(Path(args.output_dir), report["fingerprint"])
        elif args.process_index == 0:
            start_afresh(run, Path(args.output_dir), report["fingerprint"])

    set_seed(args.seed)
    model, processor = load_clip(domain.base)
    prompts = list(domain.classes.values())
    trainer = StagedTrainer(
        model,
        args,
        stages=domain.stages,
        canonical_prompts=domain.canonical_prompts,
        class_clusters=domain.class_clusters,
        processor=processor,
        train_dataset=TrainingVisits(splits["train"], prompts, domain.augmentation, image_side(processor), args.seed),
        eval_dataset=splits["validation"],
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        save_model(trainer, run, domain)
        record(trainer, run, report["fingerprint"], time.perf_counter() - started)
    return trainer


def locate(target: Path) -> tuple[Domain, Path]:
    """The domain and its run directory, from either of them."""
    domain = Domain.load(target)
    is_run = target.is_dir() and (target / "data" / "dataset_dict.json").is_file()
    return domain, target if is_run else Path("runs") / domain.name


def parse_arguments(domain: Domain, run: Path, options: list[str]) -> StagedTrainingArguments:
    """Command line over domain file over defaults."""
    parser = HfArgumentParser(StagedTrainingArguments, prog="train.py", description=__doc__)
    known = StagedTrainingArguments.__dataclass_fields__
    unknown = sorted(set(domain.training) - set(known))
    if unknown:
        raise DomainError(f"training: unknown key '{unknown[0]}'; expected a field of transformers' TrainingArguments")
    parser.set_defaults(**{"output_dir": str(run / "checkpoints"), **domain.training})
    return parser.parse_args_into_dataclasses(options)[0]


def parse_resume(value: str | None) -> str | bool | None:
    """TrainingArguments has a path; True and False are meant as such."""
    return {"true": True, "false": None}.get((value or "false").lower(), value)


def save_model(trainer: StagedTrainer, run: Path, domain: Domain) -> None:
    """Writes RUN/model, and the domain as it was trained; not `Trainer.save_model`, which adds a pickle."""
    with replaced_folder(run / "model") as folder:
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    domain.save(run / "domain.yaml")


def check_unchanged(domain: Domain, report: dict, class_names: list[str]) -> None:
    """Prompts, stages and augmentation may change after data_prep; what it depends on may not."""
    if class_names != domain.class_names or report["base"] != domain.base:
        raise DomainError(
            f"the data was prepared for {len(class_names)} classes and the base '{report['base']}', the domain has "
            f"{len(domain.classes)} classes and the base '{domain.base}'; run `python -m data_prep` again, or give "
            "train.py the run directory instead of the domain file"
        )
    changed = [name for name, value in report["settings"].items() if domain.model_dump(mode="json")[name] != value]
    if changed:
        raise DomainError(
            f"{', '.join(changed)} changed in the domain file after data_prep; run `python -m data_prep` again, or "
            "change it back"
        )


def record(trainer: StagedTrainer, run: Path, fingerprint: str, seconds: float) -> None:
    """Writes RUN/training.json and prints the table of epochs."""
    training = trainer.training_record()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    written = {"data_fingerprint": fingerprint, **training, "seconds": round(seconds, 1), "versions": versions}
    write_json(run / "training.json", written)
    rows = [
        [
            f"{row['epoch']}{' *' if row['epoch'] == training['best_epoch'] else ''}",
            f"{row['loss']:.3f}",
            f"{row['eval_accuracy']:.1%}",
            f"{row['eval_macro_f1']:.3f}",
            row["stage"],
        ]
        for row in training["epochs"]
    ]
    print(format_table(["epoch", "loss", "val accuracy", "val macro F1", "stage"], rows))
    print(f"* the best on validation, kept in {run / 'model'} ({seconds:.0f} s); next: python calibrate.py {run}")


if __name__ == "__main__":
    main()
