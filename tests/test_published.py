"""What is published is what was measured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from scipy.special import logsumexp

import calibrate
import data_prep.__main__
import model_card.__main__
import train
from model_card.build import build
from nicheclip import NicheClassifier
from nicheclip.run import check_exam, load_prepared
from tests.conftest import ROOT

STOCK = """
import json, sys
import numpy as np, torch
from datasets import load_from_disk
from transformers import CLIPModel, CLIPProcessor
hub, data, out = sys.argv[1:]
model, processor = CLIPModel.from_pretrained(hub), CLIPProcessor.from_pretrained(hub)
prompts = [prompts[0] for prompts in json.load(open(f"{hub}/nicheclip.json"))["prompts"].values()]
images = [row["image"].convert("RGB") for row in load_from_disk(data)["test"]]
inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
with torch.inference_mode():
    np.save(out, model(**inputs).logits_per_image.softmax(dim=1).numpy())
"""


@pytest.fixture(scope="module")
def predictions(run: Path) -> Dataset:
    table, cache = str(run / "predictions.parquet"), str(run.parent / "cache")
    return Dataset.from_parquet(table, cache_dir=cache)


@pytest.fixture(scope="module")
def test_images(run: Path) -> list[Image.Image]:
    return [row["image"] for row in load_prepared(run)["test"]]


def test_stock_clip_in_a_new_process_gives_the_scorecards_probabilities(run, predictions, tmp_path):
    arguments = [str(run / "hub"), str(run / "data"), str(tmp_path / "probabilities.npy")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)
    assert np.load(arguments[2]) == pytest.approx(np.array(predictions["probabilities"]), abs=1e-5)


def test_the_classifier_gives_the_scorecards_probabilities(run, predictions, test_images):
    found = NicheClassifier.from_pretrained(run / "hub").probabilities(test_images)
    assert found == pytest.approx(np.array(predictions["probabilities"]), abs=1e-5)


def test_the_classifier_abstains_below_its_threshold(run, test_images):
    classifier = NicheClassifier.from_pretrained(run / "hub")
    for prediction in classifier(test_images):
        probabilities = list(prediction.probabilities.values())
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
        unsure = prediction.confidence < classifier.settings["abstention"]["threshold"]
        assert (prediction.label is None) == (prediction.outside or unsure)
        assert prediction.best in prediction.prediction_set
    with pytest.raises(TypeError, match=r"classifier\(\[image\]\)"):
        classifier(test_images[0])


def test_the_classifier_gives_the_scorecards_sets_and_ood_threshold(run, predictions, test_images):
    classifier = NicheClassifier.from_pretrained(run / "hub")
    measured = json.loads((run / "scorecard.json").read_text())["metrics"]
    given = classifier(test_images)
    sets = [set(each.prediction_set) for each in given]
    assert sets == [set(names) for names in predictions["prediction_set"]]
    covered = [label in own for label, own in zip(predictions["label"], sets, strict=True)]
    assert measured["conformal_coverage"]["value"] == pytest.approx(np.mean(covered))
    threshold = classifier.settings["ood"]["threshold"]
    outside = [each.outside for each in given]
    assert outside == [score < threshold for score in predictions["domain_score"]]
    assert measured["in_domain_accepted"]["value"] == pytest.approx(1 - np.mean(outside))


def test_the_prompt_bank_is_published_with_its_embeddings(run, predictions):
    embeds = load_file(run / "hub" / "prototypes.safetensors")
    prompts = json.loads((run / "hub" / "nicheclip.json").read_text())["prompts"]
    counts = [len(of_class) for of_class in prompts.values()]
    assert embeds["prompt_classes"].tolist() == np.repeat(range(len(counts)), counts).tolist()
    classifier = NicheClassifier.from_pretrained(run / "hub")
    texts = [prompt for of_class in prompts.values() for prompt in of_class]
    np.testing.assert_allclose(embeds["prompt_embeds"], classifier.text_embeds(texts), atol=1e-5)
    first = np.cumsum([0, *counts[:-1]])
    np.testing.assert_allclose(embeds["prompt_embeds"][first], embeds["prototypes"], atol=1e-5)


def test_temperature_is_folded_into_logit_scale(run):
    calibration = json.loads((run / "calibration.json").read_text())
    scale = load_file(run / "hub" / "model.safetensors")["logit_scale"].item()
    expected = calibration["trained_logit_scale"] - np.log(calibration["temperature"])
    assert scale == pytest.approx(expected, abs=1e-5)


def test_the_scorecard_is_of_one_shape_and_judges_six_gates(run, predictions):
    scorecard = json.loads((run / "scorecard.json").read_text())
    plain = {"value", "low", "high", "n", "split"}
    rivals = {"base", "probe", "strong_probe", "difference", "to_probe"}
    for name, measure in scorecard["metrics"].items():
        assert measure.keys() - rivals == plain
        assert measure["low"] <= measure["value"] <= measure["high"]
        if name != "ece_of_perfect":
            assert measure["base"].keys() == measure["difference"].keys() == plain
            difference = measure["value"] - measure["base"]["value"]
            assert measure["difference"]["value"] == pytest.approx(difference)
    metrics = scorecard["metrics"]
    for name, better in (("accuracy", max), ("nll", min), ("macro_f1", max)):
        measure = metrics[name]
        rival = better(measure[probe]["value"] for probe in ("probe", "strong_probe"))
        assert measure["to_probe"]["value"] == pytest.approx(measure["value"] - rival)
    assert len(scorecard["gates"]) == 6
    for gate in scorecard["gates"].values():
        assert gate["verdict"] in ("pass", "fail", "undecided")
        assert (gate["more"] is not None) == (gate["verdict"] == "undecided")
    names = list(json.loads((run / "hub" / "nicheclip.json").read_text())["class_names"])
    probabilities = np.array(predictions["probabilities"])
    labels = np.array([names.index(label) for label in predictions["label"]])
    right = probabilities.argmax(axis=1) == labels
    assert scorecard["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert scorecard["metrics"]["accuracy"]["n"] == len(right)
    own = probabilities[np.arange(len(right)), labels]
    assert scorecard["metrics"]["nll"]["value"] == pytest.approx(-np.log(own).mean(), abs=1e-5)
    assert logsumexp(np.log(probabilities), axis=1) == pytest.approx(0, abs=1e-5)


def test_the_folder_holds_what_it_should_and_no_pickle(run):
    paths = [path for path in (run / "hub").rglob("*") if path.is_file()]
    files = {path.relative_to(run / "hub").as_posix() for path in paths}
    assert {
        "README.md", "config.json", "model.safetensors", "nicheclip.json",
        "prototypes.safetensors", "scorecard.json",
    } <= files  # fmt: skip
    figures = {"scorecard", "confusion", "classes", "reliability", "outside"}
    assert {f"figures/{name}.{kind}" for name in figures for kind in ("png", "svg")} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))}
    assert len([name for name in files if name.startswith("examples/")]) == 3


def test_every_figure_is_a_readable_picture(run):
    for path in (run / "figures").glob("*.png"):
        width, height = Image.open(path).size
        assert width > 500
        assert height > 300


def test_the_cards_numbers_are_the_scorecards(run):
    card = ModelCard.load(run / "hub" / "README.md")
    scorecard = json.loads((run / "scorecard.json").read_text())
    for result in card.data.eval_results:
        assert result.metric_value == scorecard["metrics"][result.metric_type]["value"]
    for each in scorecard["metrics"].values():
        assert f"**{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]**" in card.text
    assert "{{" not in card.text
    assert "{%" not in card.text


def test_a_model_trained_on_other_data_is_refused(run, tmp_path):
    for name in ("data", "model"):
        (tmp_path / name).symlink_to(run / name)
    for name in ("domain.yaml", "trained_on.json"):
        shutil.copy(run / name, tmp_path)
    training = json.loads((run / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(training | {"data_fingerprint": "another"}))
    with pytest.raises(ValueError, match="was trained on other data"):
        calibrate.calibrate(tmp_path)


@pytest.mark.parametrize(
    ("split", "column", "donor", "where"),
    [
        ("test", "sha256", "train", "the train images of the training"),
        ("calibration", "sha256", "validation", "the validation images of the training"),
        ("test", "sha256", "calibration", "the calibration split"),
        ("test", "group_id", "train", "the train split"),
    ],
)
def test_an_image_that_was_seen_before_is_found(run, split, column, donor, where):
    splits = DatasetDict(load_prepared(run))
    rows, copied = splits[split], splits[donor][3][column]
    splits[split] = rows.remove_columns(column).add_column(column, [copied, *rows[column][1:]])
    told = rf"1 images .* {re.escape(rows[0]['source_id'])} \({split}; .*{where}"
    with pytest.raises(ValueError, match=told):
        check_exam(run, splits)


def test_the_splits_of_a_run_share_nothing(run):
    check_exam(run, load_prepared(run))


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="calibrate.py"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("main", "word"),
    [
        (calibrate.main, "calibrate.py: no domain file"),
        (model_card.__main__.main, "model_card: .*run `python calibrate.py"),
        (data_prep.__main__.main, "data_prep: no domain file"),
        (train.main, "train.py: no domain file"),
    ],
)
def test_every_command_ends_a_mistake_with_a_sentence(monkeypatch, tmp_path, main, word):
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=word):
        main()


def test_a_stock_clip_folder_is_no_published_model():
    with pytest.raises(FileNotFoundError, match="no nicheclip.json"):
        NicheClassifier.from_pretrained(ROOT / "domains" / "facades" / "base")


@pytest.mark.parametrize("file", ["scorecard.json", "calibration.json"])
def test_a_run_of_an_older_version_is_refused_with_the_remedy(run, tmp_path, file):
    unneeded = shutil.ignore_patterns("hub", "checkpoints")
    old = shutil.copytree(run, tmp_path / "old", ignore=unneeded)
    content = json.loads((old / file).read_text())
    content["border"] = content.pop("ood")
    (old / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}' has no 'ood'.*run `python calibrate.py"):
        build(old)
