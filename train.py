"""accelerate launch train.py [DOMAIN_OR_RUN] [--any_training_argument VALUE]

Fine-tunes the domain's base model stage by stage and keeps the epoch that is best on validation in
RUN/model. DOMAIN_OR_RUN is a domain file (the run is runs/<domain name>), or a run directory that
data_prep made. Without it, the embedded façades are trained. Ctrl-C and SIGTERM write a checkpoint
first; `--resume_from_checkpoint True` goes on from the last one, however the run ended. `--wise_ft
auto` mixes the result with the base as validation likes it best.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import HfArgumentParser, set_seed

from data_prep.prepare import prepare
from nicheclip.clip import load_clip
from nicheclip.domain import Domain, DomainError
from nicheclip.files import replaced_folder, write_json
from nicheclip.processes import keep_freed_memory, processes
from nicheclip.run import (
    begin,
    check_begun_alike,
    check_not_begun,
    check_unchanged,
    load_prepared,
    load_retention,
    provenance,
    read_report,
    run_lock,
    write_trained_on,
)
from nicheclip.training.arguments import StagedTrainingArguments
from nicheclip.training.callbacks import TrainingInterrupted
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.record import print_training, training_record
from nicheclip.training.stages import check_stages
from nicheclip.training.trainer import StagedTrainer
from nicheclip.training.wise_ft import mix_with_base

DEFAULT_DOMAIN = Path(__file__).parent / "domains" / "facades"


def main() -> None:
    """The command line."""
    keep_freed_memory()
    try:
        train(sys.argv[1:])
    except TrainingInterrupted as interrupted:
        print(f"train.py: {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.signal)
    # the last: no room for the weights
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        sys.exit(f"train.py: {error}")


def train(argv: list[str]) -> StagedTrainer:
    """Prepares the data where there is none, and fine-tunes.

    What `main` does, but for the errors.
    """
    target, options = (
        (argv[0], argv[1:]) if argv and not argv[0].startswith("--") else (DEFAULT_DOMAIN, argv)
    )
    # before the arguments make a process group that waits for half an hour only
    state = processes()
    domain, run = locate(Path(target))
    args = parse_arguments(domain, run, options)
    check_stages(domain.base, domain.stages)
    resume = parse_resume(args.resume_from_checkpoint)
    unprepared = not (run / "data").is_dir()
    state.wait_for_everyone()  # so that all have looked before one of them writes
    if unprepared:
        prepare(domain, run)
    with run_lock(run):
        return fine_tune(domain, run, args, resume)


def fine_tune(
    domain: Domain, run: Path, args: StagedTrainingArguments, resume: str | bool | None
) -> StagedTrainer:
    """Trains on RUN/data, all stages.

    Writes RUN/model, RUN/training.json and RUN/trained_on.json.
    """
    with args.main_process_first(desc="preparing data"):
        splits = load_prepared(run)
        report = read_report(run)
        check_unchanged(domain, report, splits["train"].features["label"].names)
        if resume is None:
            check_not_begun(run, Path(args.output_dir))
    outside = (
        (load_retention(run), domain.retention.canonical_prompts) if domain.retention else None
    )
    set_seed(args.seed)
    model, processor = load_clip(domain.base)
    samples = TrainingSamples(
        splits["train"], domain.prompt_bank[1], domain.augmentation, processor, args.seed
    )
    trainer = StagedTrainer(
        model, args, domain, processor, samples, Views(splits["validation"], processor)
    )
    of_domain = domain.model_dump(mode="json", include={"classes", "clusters", "augmentation"})
    settings = {"data_fingerprint": report["fingerprint"], **trainer.settings(), **of_domain}
    if resume is not None:
        check_begun_alike(Path(args.output_dir), settings)
    trainer.accelerator.wait_for_everyone()  # so that all have looked before one of them writes
    if trainer.is_world_process_zero():
        begin(run, Path(args.output_dir), settings, resume is not None)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        facts = {
            "data_fingerprint": report["fingerprint"],
            "seconds": round(time.perf_counter() - started, 1),
        }
        mixed = mix_with_base(
            domain.base,
            trainer.model,
            args.wise_ft,
            splits["validation"],
            domain.canonical_prompts,
            outside,
        )
        save_model(trainer, run)
        write_trained_on(run, splits)
        training = (
            facts | {"resumed": resume is not None, "wise_ft": mixed} | training_record(trainer)
        )
        write_json(run / "training.json", training | {"provenance": provenance()})
        print_training(training)
        since = " since it was resumed" if training["resumed"] else ""
        print(
            f"in {run / 'model'} ({training['seconds']:.0f} s{since}); next: python calibrate.py "
            f"{run}"
        )
    return trainer


def locate(target: Path) -> tuple[Domain, Path]:
    """The domain and its run directory, from either of them."""
    domain = Domain.load(target)
    is_run = any(
        (target / name).exists()
        for name in ("data/dataset_dict.json", "checkpoints", "training.json")
    )
    return domain, target if is_run else Path("runs") / domain.name


def parse_arguments(domain: Domain, run: Path, options: list[str]) -> StagedTrainingArguments:
    """Command line over domain file over defaults."""
    arguments: Any = StagedTrainingArguments  # transformers asks for a NewType that no class has
    parser = HfArgumentParser(arguments, prog="train.py", description=__doc__)
    known = StagedTrainingArguments.__dataclass_fields__
    unknown = sorted(set(domain.training) - set(known))
    if unknown:
        raise DomainError(
            f"training: unknown key '{unknown[0]}'; expected a field of transformers' "
            "TrainingArguments"
        )
    of_run = {
        "output_dir": str(run / "checkpoints"),
        "feature_cache": str(run / "cache" / "features"),
    }
    parser.set_defaults(**of_run | domain.training)
    return parser.parse_args_into_dataclasses(options)[0]


def parse_resume(value: str | None) -> str | bool | None:
    """TrainingArguments has a path; True and False are meant as such."""
    return {"true": True, "false": None}.get((value or "false").lower(), value)


def save_model(trainer: StagedTrainer, run: Path) -> None:
    """Writes RUN/model, and the domain as it was trained."""
    with replaced_folder(run / "model") as folder:
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.domain.save(run / "domain.yaml")


if __name__ == "__main__":
    main()
