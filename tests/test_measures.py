"""Metrics, intervals and calibration against known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
    top_k_accuracy_score,
)

from nicheclip.evaluation import metrics
from nicheclip.evaluation.calibration import (
    calibrate_temperature,
    fit_abstention,
    fit_conformal,
    fit_temperature,
    nll,
)
from nicheclip.evaluation.intervals import (
    Measure,
    bootstrap,
    judge_gate,
    proportion,
    resample_groups,
)
from nicheclip.evaluation.probe import fit_probe
from nicheclip.evaluation.robustness import prompt_answers
from nicheclip.head import prediction_sets


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

    computed = metrics.ZeroShotMetrics().compute(predictions=probabilities, references=labels)
    assert computed["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    balanced = balanced_accuracy_score(labels, predicted)
    assert metrics.class_scores(predicted, labels, 5)[1].mean() == pytest.approx(balanced)
    assert computed["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    top = top_k_accuracy_score(labels, probabilities, k=3)
    assert metrics.top_k_correct(probabilities, labels, 3).mean() == pytest.approx(top)
    assert nll(logits, labels) == pytest.approx(log_loss(labels, probabilities))
    brier = np.mean([brier_score_loss(labels == c, probabilities[:, c]) for c in range(5)]) * 5
    assert metrics.brier(probabilities, labels).mean() == pytest.approx(brier, rel=1e-5)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted)
    assert np.allclose(metrics.class_scores(predicted, labels, 5), [precision, recall, f1])
    counts = confusion_matrix(labels, predicted)
    assert (metrics.confusion_matrix(predicted, labels, 5) == counts).all()


def test_a_class_that_is_never_answered_has_no_precision_and_one_without_images_no_recall():
    precision, recall, f1 = metrics.class_scores(np.array([0, 0, 2]), np.array([0, 1, 0]), 4)
    assert precision == pytest.approx([0.5, np.nan, 0, np.nan], nan_ok=True)
    assert recall == pytest.approx([0.5, 0, np.nan, np.nan], nan_ok=True)
    assert f1 == pytest.approx([0.5, 0, 0, np.nan], nan_ok=True)


def test_outside_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 300).round(1), rng.normal(0, 1, 200).round(1)  # with ties
    truth, scores = np.repeat([1, 0], [300, 200]), np.concatenate([inside, outside])
    assert metrics.auroc(inside, outside) == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert metrics.fpr95(inside, outside) == pytest.approx(false[np.argmax(true >= 0.95)])


def test_image_retrieval_agrees_with_scikit_learn_and_passes_over_near_duplicates():
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(30, 4))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    labels, groups = rng.integers(0, 3, 30), np.arange(30)
    # the same picture twice
    groups[1], labels[1], embeds[1] = groups[0], labels[0], embeds[0] * (1 + 1e-9)
    rank, precision = metrics.image_retrieval(embeds, labels, groups)
    for query in range(30):
        others = groups != groups[query]
        cosine, found = (embeds @ embeds[query])[others], labels[others] == labels[query]
        assert precision[query] == pytest.approx(average_precision_score(found, cosine))
        assert rank[query] == 1 + np.flatnonzero(found[np.argsort(-cosine)])[0]
    alone, _ = metrics.image_retrieval(embeds[:2], np.array([0, 1]), np.arange(2))
    assert np.isnan(alone).all()


def test_prompts_of_other_classes_by_hand():
    # Classes 0 and 1 are one cluster, class 2 is another; class 0 has two prompts.
    similarity = np.array([[0.1, 0.4, 0.3, 0.9], [0.6, 0.2, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]])
    labels, prompt_classes = np.array([0, 1, 2]), np.array([0, 0, 1, 2])
    clusters = np.array([0, 0, 1])
    margin = metrics.hard_negative_margin(similarity, prompt_classes, labels, clusters)
    assert margin == pytest.approx([0.1, -0.1, np.nan], nan_ok=True)  # the third is alone
    assert metrics.semantic_rank(similarity, prompt_classes, labels).tolist() == [2, 2, 1]


def test_risk_and_coverage_by_hand():
    # by falling confidence: right, wrong, right, right; risks 0, 1/2, 1/3, 1/4
    confidence, right = np.array([0.7, 0.9, 0.6, 0.8]), np.array([True, True, True, False])
    assert metrics.aurc(confidence, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_ece_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.45, 0.55]])
    labels = np.array([0, 1, 0, 0])
    # bin of 0.95: two images, half right; bin of 0.6: right; bin of 0.55: wrong
    expected = 0.5 * abs(0.95 - 0.5) + 0.25 * abs(0.6 - 1) + 0.25 * abs(0.55 - 0)
    computed = metrics.ZeroShotMetrics().compute(predictions=probabilities, references=labels)
    assert computed["ece"] == pytest.approx(expected, abs=1e-6)


def test_ece_agrees_with_torchmetrics(sample):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = sample
    probabilities = softmax(logits, axis=1)
    tensors = torch.tensor(probabilities), torch.tensor(labels)
    options = {"num_classes": 5, "n_bins": 15}
    expected = torchmetrics.multiclass_calibration_error(*tensors, **options)
    right = metrics.correct(probabilities, labels)
    found = metrics.expected_calibration_error(probabilities.max(axis=1), right)
    assert found == pytest.approx(expected.item(), abs=1e-6)


def test_equal_mass_bins_hold_equally_many_images():
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 301)
    right = rng.random(301) < confidence
    mean_confidence, _, counts = metrics.reliability(confidence, right, equal_mass=True)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(mean_confidence) > 0).all()


def test_a_perfect_model_lies_within_its_own_ece():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        confidence = rng.uniform(0.3, 1, 400)
        low, high = np.percentile(metrics.ece_of_perfect(confidence, draws=300), [2.5, 97.5])
        found = metrics.expected_calibration_error(confidence, rng.random(400) < confidence)
        inside += low <= found <= high
        fewer_right = rng.random(400) < confidence - 0.25
        assert metrics.expected_calibration_error(confidence, fewer_right) > high
    assert inside >= 52  # of 60, at 95 %


def known(temperature: float, n: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, 6) that `temperature` calibrates, and labels."""
    rng = np.random.default_rng(1)
    calibrated = rng.normal(scale=2, size=(n, 6))
    labels = (softmax(calibrated, axis=1).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return calibrated * temperature, labels


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.8, 10.0])
def test_a_known_temperature_is_recovered(temperature):
    assert fit_temperature(*known(temperature)) == pytest.approx(temperature, rel=0.02)


@pytest.mark.parametrize("labels", [[0, 1], [1, 0], []])
def test_a_temperature_that_can_not_be_identified_is_refused(labels):
    logits = np.array([[2.0, 1.0], [1.0, 2.0]])[: len(labels)].reshape(-1, 2)
    with pytest.raises(ValueError, match="splits.calibration"):
        fit_temperature(logits, np.array(labels, dtype=int))


def test_the_interval_of_a_temperature_holds_it_and_shrinks_with_n():
    logits, labels = known(2.0)
    parts = np.arange(20 * 300).reshape(20, 300)
    few = [calibrate_temperature(logits[part], labels[part], part, resamples=60) for part in parts]
    assert sum(fitted["low"] < 2.0 < fitted["high"] for fitted in few) >= 16  # of 20, at 95 %
    many = calibrate_temperature(logits[:3000], labels[:3000], np.arange(3000), resamples=60)
    width = many["high"] - many["low"]
    assert width < np.mean([fitted["high"] - fitted["low"] for fitted in few]) / 2
    assert not many["warning"]


def test_where_hardly_anything_is_wrong_the_temperature_comes_with_a_warning():
    logits, labels = 5 * np.eye(4)[np.arange(40) % 4], np.arange(40) % 4
    groups = np.arange(40)
    perfect = calibrate_temperature(logits, labels, groups)
    assert perfect["value"] == 1
    assert "all 40 calibration images are right" in perfect["warning"]
    labels[:3] = (labels[:3] + 1) % 4
    assert "3 errors among 40 images" in calibrate_temperature(logits, labels, groups)["warning"]
    wrong = (logits.argmax(axis=1) + 1) % 4
    with pytest.raises(ValueError, match="all 40 calibration images are wrong"):
        calibrate_temperature(logits, wrong, groups)
    assert calibrate_temperature(logits, wrong, groups, reference=True)["value"] == 1


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_prediction_sets_hold_the_label_as_often_as_stated(coverage):
    rng = np.random.default_rng(2)
    logits, labels = known(1.0, n=20_000)
    probabilities = softmax(logits / 3, axis=1)  # not even calibrated
    found = []
    for _ in range(20):
        order = rng.permutation(20_000)
        fitted = fit_conformal(probabilities[order[:1000]], labels[order[:1000]], coverage)
        rest = order[1000:]
        sets = prediction_sets(probabilities[rest], fitted)
        found.append(sets[np.arange(len(rest)), labels[rest]].mean())
    assert np.mean(found) == pytest.approx(coverage, abs=0.006)


def test_prediction_sets_are_never_empty_and_grow_with_doubt():
    probabilities = np.array([[0.97, 0.02, 0.01], [0.5, 0.45, 0.05], [0.4, 0.3, 0.3]])
    fitted = fit_conformal(np.tile(probabilities, (10, 1)), np.tile([0, 1, 1], 10), coverage=0.9)
    sets = prediction_sets(probabilities, fitted)
    assert sets[:, 0].all()
    assert sets.sum(axis=1).tolist() == sorted(sets.sum(axis=1))
    # of three images none is the 90 % quantile
    few = fit_conformal(probabilities, np.array([0, 1, 1]), coverage=0.9)
    assert prediction_sets(probabilities, few).all()


def test_abstention_answers_as_often_as_the_aim_allows():
    confidence = np.linspace(0.51, 0.99, 100)
    logits = np.stack([np.log(confidence), np.log(1 - confidence)], axis=1)
    labels = np.zeros(100, dtype=int)
    labels[:20] = 1  # the 20 least confident are wrong
    chosen = fit_abstention(softmax(logits, axis=1), labels, selective_accuracy=0.9)
    assert chosen["target_reached"]
    # 80 right among 88 answers, 80 / 89 would be below 0.9
    assert chosen["coverage"] == pytest.approx(0.88)
    assert chosen["selective_accuracy"] >= 0.9
    assert chosen["threshold"] == pytest.approx(confidence[12])


def test_abstention_says_when_the_aim_is_out_of_reach():
    logits = np.tile([1.0, 0.0], (10, 1))
    chosen = fit_abstention(softmax(logits, axis=1), np.array([0, 1] * 5), selective_accuracy=0.9)
    assert not chosen["target_reached"]
    assert chosen["selective_accuracy"] == 0.5


def test_abstention_can_aim_at_a_coverage():
    confidence = np.linspace(0.51, 0.99, 100)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    chosen = fit_abstention(probabilities, np.zeros(100, int), 0.9, coverage=0.3)
    assert (chosen["aim"], chosen["target"], chosen["coverage"]) == ("coverage", 0.3, 0.3)
    assert chosen["threshold"] == pytest.approx(confidence[70])


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


def test_resamples_take_whole_groups():
    groups = np.repeat(np.arange(20), 3)
    for chosen in resample_groups(groups, 50):
        counts = np.bincount(chosen, minlength=60).reshape(20, 3)
        assert (counts == counts[:, :1]).all()


def test_a_measure_survives_json():
    other = Measure(0.3, 0.2, 0.4, 10, "test")
    measure = Measure(0.5, 0.4, 0.6, 10, "test", base=other, difference=other)
    assert Measure(**measure.to_dict()) == measure
    assert "base" not in measure.to_dict()["base"]


@pytest.mark.parametrize(
    ("metric", "low", "high", "target", "verdict"),
    [
        ("accuracy", 0.90, 0.95, 0.90, "pass"),
        ("accuracy", 0.80, 0.89, 0.90, "fail"),
        ("accuracy", 0.85, 0.95, 0.90, "undecided"),
        ("ece", 0.02, 0.09, 0.10, "pass"),
        ("ece", 0.10, 0.15, 0.10, "fail"),
        ("ece", 0.05, 0.15, 0.10, "undecided"),
    ],
)
def test_gates_know_which_way_is_better_and_when_not(metric, low, high, target, verdict):
    measure = Measure((low + high) / 2, low, high, 100, "test")
    assert judge_gate(metric, measure, target).verdict == verdict


def test_an_undecided_gate_says_how_many_images_would_decide_it():
    rng = np.random.default_rng(0)
    hits = rng.random(200) < 0.86
    for copies, verdict, more in ((1, "undecided", 372), (2, "undecided", None), (4, "fail", None)):
        groups = np.arange(200 * copies)  # 400 and 800 images
        gate = judge_gate("accuracy", proportion(np.tile(hits, copies), groups, "test"), 0.82)
        assert gate.verdict == verdict
        assert more is None or gate.more == more
    assert judge_gate("accuracy", Measure(0.9, 0.8, 0.95, 50, "test"), 0.9).more is None


def test_prompts_are_asked_in_turn():
    similarity = np.array([[0.9, 0.1, 0.5, 0.6]])  # class 0 has three prompts, class 1 one
    assert prompt_answers(similarity, np.array([0, 0, 0, 1])).tolist() == [[0, 1, 1]]


def test_a_probe_knows_what_lies_apart_and_gives_no_chance_to_a_class_that_it_never_saw():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    embeds = np.eye(4)[labels] + rng.normal(0, 0.1, (120, 4))
    probe = fit_probe((embeds[:80], labels[:80]), (embeds[80:], labels[80:]), 4)
    logits = probe.logits(embeds[80:])
    assert (logits.argmax(axis=1) == labels[80:]).all()
    assert (logits[:, 3] < -100).all()
