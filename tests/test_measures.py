"""Metrics, intervals and calibration against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss

from nicheclip import metrics
from nicheclip.calibration import fit_abstention, fit_temperature, nll
from nicheclip.results import Measure, bootstrap, gate_verdict, proportion


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    logits = rng.normal(size=(400, 5)) + 2 * np.eye(5)[labels]
    return logits, labels


def test_metrics_agree_with_scikit_learn(sample):
    logits, labels = sample
    probabilities = softmax(logits, axis=1)
    predicted = probabilities.argmax(1)
    assert metrics.Accuracy().compute(predictions=probabilities, references=labels)["accuracy"] == pytest.approx(
        accuracy_score(labels, predicted)
    )
    assert metrics.MacroF1().compute(predictions=probabilities, references=labels)["macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro")
    )
    assert nll(logits, labels) == pytest.approx(log_loss(labels, probabilities))


def test_ece_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.45, 0.55]])
    labels = np.array([0, 1, 0, 0])
    # bin of 0.95: two images, half right; bin of 0.6: right; bin of 0.55: wrong
    expected = 0.5 * abs(0.95 - 0.5) + 0.25 * abs(0.6 - 1) + 0.25 * abs(0.55 - 0)
    computed = metrics.ExpectedCalibrationError().compute(predictions=probabilities, references=labels)["ece"]
    assert computed == pytest.approx(expected, abs=1e-6)


def test_hard_negatives_and_semantic_rank_by_hand():
    # classes 0 and 1 share a cluster, class 2 is alone; two prompts a class
    prompt_classes, class_clusters = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1])
    similarity = np.array(
        [[0.1, 0.5, 0.4, 0.2, 0.9, 0.0], [0.3, 0.2, 0.1, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.1, 0.2]]
    )
    labels = np.array([0, 1, 2])
    margin = metrics.hard_negative_margin(similarity, prompt_classes, labels, class_clusters)
    assert margin[:2] == pytest.approx([0.1, -0.05])
    assert np.isnan(margin[2])
    assert metrics.semantic_rank(similarity, prompt_classes, labels).tolist() == [2, 2, 1]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.8, 10.0])
def test_a_known_temperature_is_recovered(temperature):
    rng = np.random.default_rng(1)
    calibrated = rng.normal(scale=2, size=(40_000, 6))
    labels = (softmax(calibrated, axis=1).cumsum(axis=1) > rng.random((40_000, 1))).argmax(axis=1)
    assert fit_temperature(calibrated * temperature, labels) == pytest.approx(temperature, rel=0.02)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0], []])
def test_a_temperature_that_can_not_be_identified_is_refused(labels):
    logits = np.array([[2.0, 1.0], [1.0, 2.0]])[: len(labels)].reshape(-1, 2)
    with pytest.raises(ValueError, match="splits.calibration"):
        fit_temperature(logits, np.array(labels, dtype=int))


def test_abstention_answers_as_often_as_the_aim_allows():
    confidence = np.linspace(0.51, 0.99, 100)
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    labels = np.zeros(100, dtype=int)
    labels[:20] = 1  # the 20 least confident are wrong
    chosen = fit_abstention(logits, labels, temperature=1.0, target_accuracy=0.9)
    assert chosen.target_reached
    assert chosen.coverage == pytest.approx(0.88)  # 80 right among 88 answers, 80 / 89 would be below 0.9
    assert chosen.selective_accuracy >= 0.9
    assert chosen.threshold == pytest.approx(confidence[12])


def test_abstention_says_when_the_aim_is_out_of_reach():
    logits = np.tile([1.0, 0.0], (10, 1))
    chosen = fit_abstention(logits, np.array([0, 1] * 5), temperature=1.0, target_accuracy=0.9)
    assert not chosen.target_reached
    assert chosen.selective_accuracy == 0.5


def test_intervals_cover_and_do_not_collapse():
    perfect = proportion(np.ones(60, dtype=bool), np.arange(60), "test")
    assert perfect.value == 1 and perfect.low < 0.95  # noqa: PT018
    hits = np.random.default_rng(0).random(500) < 0.7
    resampled = bootstrap(lambda chosen: hits[chosen].mean(), np.arange(500), "test")
    assert resampled.low == pytest.approx(proportion(hits, np.arange(500), "test").low, abs=0.01)
    assert resampled.high == pytest.approx(proportion(hits, np.arange(500), "test").high, abs=0.01)
    grouped = bootstrap(lambda chosen: hits[chosen].mean(), np.repeat(np.arange(50), 10), "test")
    assert grouped.n == 500
    assert proportion(hits, np.repeat(np.arange(50), 10), "test") == grouped


def test_a_measure_survives_json():
    measure = Measure(0.5, 0.4, 0.6, 10, "test", base=Measure(0.3, 0.2, 0.4, 10, "test"))
    assert Measure.from_dict(measure.to_dict()) == measure
    assert "base" not in measure.base.to_dict()


def test_gates_know_which_way_is_better():
    assert gate_verdict("accuracy", 0.90, 0.90) == "pass"
    assert gate_verdict("accuracy", 0.899, 0.90) == "fail"
    assert gate_verdict("ece", 0.10, 0.10) == "fail"
    assert gate_verdict("ece", 0.05, 0.10) == "pass"
