"""The app as a visitor meets it, in a real browser; skipped where Chromium is not installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from nicheclip import NicheClassifier
from space.app import LAUNCH, answer, build_app
from space.search import UNREADABLE
from tests.conftest import CHROMIUM, needs_chromium

pytestmark = needs_chromium
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 1000}


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    app = build_app(run / "hub")
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield url
    app.close()


@pytest.fixture(scope="module", params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, address: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=request.param)
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        page.goto(address)
        yield page
        browser.close()


def words(page: Page) -> str:
    return page.locator(".prose.answer").inner_text().replace("\N{NO-BREAK SPACE}", " ")


def upload(page: Page, path: Path) -> None:
    panel = page.get_by_role("tabpanel").filter(visible=True)
    if panel.get_by_label("Clear").count():
        panel.get_by_label("Clear").first.click()
    panel.locator("input[type=file]").first.set_input_files(path)


def test_an_uploaded_photo_gets_its_answer_its_bars_and_pictures_like_it(page: Page, run: Path):
    photo = next((run / "hub" / "examples").iterdir())
    expected = NicheClassifier.from_pretrained(run / "hub")([photo])[0]
    upload(page, photo)
    bars = page.locator("[data-testid$='confidence-set']")
    expect(bars.first).to_be_visible()
    assert words(page) == re.sub(r"\*\*", "", answer(expected)).replace("\N{NO-BREAK SPACE}", " ")
    shown = [bar.inner_text().split("\n")[0] for bar in bars.all()]
    assert shown == list(expected.probabilities)[:5]
    expect(page.locator(".found .thumbnail-item").filter(visible=True)).to_have_count(6)


def test_a_text_that_calls_itself_a_photo_gets_a_sentence(page: Page, tmp_path: Path):
    (tmp_path / "photo.jpg").write_text("I am a text.")
    upload(page, tmp_path / "photo.jpg")
    expect(page.locator(".prose.answer")).to_contain_text(UNREADABLE.split("**")[1])


def test_words_find_pictures(page: Page):
    page.get_by_role("tab", name="Search").click()
    asked = page.get_by_label("In words")
    asked.fill("a façade with pointed arches")
    asked.press("Enter")  # by keyboard alone
    shown = page.locator(".found .thumbnail-item").filter(visible=True)
    expect(shown).to_have_count(12)
    assert all("test" in each.inner_text() for each in shown.all())


def test_the_scorecard_and_the_usage_are_a_tab_away(page: Page):
    page.get_by_role("tab", name="Scorecard").click()
    expect(page.get_by_text("gates passed")).to_be_visible()
    expect(page.get_by_role("cell", name="Accuracy", exact=True)).to_be_visible()
    page.get_by_role("tab", name="API").click()
    expect(page.get_by_text("from_pretrained").filter(visible=True).first).to_be_visible()


def test_nothing_is_wider_than_the_page(page: Page):
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_controls_have_names_for_a_screen_reader(page: Page):
    controls = page.locator("button, input:not([type=file]), textarea")
    named = "e => e.ariaLabel || e.title || e.innerText || e.labels?.[0]?.innerText || ''"
    for control in controls.filter(visible=True).all():
        name = control.evaluate(named)
        assert name.strip(), control.evaluate("e => e.outerHTML")
