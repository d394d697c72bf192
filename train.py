"""accelerate launch train.py [DOMAIN_OR_RUN] [--any_training_argument VALUE]

Fine-tunes the domain's base model stage by stage, by the domain's recipe, into RUN/model, and fits
the strong probe that it has to beat. DOMAIN_OR_RUN is a domain file (the run is runs/<domain
name>), or a run directory that data_prep made; by default the embedded façades. Ctrl-C and SIGTERM
write a checkpoint first; `--resume_from_checkpoint True` goes on from the last one, however the run
ended.
"""

import signal
import sys
import time
from pathlib import Path

from safetensors import SafetensorError
from transformers import set_seed

from data_prep.prepare import prepare
from nicheclip import run as run_directory
from nicheclip.clip import load_clip
from nicheclip.domain import Domain
from nicheclip.evaluation.probe import fit_strong_probe, save_strong_probe
from nicheclip.files import replaced_folder, write_json
from nicheclip.processes import keep_freed_memory, processes
from nicheclip.training.arguments import StagedTrainingArguments, parse_arguments
from nicheclip.training.data import TrainingSamples, Views
from nicheclip.training.record import training_text
from nicheclip.training.stages import check_stages
from nicheclip.training.trainer import StagedTrainer
from nicheclip.training.wise_ft import mix_with_base

DEFAULT_DOMAIN = Path(__file__).parent / "domains" / "facades"


def main() -> None:
    """The command line."""
    keep_freed_memory()
    try:
        train(sys.argv[1:])
    except KeyboardInterrupt as interrupted:
        told = str(interrupted) or "stopped by SIGINT; start it again"
        print(f"train.py: {told}", file=sys.stderr)
        sys.exit(128 + getattr(interrupted, "signal", signal.SIGINT))
    # The last: there is no room for the weights.
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        sys.exit(f"train.py: {error}")


def train(argv: list[str]) -> StagedTrainer:
    """Prepares the data where there is none, and fine-tunes; `main` but for the errors."""
    named = bool(argv) and not argv[0].startswith("--")
    target, options = (Path(argv[0]), argv[1:]) if named else (DEFAULT_DOMAIN, argv)
    state = processes()  # before the arguments make a process group that waits for half an hour
    domain, run = locate(target)
    args = parse_arguments(domain, run, options)
    check_stages(domain.base, domain.stages)
    unprepared = not (run / "data").is_dir()
    state.wait_for_everyone()  # so that all have looked before one of them writes
    if unprepared:
        prepare(domain, run)
    with run_directory.run_lock(run):
        return fine_tune(domain, run, args)


def locate(target: Path) -> tuple[Domain, Path]:
    """The domain and its run directory, from either of them."""
    files = ("data/dataset_dict.json", "checkpoints", "training.json")
    is_run = any((target / name).exists() for name in files)
    domain = Domain.load(target)
    return domain, target if is_run else Path("runs") / domain.name


def fine_tune(domain: Domain, run: Path, args: StagedTrainingArguments) -> StagedTrainer:
    """Trains on RUN/data; writes RUN/model, training.json and trained_on.json."""
    asked = args.resume_from_checkpoint or "false"
    resume = {"true": True, "false": None}.get(asked.lower(), asked)
    with args.main_process_first(desc="preparing data"):
        splits, report = run_directory.load_prepared(run), run_directory.read_report(run)
        names = splits["train"].features["label"].names
        run_directory.check_unchanged(domain, report, names)
    set_seed(args.seed)
    model, processor = load_clip(domain.base)
    samples = TrainingSamples(
        splits["train"], domain.prompt_bank[1], domain.augmentation, processor, args.seed
    )
    validation = Views(splits["validation"], processor)
    trainer = StagedTrainer(model, args, domain, processor, samples, validation)
    deciding = {"classes", "clusters", "augmentation", "stages"}
    of_domain = domain.model_dump(mode="json", include=deciding)
    settings = {"data_fingerprint": report["fingerprint"], **args.recorded(), **of_domain}
    run_directory.begin_training(run, Path(args.output_dir), settings, resume is not None)
    started = time.perf_counter()
    strong_probe = fit_strong_probe(*trainer.features.of_base, len(domain.classes))
    trainer.train(resume_from_checkpoint=resume)
    if processes().is_main_process:
        seconds = round(time.perf_counter() - started, 1)
        mixed = mix_with_base(domain, trainer.model, args, splits["validation"], run)
        with replaced_folder(run / "model") as folder:
            trainer.model.save_pretrained(folder)
            processor.save_pretrained(folder)
        save_strong_probe(strong_probe, run)
        domain.save(run / "domain.yaml")
        run_directory.write_trained_on(run, splits)
        training = {
            "data_fingerprint": report["fingerprint"],
            "seconds": seconds,
            "resumed": resume is not None,
            "wise_ft": mixed,
            **trainer.record(),
            "provenance": run_directory.provenance(),
        }
        write_json(run / "training.json", training)
        print(training_text(training))
        print(f"in {run / 'model'}; next: python calibrate.py {run}")
    return trainer


if __name__ == "__main__":
    main()
