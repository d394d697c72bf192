"""The page that shows where a model was wrong, and the way back from it to data_prep."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from playwright.sync_api import sync_playwright

from data_prep.prepare import prepare
from data_prep.review import read_decisions
from model_card.errors import DOUBTED, read_errors, write_errors
from nicheclip.domain import Domain
from nicheclip.evaluation.exams import Exams
from nicheclip.run import load_prepared, trainings
from tests.conftest import CHROMIUM, needs_chromium


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "errors.html").read_text(encoding="utf-8")


def articles(page: str) -> list[tuple[str, str, str]]:
    """Cell, kind and source_id of each image on the page."""
    one = r'<article data-cell="([\d-]+)" data-kind="([^"]*)".*?<code>(.*?)</code>'
    found = re.findall(one, page, re.DOTALL)
    return [(cell, kind, unescape(source_id)) for cell, kind, source_id in found]


def test_every_error_is_on_the_page_in_its_cell_the_most_confident_first(run: Path, page: str):
    table, cache = str(run / "predictions.parquet"), str(run.parent / "cache")
    rows = Dataset.from_parquet(table, cache_dir=cache)
    names = Domain.load(run).class_names
    expected = []
    for row in rows:
        label, predicted = names.index(row["label"]), int(np.argmax(row["probabilities"]))
        if label != predicted:
            expected.append((-max(row["probabilities"]), f"{label}-{predicted}", row["source_id"]))
    shown = [(cell, own) for cell, kind, own in articles(page) if "wrong" in kind.split()]
    assert shown == [(cell, source_id) for _, cell, source_id in sorted(expected)]
    for count, cell in re.findall(r'data-cell="([\d-]+)" aria-label="(\d+) ', page):
        assert sum(shown_cell == count for shown_cell, _ in shown) == int(cell)


def outputs(calibrated, labels, embeds, train_labels, train_embeds) -> SimpleNamespace:
    """What a model says of images that come before those that it was trained on."""
    asked, rows = np.arange(len(labels)), len(labels) + len(train_labels)
    trained = SimpleNamespace(repeats=(np.arange(rows) >= len(labels)).astype(int))
    exams = SimpleNamespace(
        rounds=[trained], asked=asked, round_of=0 * asked, labels=np.append(labels, train_labels)
    )
    return SimpleNamespace(
        exams=exams,
        calibrated=calibrated,
        predicted=calibrated.argmax(axis=1),
        labels=labels,
        embeds=[np.concatenate([embeds, train_embeds])],
    )


def clustered(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Unit-length image_embeds (N, 8) near a direction of each of three classes."""
    embeds = np.eye(3, 8)[labels] + 0.1 * rng.normal(size=(len(labels), 8))
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def test_the_nearest_are_the_nearest_and_a_wrong_label_is_doubted():
    rng = np.random.default_rng(0)
    truth, train_labels = rng.integers(0, 3, 700), rng.integers(0, 3, 200)
    embeds, train_embeds = clustered(rng, truth), clustered(rng, train_labels)
    labels = truth.copy()
    labels[:20] = (truth[:20] + 1) % 3  # wrong labels
    calibrated = rng.dirichlet(np.ones(3), 700)
    tuned = outputs(calibrated, labels, embeds, train_labels, train_embeds)
    readings = read_errors(tuned, tuned)
    assert [each.best for each in readings] == sorted(map(max, calibrated), reverse=True)
    for reading in readings:
        cosines = train_embeds @ embeds[reading.row]
        for label in {reading.label, reading.predicted}:
            row, cosine = reading.nearest[label]
            assert cosine == pytest.approx(cosines[train_labels == label].max())
            assert train_labels[row - len(labels)] == label
        assert (reading.doubt >= DOUBTED) == (reading.row < 20)
        assert reading.row >= 20 or reading.other == truth[reading.row]


def test_a_class_without_training_images_has_no_nearest():
    certain = np.array([[0.0, 1.0]])
    tuned = outputs(certain, np.array([1]), np.eye(1, 4), np.array([0, 0]), np.eye(2, 4))
    (reading,) = read_errors(tuned, tuned)
    assert reading.nearest == {}
    assert (reading.doubt, reading.other) == (1, 0)


def test_names_are_escaped_and_nothing_is_loaded_from_elsewhere(run, page, tmp_path):
    elsewhere = r"""(?:src|href)=["'](?!data:|#p)|url\(|@import|https?://(?!www\.w3\.org)"""
    assert not re.search(elsewhere, page)
    domain, splits = Domain.load(run), load_prepared(run)
    rogue = "</script><script>alert('gothic & \"more\"')"
    renamed = {
        rogue if name == "gothic" else name: prompts for name, prompts in domain.classes.items()
    }
    clusters = {
        key: [rogue if name == "gothic" else name for name in names]
        for key, names in domain.clusters.items()
    }
    domain = domain.model_copy(update={"classes": renamed, "clusters": clusters})
    count, test, exams = len(renamed), splits["test"], Exams(*trainings(run, splits))
    labels = np.array(test["label"])
    calibrated = np.eye(count)[(labels + 1) % count]
    tuned = SimpleNamespace(
        exams=exams,
        calibrated=calibrated,
        predicted=calibrated.argmax(axis=1),
        labels=labels,
        embeds=[np.eye(len(exams.rows), 4)],
    )
    write_errors(tmp_path / "errors.html", domain, exams, read_errors(tuned, tuned))
    written = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert rogue not in written and f"{len(test)} of {len(test)} test images got" in written
    assert written.count("<script") == page.count("<script")


@needs_chromium
def test_what_is_ticked_goes_back_to_data_prep(run: Path, tmp_path: Path):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((run / "errors.html").as_uri())
        cell = page.locator("button[data-cell]").first
        cell.click()
        visible = page.locator("article").filter(visible=True)
        assert visible.count() == int(cell.inner_text())
        shown = {each.get_attribute("data-cell") for each in visible.all()}
        assert shown == {cell.get_attribute("data-cell")}
        visible.first.get_by_role("checkbox").check()
        ticked = visible.first.locator("code").first.inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="save ticked").click()
        download.value.save_as(tmp_path / "review_errors.csv")
        browser.close()
    (decision,) = read_decisions(tmp_path / "review_errors.csv").values()
    assert (decision.source_id, decision.decision) == (ticked, "drop")

    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "review_errors.csv").rename(again / "review_errors.csv")
    report = prepare(Domain.load(run), again)
    assert ticked in load_prepared(run)["test"]["source_id"]
    assert ticked not in load_prepared(again)["test"]["source_id"]
    kinds = {each["source_id"]: each["kind"] for each in report["quarantined"]}
    assert [name for name, kind in kinds.items() if kind == "dropped by hand"] == [ticked]
