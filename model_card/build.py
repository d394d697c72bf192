"""Builds `RUN/hub` from what the earlier stages wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nicheclip.domain import Domain
from nicheclip.hub import save_published_model
from nicheclip.results import Measure, read_json

TEMPLATE = Path(__file__).parent / "template.md"
REPORTED = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "ece": "Expected calibration error"}


def build(run: Path, license_name: str = "other", repo_id: str | None = None) -> Path:
    """Builds the folder that is published and gives its path.

    Raises:
        FileNotFoundError: naming the stage that has not been run.
    """
    scorecard = read_json(run / "scorecard.json", f"run `python calibrate.py {run}` first")
    calibration = read_json(run / "calibration.json", f"run `python calibrate.py {run}` first")
    training = read_json(run / "training.json", f"run `accelerate launch train.py {run}` first")
    report = read_json(run / "data" / "report.json", "run `python -m data_prep` first")
    domain = Domain.load(run)

    unfinished = run / "hub.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_published_model(run, unfinished, domain, calibration)
    shutil.copytree(run / "figures", unfinished / "figures")
    for name in ("scorecard.json", "calibration.json"):
        shutil.copy(run / name, unfinished / name)
    card = make_card(domain, scorecard, calibration, training, report, license_name, repo_id)
    card.save(unfinished / "README.md")
    shutil.rmtree(run / "hub", ignore_errors=True)
    unfinished.rename(run / "hub")
    return run / "hub"


def make_card(
    domain: Domain,
    scorecard: dict[str, Any],
    calibration: dict[str, Any],
    training: dict[str, Any],
    report: dict[str, Any],
    license_name: str,
    repo_id: str | None,
) -> ModelCard:
    """The model card: every number in it comes from the files of the run."""
    measures = {name: Measure.from_dict(fields) for name, fields in scorecard["metrics"].items()}
    title = f"CLIP for {domain.title[0].lower()}{domain.title[1:]}"
    base_is_local = Path(domain.base).is_dir()
    card_data = ModelCardData(
        model_name=title,
        license=license_name,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=None if base_is_local else domain.base,
        tags=["clip", "nicheclip", "calibration"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type="nicheclip",
                dataset_name=f"{domain.title}, held-out test split",
                dataset_split="test",
                metric_type=name,
                metric_name=label,
                metric_value=measures[name].value,
            )
            for name, label in REPORTED.items()
        ],
    )
    return ModelCard.from_template(
        card_data,
        template_path=TEMPLATE,
        title=title,
        domain=domain,
        repo_id=repo_id or f"YOU/{domain.name}",
        base_name=Path(domain.base).name if base_is_local else domain.base,
        measures=measures,
        gates=scorecard["gates"],
        calibration=calibration,
        training=training,
        counts=report["counts"],
    )
