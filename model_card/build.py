"""Builds `RUN/hub` from what the earlier stages wrote."""

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from datasets import concatenate_datasets
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from model_card.dataset import attributions
from nicheclip.classifier import NicheClassifier
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import METRIC_TITLES, Measure
from nicheclip.files import read_json, replaced_folder
from nicheclip.images import encode_jpeg, open_image
from nicheclip.publishing.hub import save_published_model
from nicheclip.publishing.image_index import INDEX_FILE, write_index
from nicheclip.publishing.onnx import add_onnx
from nicheclip.run import load_prepared, read_report, run_lock
from nicheclip.training.record import settled_text, stage_text

DIVISION_SLASH = "\N{DIVISION SLASH}"  # a file's name may hold this one


def build(
    run: Path,
    license_name: str = "other",
    repo_id: str | None = None,
    examples: int = 0,
    onnx: bool = False,
    index: Sequence[str] = (),
) -> None:
    """Builds RUN/hub, the folder that is published; __main__.py tells the options.

    Raises:
        FileNotFoundError: naming the stage that has not been run.
        ImportError: if ONNX is wanted and not installed.
        ValueError: if there is no split of that name to index.
    """
    remedy = f"run `python calibrate.py {run}` first"
    scorecard = read_json(run / "scorecard.json", remedy, ["provenance", "ood", "evaluation"])
    calibration = read_json(run / "calibration.json", remedy, ["ood"])
    training = read_json(run / "training.json", f"run `accelerate launch train.py {run}` first")
    domain, splits, counts = Domain.load(run), load_prepared(run), read_report(run)["counts"]
    choices = [stage_text(stage) for stage in training["stages"]]
    if "settled" in training:
        choices = settled_text(training)
    measures = {name: Measure(**fields) for name, fields in scorecard["metrics"].items()}
    title = f"CLIP for {domain.title[0].lower()}{domain.title[1:]}"
    base = None if Path(domain.base).is_dir() else domain.base
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type="nicheclip",
            dataset_name=f"{domain.title}, {scorecard['evaluation'].partition(':')[0].lower()}",
            dataset_split="test" if "test" in splits else "train",
            metric_type=name,
            metric_name=METRIC_TITLES[name],
            metric_value=measures[name].value,
        )
        for name in ("accuracy", "macro_f1", "ece")
    ]
    card_data = ModelCardData(
        model_name=title,
        license=license_name,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        tags=["clip", "nicheclip", "calibration"],
        eval_results=results,
    )
    with run_lock(run), replaced_folder(run / "hub") as folder:
        save_published_model(run, folder, domain, calibration)
        shutil.copytree(run / "figures", folder / "figures")
        shutil.copy(run / "scorecard.json", folder)
        save_examples(run, folder / "examples", examples)
        if index:
            write_index(NicheClassifier.from_pretrained(folder), splits, index, folder / INDEX_FILE)
        card = ModelCard.from_template(
            card_data,
            template_path=str(Path(__file__).parent / "template.md"),
            title=title,
            domain=domain,
            evaluation=scorecard["evaluation"],
            cross_fitted="test" not in splits,
            repo_id=repo_id or f"YOU/{domain.name}",
            base=base,
            measures=measures,
            titles=METRIC_TITLES,
            gates=scorecard["gates"],
            never_right=[name for name, of in scorecard["classes"].items() if of["f1"] == 0],
            calibration=calibration,
            training=training,
            choices=choices,
            counts=counts,
            attributions=attributions(splits),
            onnx=add_onnx(run, folder) if onnx else None,
        )
        card.save(folder / "README.md")


def save_examples(run: Path, folder: Path, count: int) -> None:
    """The first image of each of `count` classes, walking the clusters side by side.

    Of the test split, if there is one.
    """
    domain, splits = Domain.load(run), load_prepared(run)
    rows = splits["test"] if "test" in splits else concatenate_datasets([*splits.values()])
    labels = [domain.class_names[label] for label in rows["label"]]
    side_by_side = zip_longest(*domain.clusters.values())
    for name in [name for row in side_by_side for name in row if name in labels][:count]:
        folder.mkdir(exist_ok=True)
        picture = open_image(rows[labels.index(name)]["image"])
        file = f"{name.replace('/', DIVISION_SLASH)}.jpg"
        (folder / file).write_bytes(encode_jpeg(picture, 95))
