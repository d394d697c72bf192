"""accelerate launch train.py [DOMAIN_OR_RUN] [--any_training_argument VALUE]

Fine-tunes the domain's base model stage by stage, by the domain's recipe, into RUN/model, and fits
the strong probe that it has to beat. DOMAIN_OR_RUN is a domain file (the run is runs/<domain
name>), or a run directory that data_prep made; by default the embedded façades. Ctrl-C and SIGTERM
write a checkpoint first; `--resume_from_checkpoint True` goes on from the last one, however the run
ended. With `evaluation: cross_fit` a model is trained for each fold besides, into RUN/folds; the
processes of a launch share the folds.
"""

import signal
import sys
from pathlib import Path

from safetensors import SafetensorError

from data_prep.prepare import prepare
from nicheclip import run as run_directory
from nicheclip.domain import Domain
from nicheclip.processes import check_launch, keep_freed_memory, processes
from nicheclip.training.arguments import StagedTrainingArguments, parse_arguments
from nicheclip.training.cross_fit import CrossFit, leave_launch, wait_for_first
from nicheclip.training.fit import begin, fit
from nicheclip.training.record import training_text
from nicheclip.training.stages import check_stages
from nicheclip.training.trainer import StagedTrainer

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


def train(argv: list[str]) -> StagedTrainer | CrossFit:
    """Prepares the data where there is none, and fine-tunes; `main` but for the errors."""
    named = bool(argv) and not argv[0].startswith("--")
    target, options = (Path(argv[0]), argv[1:]) if named else (DEFAULT_DOMAIN, argv)
    check_launch()
    domain, run = locate(target)
    cross_fit = domain.evaluation == "cross_fit"
    rank = leave_launch() if cross_fit else 0
    state = processes()  # before the arguments make a process group that waits for half an hour
    args = parse_arguments(domain, run, options)
    check_stages(domain.base, domain.stages)
    if rank == 0:  # it prepares, and holds the lock for the others
        unprepared = not (run / "data").is_dir()
        state.wait_for_everyone()  # so that all have looked before one of them writes
        if unprepared:
            prepare(domain, run)
        with run_directory.run_lock(run):
            return fine_tune(domain, run, args)
    wait_for_first(run)
    return fine_tune(domain, run, args, helps=True)


def locate(target: Path) -> tuple[Domain, Path]:
    """The domain and its run directory, from either of them."""
    files = ("data/dataset_dict.json", "checkpoints", "training.json")
    is_run = any((target / name).exists() for name in files)
    domain = Domain.load(target)
    return domain, target if is_run else Path("runs") / domain.name


def fine_tune(
    domain: Domain, run: Path, args: StagedTrainingArguments, helps: bool = False
) -> StagedTrainer | CrossFit:
    """Trains on RUN/data; writes RUN/model, training.json and trained_on.json.

    Args:
        helps: whether another process of the launch does all but the folds that this one takes.
    """
    asked = args.resume_from_checkpoint or "false"
    resume: bool | str = {"true": True, "false": False}.get(asked.lower(), asked)
    with args.main_process_first(desc="preparing data"):
        splits, report = run_directory.load_prepared(run), run_directory.read_report(run)
        rows, models = run_directory.trainings(run, splits)
        run_directory.check_unchanged(domain, report, rows.features["label"].names)
    trained: StagedTrainer | CrossFit
    if len(models) > 1:
        args.output_dir = str(run / run_directory.FOLDS)
        trained = CrossFit(domain, run, rows, models, args, report["fingerprint"], resume)
        if helps:
            trained.train_folds()
            return trained
    else:
        trained = begin(domain, args, splits["train"], splits["validation"])
    deciding = {"classes", "clusters", "augmentation", "stages"}
    of_domain = domain.model_dump(mode="json", include=deciding)
    settings = {"data_fingerprint": report["fingerprint"], **args.recorded(), **of_domain}
    run_directory.begin_training(run, Path(args.output_dir), settings, bool(resume))
    if isinstance(trained, CrossFit):
        training = trained.train()
    else:
        training = fit(trained, run, run, report["fingerprint"], resume)
    if processes().is_main_process:
        domain.save(run / "domain.yaml")
        print(training_text(training))
        print(f"in {run / 'model'}; next: python calibrate.py {run}")
    return trained


if __name__ == "__main__":
    main()
