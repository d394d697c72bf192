"""Cross-fitting: a model that has not seen an image examines it, and all images train."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

import calibrate
import train
from data_prep.divide import divide
from data_prep.prepare import prepare
from data_prep.quality import suspect_labels
from domains.facades.painter import STYLES, draw
from model_card.build import build
from nicheclip.domain import Domain, QualityFilter
from nicheclip.evaluation.calibration import fit
from nicheclip.evaluation.exams import Exams
from nicheclip.evaluation.intervals import proportion
from nicheclip.evaluation.predictions import Predictions
from nicheclip.files import read_json
from nicheclip.recipe import Stage
from nicheclip.run import FOLDS, Training, check_exam, load_prepared, trainings
from nicheclip.training.cross_fit import CrossFit, settled
from tests.conftest import ROOT, short_recipe

FOLDS_NAMED = ("fold_1", "fold_2", "fold_3")


@pytest.fixture(scope="module")
def niche(domain: Domain) -> Domain:
    """Four classes, three folds, a short recipe with something to choose in each stage."""
    names, stages = STYLES[:4], copy.deepcopy(short_recipe())
    stages[0] |= {"epochs": 2, "learning_rate": [1e-3, 1e-2]}
    stages[1] |= {"epochs": 1, "runs": 1, "mix": [0.0, 1.0]}
    changes = {
        "evaluation": "cross_fit",
        "folds": 3,
        "classes": {name: domain.classes[name] for name in names},
        "clusters": {"all": list(names)},
        "stages": [Stage.model_validate(stage) for stage in stages],
        "stored_short_side": 96,
        "samples_per_class": 16,
        "training": domain.training | {"wise_ft": "auto", "disable_tqdm": True},
    }
    return domain.model_copy(update=changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Fifteen drawings a class; the first of each class again, smaller."""
    folder = tmp_path_factory.mktemp("photos")
    for number, style in enumerate(STYLES[:4]):
        (folder / style).mkdir()
        for index in range(15):
            picture = draw(style, np.random.default_rng([number, index]), size=120)
            picture.save(folder / style / f"{index}.png")
            if not index:
                picture.resize((110, 110)).save(folder / style / "again.jpg", quality=85)
    return folder


@pytest.fixture(scope="module")
def dealt(niche: Domain, photos: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("dealt") / "run"
    prepare(niche, run, images=photos)
    return run


@pytest.fixture(scope="module")
def fitted(dealt: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("fitted") / "run"
    shutil.copytree(dealt, run)
    train.train([str(run)])
    calibrate.calibrate(run)
    build(run, examples=2, index=["fold_1"])
    return run


def test_each_image_lies_in_one_fold_with_its_copies(dealt: Path):
    splits = load_prepared(dealt)
    assert tuple(splits) == FOLDS_NAMED
    rows, models = trainings(dealt, splits)
    assert len(rows) == 64 and len(models) == 4
    home = {}
    for number, fold in enumerate(FOLDS_NAMED):
        for group in splits[fold]["group_id"]:
            assert home.setdefault(group, number) == number
    assert len(home) < len(rows), "there are copies"
    for name in range(4):
        counts = [splits[fold]["label"][:].count(name) for fold in FOLDS_NAMED]
        assert max(counts) - min(counts) <= 2
    assert sorted(np.concatenate([each.exam for each in models])) == list(range(64))
    for number, each in enumerate(models[:-1]):
        assert not each.repeats[each.exam].any()
        assert set(each.validation) == set(models[(number + 1) % 3].exam)
        assert sorted([*each.calibration, *each.exam]) == list(range(64))


def test_a_suspect_is_left_out_of_training_and_stays_in_the_exam(niche: Domain, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    wrong = tmp_path / "photos" / STYLES[0] / "5.png"
    draw(STYLES[3], np.random.default_rng([3, 77]), size=120).save(wrong)
    strict = niche.model_copy(update={"quality_filter": QualityFilter(threshold=0.9)})
    report = prepare(strict, tmp_path / "run", images=tmp_path / "photos")
    suspects = [entry["source_id"] for entry in report["suspects"]]
    rows, models = trainings(tmp_path / "run", load_prepared(tmp_path / "run"))
    assert f"{STYLES[0]}/5.png" in suspects and report["counts"]["dropped_by_filter"] == 0
    assert report["counts"]["left_out_of_training"] == len(suspects)
    final = dict(zip(rows["source_id"], models[-1].repeats, strict=True))
    assert {name for name, repeats in final.items() if not repeats} == set(suspects)
    examined = [rows["source_id"][row] for each in models for row in each.exam]
    assert sorted(examined) == sorted(rows["source_id"])


def test_what_a_fold_is_asked_has_no_say_in_what_its_model_trains_on(niche: Domain):
    """Other labels of the images of a fold change nothing for the model that they examine."""
    rng = np.random.default_rng(0)
    names = niche.class_names
    labels = rng.integers(4, size=120)
    embeds = np.eye(4, 8)[labels] + rng.normal(scale=0.6, size=(120, 8))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    folds = np.array(FOLDS_NAMED)[np.arange(120) % 3]
    images = pd.DataFrame(
        {"split": folds, "group_id": [f"{n}" for n in range(120)], "decision": ""}
    )
    images["label"] = np.array(names)[labels]
    strict = niche.model_copy(update={"quality_filter": QualityFilter(threshold=0.7)})

    def trains(changed: np.ndarray) -> np.ndarray:
        table = images.assign(label=np.where(changed, names[0], images.label))
        judged = suspect_labels(table, embeds, np.full((120, 4), 0.25), strict, seed=0)
        return np.stack(judged.trains)  # (N, 4)

    before = trains(np.zeros(120, bool))
    assert not before.all(axis=0).any(), "some are suspected"
    for number, fold in enumerate(FOLDS_NAMED):
        after = trains(folds == fold)
        assert (after[:, number] == before[:, number]).all()
        assert (after[:, 3] != before[:, 3]).any(), "elsewhere they have"


def test_other_labels_in_the_exam_give_the_same_model(dealt: Path, niche: Domain, tmp_path):
    """The whole training of a fold: choices, probes and weights."""
    from nicheclip.training.arguments import parse_arguments

    def model_of_fold(name: str, changes: bool) -> tuple[bytes, bytes, str]:
        run, splits = tmp_path / name, DatasetDict(load_prepared(dealt))
        if changes:
            own = splits["fold_2"]
            shifted = [(label + 1) % 4 for label in own["label"]]
            columns = own.remove_columns("label").add_column("label", shifted)
            splits["fold_2"] = columns.select_columns(own.column_names).cast(own.features)
        rows, models = trainings(run, splits)
        args = parse_arguments(niche, run, [])
        one = CrossFit(niche, run, rows, models, args, "", resume=False)
        one._encode()
        one._train_fold(one.folds[1], 2)
        folder = run / FOLDS / "fold_2"
        choice = read_json(folder / "choice" / "training.json", "")
        weights = (folder / "model" / "model.safetensors").read_bytes()
        probe = (folder / "strong_probe.safetensors").read_bytes()
        return weights, probe, json.dumps([choice["stages"], choice["wise_ft"]])

    assert model_of_fold("as it is", False) == model_of_fold("changed", True)


def test_an_image_counts_once_and_its_model_has_not_seen_it(fitted: Path):
    rows, models = trainings(fitted, load_prepared(fitted))
    hashes, groups = np.array(rows["sha256"]), np.array(rows["group_id"])
    for each in models[:-1]:
        seen = read_json(each.folder / "trained_on.json", "")
        choice = read_json(each.folder / "choice" / "trained_on.json", "")
        known = {*seen["train"], *seen["validation"], *choice["train"], *choice["validation"]}
        assert not known & set(hashes[each.exam]) and set(choice["validation"]) <= known
        assert not set(choice["train"]) & set(choice["validation"])
        assert set(groups[each.exam]).isdisjoint(groups[each.repeats > 0])
        own = read_json(each.folder / "training.json", "")
        assert all(len(stage["tried"]) <= 1 for stage in own["stages"]), "nothing left to choose"
    everything = read_json(fitted / "trained_on.json", "")
    assert set(everything["train"]) == set(hashes[models[-1].repeats > 0])
    table = str(fitted / "predictions.parquet")
    answers = Dataset.from_parquet(table, cache_dir=str(fitted.parent / "cache"))
    assert sorted(answers["source_id"]) == sorted(rows["source_id"])
    fold_of = dict(zip(answers["source_id"], answers["fold"], strict=True))
    for number, each in enumerate(models[:-1], 1):
        assert {fold_of[rows["source_id"][row]] for row in each.exam} == {number}


def test_the_scorecard_the_card_and_the_page_say_what_was_examined(fitted: Path):
    scorecard = read_json(fitted / "scorecard.json", "")
    assert scorecard["evaluation"].startswith("Cross-fitted, 3 folds, n = 64: each image")
    assert "50% more" in scorecard["evaluation"]
    assert {scorecard["metrics"][name]["n"] for name in ("accuracy", "ece", "nll")} == {64}
    assert scorecard["metrics"]["accuracy"]["split"] == "out of fold"
    assert sum(of["n"] for of in scorecard["classes"].values()) == 64
    card = (fitted / "hub" / "README.md").read_text(encoding="utf-8")
    assert scorecard["evaluation"] in card and "fold_1" in card
    training = read_json(fitted / "training.json", "")
    rate = training["settled"][0]["learning_rate"][0]
    assert rate in (1e-3, 1e-2) and f"learning_rate {rate}" in card
    page = (fitted / "errors.html").read_text(encoding="utf-8")
    assert "of 64 images, each examined by a model that has not seen it" in page
    published = read_json(fitted / "hub" / "nicheclip.json", "")
    assert published["fitted_on"] == {"split": "out of fold", "n": 64}


def test_a_copy_in_another_fold_fails_loudly(fitted: Path):
    check_exam(fitted, load_prepared(fitted))
    for column in ("group_id", "sha256"):
        splits = DatasetDict(load_prepared(fitted))
        own, planted = splits["fold_1"], splits["fold_2"][3][column]
        values = [planted, *own[column][1:]]
        splits["fold_1"] = own.remove_columns(column).add_column(column, values)
        with pytest.raises(
            ValueError, match="have been seen before, so the scorecard would flatter"
        ):
            check_exam(fitted, splits)


def test_each_fold_is_judged_by_what_the_others_fit(niche: Domain):
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(4, size=90), np.arange(90) % 3
    logits = 3 * np.eye(4)[labels] + 2 * rng.normal(size=(90, 4))
    logits[folds == 1] *= 10  # it is overconfident
    rows = Dataset.from_dict({"label": labels, "group_id": [f"{n}" for n in range(90)]})
    nowhere, none = Path("nowhere"), np.array([], int)
    models = [
        Training(nowhere, folds != k, none, np.flatnonzero(folds != k), np.flatnonzero(folds == k))
        for k in range(3)
    ]
    exams = Exams(rows, [*models, Training(nowhere, folds >= 0, none, np.arange(90), none)])
    of_models = [np.where((folds == k)[:, None], logits, 1e3) for k in range(3)]
    found = Predictions(exams, of_models, niche)
    groups = np.arange(90)
    for k in range(3):
        others, own = folds != k, folds == k
        expected = fit(logits[others], labels[others], groups[others], niche)
        assert found.fits[k]["temperature"] == pytest.approx(expected["temperature"])
        assert found.logits[own] == pytest.approx(logits[own] / expected["temperature"])
        answered = found.confidence[own] >= expected["abstention"]["threshold"]
        assert (found.answered[own] == answered).all()
    assert found.fitted["temperature"] == pytest.approx(
        fit(logits, labels, groups, niche)["temperature"]
    )
    assert found.fits[1]["temperature"] < 0.6 * found.fits[0]["temperature"]


def test_intervals_of_folds_are_as_wide_as_those_of_fewer_images():
    hits, alone = np.arange(200) % 4 > 0, np.arange(200)
    found = proportion(hits, alone, "out of fold")
    base = replace(found, value=0.5, low=0.4, high=0.6)
    wide = replace(found, base=base).widened(5)
    fewer = proportion(hits[:160], alone[:160], "out of fold")
    assert wide.value == found.value
    assert wide.high - wide.low == pytest.approx(fewer.high - fewer.low, rel=0.02)
    assert wide.base.high - wide.base.low == pytest.approx(0.2 * np.sqrt(5 / 4))
    certain = proportion(hits[hits], alone[hits], "out of fold").widened(5)
    assert certain.high == 1 and certain.low < proportion(hits[hits], alone[hits], "test").low


def choice(nlls: list[float], mixes: dict[float, float], alphas: dict[float, float]) -> dict:
    tried = [{"eval_nll": nll, "epoch": 3 + n} for n, nll in enumerate(nlls)]
    mixed = [{"mix": share, "eval_nll": nll} for share, nll in mixes.items()]
    table = [{"alpha": alpha, "nll": nll, "retention": None} for alpha, nll in alphas.items()]
    stage = {"tried": tried, "chosen": 0, "mixes": sorted(mixed, key=lambda row: row["eval_nll"])}
    return {"stages": [stage], "wise_ft": {"asked": "auto", "mixtures": table}}


def test_choices_are_settled_by_the_mean_of_what_validation_said(niche: Domain):
    stage = niche.stages[0].model_copy(update={"mix": [0.0, 0.5, 1.0], "start": ["base"]})
    domain = niche.model_copy(update={"stages": [stage]})
    first = choice([1.0, 0.9], {0.0: 1.0, 0.5: 0.8, 1.0: 0.9}, {0.5: 0.7, 1.0: 0.8})
    second = choice([0.5, 1.4], {0.0: 0.9, 0.5: 0.9, 1.0: 0.6}, {0.5: 0.9, 1.0: 0.7})
    alone, alpha = settled(domain, [first], repeats=1.0, retention_drop=1.0)
    assert (alone.stages[0].learning_rate, alone.stages[0].mix, alpha) == ([1e-2], [0.5], 0.5)
    both, alpha = settled(domain, [first, second], repeats=1.0, retention_drop=1.0)
    assert (both.stages[0].learning_rate, both.stages[0].mix, alpha) == ([1e-3], [1.0], 1.0)
    assert len(both.stages[0].variants()) == 1
    best = domain.model_copy(update={"stages": [stage.model_copy(update={"keep": "best"})]})
    (kept,) = settled(best, [first], repeats=1.0, retention_drop=1.0)[0].stages
    assert (kept.keep, kept.epochs) == ("last", [4])


def test_a_source_with_an_exam_of_its_own_is_refused(niche: Domain):
    images = pd.DataFrame(
        {"source_id": ["a", "b"], "label": STYLES[:2], "sha256": ["0" * 16, "1" * 16]}
        | {"given": ["test", None], "decision": "", "group": None}
    )
    with pytest.raises(ValueError, match="a test split of its own.*evaluation: holdout"):
        divide(images, np.empty((0, 2), int), niche)


def test_images_of_one_group_of_the_user_stay_together(niche: Domain, photos: Path, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for style in STYLES[:4]:
        lines = [{"file_name": f"{n}.png", "group": f"house {n % 5}"} for n in range(15)]
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / "photos" / style / "metadata.jsonl").write_text(text)
    prepare(niche, tmp_path / "run", images=tmp_path / "photos")
    home = {}
    for fold, rows in load_prepared(tmp_path / "run").items():
        for source_id in rows["source_id"]:
            number = Path(source_id).stem
            if number.isdigit():
                assert home.setdefault(int(number) % 5, fold) == fold
    assert len(set(home.values())) > 1


def test_a_class_in_one_fold_only_is_refused(niche: Domain):
    labels = [*np.repeat(STYLES[:3], 5), STYLES[3]]
    images = pd.DataFrame({"source_id": [f"{n}" for n in range(16)], "label": labels})
    images = images.assign(
        sha256=[f"{n:016d}" for n in range(16)], given=None, decision="", group=None
    )
    with pytest.raises(ValueError, match=f"all images of one fold: {STYLES[3]}"):
        divide(images, np.empty((0, 2), int), niche)


def weights(run: Path) -> dict[str, bytes]:
    files = [
        *run.glob("folds/fold_*/model/model.safetensors"),
        *run.glob("model/model.safetensors"),
    ]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def begin(command: list[str], cwd: Path = ROOT) -> subprocess.Popen:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=cwd, stdout=quiet, stderr=quiet, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["fold_1/choice/checkpoints", "fold_2/checkpoints", "final"])
def test_killed_in_any_fold_and_resumed_it_ends_with_the_same_weights(
    dealt, fitted, tmp_path, place
):
    run = tmp_path / "run"
    shutil.copytree(dealt, run)
    process = begin([sys.executable, "train.py", str(run)])
    while not any((run / FOLDS / place).glob("**/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended before it was there"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "training.json").exists()
    command = [sys.executable, "train.py", str(run)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode and "go on with --resume_from_checkpoint" in refused.stderr
    subprocess.run([*command, "--resume_from_checkpoint", "True"], cwd=ROOT, check=True)
    assert weights(run) == weights(fitted) and len(weights(run)) == 4


@pytest.mark.slow
def test_two_processes_share_the_folds(dealt, fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(dealt, run)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", "--", "train.py", str(run)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for number in (1, 2, 3):
        assert ended.stdout.count(f"fold {number} of 3: training") == 1
    assert sorted(weights(run)) == sorted(weights(fitted))
    check_exam(run, load_prepared(run))
