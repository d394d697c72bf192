"""Which split, groups, file and side of a bound go in: small things that no shape shows."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from data_prep import quality
from data_prep.duplicates import CERTAIN, Fingerprints
from data_prep.prepare import prepare
from data_prep.review import Suspicion, read_decisions, write_review
from data_prep.verify import verify_image
from nicheclip import NicheClassifier
from nicheclip.clip import load_clip
from nicheclip.domain import QualityFilter
from nicheclip.evaluation import metrics
from nicheclip.evaluation.calibration import calibrate_temperature, fit, fit_abstention
from nicheclip.evaluation.intervals import Measure, bootstrap, judge_gate
from nicheclip.evaluation.ood import fit_class_means
from nicheclip.evaluation.scorecard import Statistic
from nicheclip.head import Head
from nicheclip.publishing.image_index import ImageIndex, write_index
from nicheclip.run import load_prepared
from nicheclip.training.wise_ft import choose_alpha
from space.app import build_app
from space.scorecard import percent, read_scorecard
from tests.conftest import FACADES, encoded


def sample(count: int = 300, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) and labels (N,) of a model that is right most of the time."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    return rng.normal(size=(count, classes)) + 2 * np.eye(classes)[labels], labels


def test_a_gate_whose_interval_holds_the_target_is_undecided_on_either_side_of_it():
    above, below = Measure(0.08, 0.05, 0.15, 9, "test"), Measure(0.92, 0.85, 0.95, 9, "test")
    assert judge_gate("ece", above, 0.10).verdict == "undecided"
    assert judge_gate("accuracy", below, 0.90).verdict == "undecided"


def test_the_interval_of_a_biased_measure_lies_below_that_of_a_plain_one():
    logits, labels = sample()
    probabilities = softmax(logits, axis=1)
    confidence, right = probabilities.max(axis=1), metrics.correct(probabilities, labels)

    def ece(chosen: np.ndarray) -> float:
        return metrics.expected_calibration_error(confidence[chosen], right[chosen])

    groups = np.arange(len(labels))
    plain, biased = (bootstrap(ece, groups, "test", biased) for biased in (False, True))
    assert biased.low < plain.low and biased.high < plain.high


def test_copies_do_not_make_a_temperature_surer():
    logits, labels = sample(60)
    logits, labels = np.tile(logits, (10, 1)), np.tile(labels, 10)
    grouped = calibrate_temperature(logits, labels, np.tile(np.arange(60), 10))
    alone = calibrate_temperature(logits, labels, np.arange(600))
    assert grouped["high"] - grouped["low"] > 2 * (alone["high"] - alone["low"])


def test_an_abstention_answers_at_least_half_even_if_few_are_right():
    confidence = np.linspace(0.99, 0.6, 200)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    labels = (np.arange(200) >= 10).astype(int)  # only the ten surest are right
    found = fit_abstention(probabilities, labels, 0.95)
    assert not found["target_reached"]
    assert found["coverage"] >= 0.5


def test_abstention_and_sets_are_fitted_on_calibrated_probabilities(domain):
    logits, labels = sample(classes=len(domain.classes))
    found = fit(3 * logits, labels, np.arange(len(labels)), domain)
    calibrated = softmax(3 * logits / found["temperature"], axis=1)
    expected = fit_abstention(calibrated, labels, domain.selective_accuracy)
    assert found["abstention"]["threshold"] == pytest.approx(expected["threshold"])
    assert abs(found["temperature"] - 1) > 0.3
    grouped = fit(3 * logits, labels, np.arange(len(labels)) // 10, domain)
    assert grouped["temperature_fit"]["low"] != found["temperature_fit"]["low"]


def test_a_score_on_the_ood_threshold_is_inside():
    head = Head(np.eye(2), {"whitening": np.eye(2), "means": np.eye(2)}, 0.0)
    settings = {
        "class_names": ["wren", "robin"],
        "abstention": {"threshold": 0.0},
        "conformal": {"quantile": 0.0},
        "ood": {"score": "prompt_cosine", "threshold": 1.0},
    }
    classifier = NicheClassifier(lambda pixels: pixels, head, None, settings)
    on, below = classifier.predict(np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert not on.outside and below.outside


def test_four_equal_probabilities_are_no_top_three_hit():
    assert not metrics.top_k_correct(np.full((1, 4), 0.25), np.array([0]), 3).any()


def test_a_measure_has_gained_nothing_on_itself():
    values = Statistic((np.random.default_rng(0).normal(size=50),), np.arange(50))
    gain = values.minus(values)
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def test_whitening_makes_the_classes_round():
    """About the mean of each class, not of all: far apart classes change nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    within = rng.normal(size=(3000, 4)) @ np.diag([1, 2, 3, 4])
    embeds = within + 30 * rng.normal(size=(3, 4))[labels]
    found = fit_class_means(embeds, labels)
    within = (embeds @ found["whitening"]) - found["means"][labels]
    assert np.cov(within.T) == pytest.approx(np.eye(4), abs=0.15)


def test_hashes_exactly_the_certain_distance_apart_are_the_same_picture():
    first = np.zeros(144, dtype=np.uint8)
    for distance in (CERTAIN, CERTAIN + 1):
        second = first.copy()
        second[:distance] = 1
        hashes = np.packbits(np.stack([first, second]), axis=1)
        far = np.full_like(hashes, 0b10101010)
        prints = Fingerprints(np.stack([hashes, far]), np.array([[1.0], [-1.0]]), (0.5, 0.5, 2.0))
        assert len(prints.near_duplicates()) == (distance == CERTAIN)


@pytest.mark.parametrize(("distance", "same"), [(8, True), (9, False)])
def test_a_mirror_image_must_be_nearer_than_a_copy(distance, same):
    """Symmetric things, such as façades, resemble each other's mirror images."""
    bits = np.zeros((2, 2, 144), dtype=np.uint8)  # the pictures, and their mirror images
    bits[0, 1] = 1
    bits[1, 1, :distance] = 1
    hashes = np.packbits(bits, axis=2)
    prints = Fingerprints(hashes, np.array([[1.0], [-1.0]]), (0.5, 0.5, 2.0))
    assert len(prints.near_duplicates()) == same


def test_the_cap_of_the_filter_rounds_down():
    probabilities = np.full((18, 2), [0.01, 0.99])
    how = QualityFilter(mode="zero_shot", threshold=0.5, max_drop_share=0.3)
    trusted = np.zeros(18, dtype=bool)
    assert quality.judge(probabilities, np.repeat([0, 1], 9), how, trusted).suspect.sum() == 2


@pytest.mark.parametrize("block", ["xmp", "photoshop"])
def test_what_a_file_says_of_its_origin_is_not_stored(block):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture, secret = Image.fromarray(pixels), b"taken at home"
    content = encoded(picture, "JPEG", **({"xmp": secret} if block == "xmp" else {}))
    if block == "photoshop":
        segment = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(secret).to_bytes(4, "big") + secret
        marker = b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment
        content = content[:2] + marker + content[2:]
    assert secret in content
    stored = verify_image({"bytes": content, "path": None}, 288)
    assert secret not in stored["image"]["bytes"]


def test_a_new_suspicion_does_not_undo_a_decision(tmp_path):
    path = tmp_path / "review.csv"
    write_review(path, [Suspicion("1.jpg", "wren", "abc", "wrong label?", decision="drop")])
    write_review(path, [Suspicion("1.jpg", "wren", "abc", "wrong label?", score="0.1")])
    assert read_decisions(path)["abc", "wren"].decision == "drop"


def test_the_exams_groups_decide_the_intervals_of_a_mixture(prepared, domain):
    model, processor = load_clip(FACADES / "base")
    rows = load_prepared(prepared)["validation"]
    classes, found = [str(label) for label in rows["label"]], []
    by_class = rows.remove_columns("group_id").add_column("group_id", classes)
    for each in (rows, by_class):
        arguments = model, model, processor, each, domain.canonical_prompts
        _, (row,) = choose_alpha(*arguments, alphas=[1.0])
        found.append(row["accuracy"])
    assert found[0]["value"] == found[1]["value"]
    assert (found[0]["low"], found[0]["high"]) != (found[1]["low"], found[1]["high"])


def test_an_index_says_of_each_image_which_split_it_is_of(run, tmp_path):
    splits = load_prepared(run)
    few = type(splits)({name: splits[name].select(range(3)) for name in ("validation", "test")})
    path = tmp_path / "index.parquet"
    write_index(NicheClassifier.from_pretrained(run / "hub"), few, ["test", "validation"], path)
    assert ImageIndex(path).rows["split"][:] == ["test"] * 3 + ["validation"] * 3


def test_review_csv_wins_over_the_errors_page(prepared, domain, tmp_path):
    run = shutil.copytree(prepared, tmp_path / "run", ignore=shutil.ignore_patterns("data"))
    rows = load_prepared(prepared)["train"]
    source_id, sha256 = rows["source_id"][0], rows["sha256"][0]
    name = rows.features["label"].int2str(rows["label"][0])
    for file, decision in (("review.csv", "drop"), ("review_errors.csv", "keep")):
        write_review(run / file, [Suspicion(source_id, name, sha256, "look", decision=decision)])
    prepare(domain, run)
    assert source_id not in load_prepared(run)["train"]["source_id"][:]


def test_near_duplicates_share_a_fold_of_the_label_filter(prepared, domain, tmp_path, monkeypatch):
    seen = {}
    judging = quality.out_of_fold_probabilities

    def recording(image_embeds, labels, groups, *others):
        seen["groups"] = sorted(groups)
        return judging(image_embeds, labels, groups, *others)

    monkeypatch.setattr(quality, "out_of_fold_probabilities", recording)
    run = shutil.copytree(prepared, tmp_path / "run", ignore=shutil.ignore_patterns("data"))
    report = prepare(domain, run)
    train = load_prepared(run)["train"]
    dropped = report["counts"]["dropped_by_filter"]
    assert len(seen["groups"]) == len(train) + dropped
    assert set(train["group_id"][:]) <= set(seen["groups"])
    assert len(set(seen["groups"])) < len(seen["groups"])  # there are near-duplicates among them


def test_the_app_tells_the_share_of_other_pictures_that_it_notices(run):
    accepted = read_scorecard(run / "hub")[0]["ood_accepted"].value
    assert accepted != pytest.approx(0.5, abs=0.02)
    app = build_app(run / "hub")
    texts = [str(block.get("props", {}).get("value")) for block in app.config["components"]]
    assert any(f"noticed {percent(1 - accepted)}" in text for text in texts)
