"""Figures hold for any domain: no gates, odd names, thousands of classes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from model_card.figures import MOST_CLASSES, STYLE, _classes, _confusion, _scorecard
from nicheclip.domain import Domain
from nicheclip.evaluation.intervals import Measure, Verdict


def domain_of(domain: Domain, names: list[str]) -> Domain:
    classes = {name: [f"a photo of {number}"] for number, name in enumerate(names)}
    changes = {"classes": classes, "clusters": {"all": names}, "gates": {}}
    return Domain.model_validate(domain.model_dump() | changes)


class Tuned:
    """Right on one image of each class, but for the last, which is taken for the first."""

    def __init__(self, count: int):
        self.labels, self.predicted = np.arange(count), np.append(np.arange(count - 1), 0)
        self.calibrated = np.eye(count)[self.predicted]
        self.embeds = [np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)]
        self.exams = SimpleNamespace(
            asked=np.arange(count), round_of=np.zeros(count, int), split="test", cross_fitted=False
        )


def test_a_domain_without_gates_has_a_scorecard_figure(domain, tmp_path):
    with matplotlib.rc_context(STYLE):
        figure = _scorecard(domain_of(domain, ["a", "b"]), {}, {})
        figure.savefig(tmp_path / "scorecard.png")
    assert "no gates" in figure.axes[0].texts[0].get_text()


def test_a_gate_shows_base_probe_and_fine_tuned_where_they_are(domain):
    base, probe, tuned = (Measure(value, 0, 1, 9, "test") for value in (0.2, 0.5, 0.7))
    measures = {"accuracy": replace(tuned, base=base, probe=probe)}
    gated = domain.model_copy(update={"gates": {"accuracy": 0.9}})
    axes = _scorecard(gated, measures, {"accuracy": Verdict("≥ 0.90", "fail")}).axes[0]
    shown = {bar.get_label(): bar.lines[0].get_xdata().tolist() for bar in axes.containers}
    assert shown == {"base zero-shot": [0.2], "linear probe": [0.5], "fine-tuned": [0.7]}


def test_a_confusion_is_a_share_of_the_labelled_class(domain):
    figure = _confusion(domain_of(domain, ["a", "b"]), Tuned(2))
    assert figure.axes[0].images[0].get_array().tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("name", ["$5% off$", "a$_$", "A$\\b$", "50 % & _more_^"])
def test_names_are_shown_as_they_are(domain, tmp_path, name):
    with matplotlib.rc_context(STYLE):
        figure = _confusion(domain_of(domain, [name, "other"]), Tuned(2))
        figure.savefig(tmp_path / "confusion.svg")
    assert figure.axes[0].get_xticklabels()[0].get_text() == name


def test_of_many_classes_the_most_confused_are_shown(domain):
    count = 2000
    named = domain_of(domain, [f"class {number}" for number in range(count)])
    with matplotlib.rc_context(STYLE):
        figure = _confusion(named, Tuned(count))
        shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert len(shown) == MOST_CLASSES
        assert {"class 0", f"class {count - 1}"} <= set(shown)
        width, height = figure.get_size_inches() * figure.dpi
        assert width * height < 20e6
        bars = _classes(domain_of(named, named.class_names[:300]), Tuned(300), Tuned(300))
    assert f"class {299}" in bars.axes[0].get_yticklabels()[0].get_text()
