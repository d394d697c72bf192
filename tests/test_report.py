"""report.html: all that a person should see, nothing from elsewhere, the same bytes each time."""

from __future__ import annotations

import base64
import io
import re
from html import escape, unescape
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.report import SHOWN, write_report
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain
from nicheclip.publishing.pages import LONG_SIDE, SHORT_SIDE

DOMAIN = Domain.load(Path(__file__).parents[1] / "domains" / "facades")
UNREADABLE = "train/gothic/broken.jpg"
AWKWARD = 'train/tudor/it\'s <b>bold</b> & "quoted" – Köln.jpg'


def suspect(source_id: str, score: float, outcome: str = "dropped") -> dict[str, Any]:
    found = {"source_id": source_id, "label": "tudor", "suspected_label": "queen anne"}
    return found | {"score": score, "outcome": outcome}


def set_aside(
    source_id: str, kind: str, other: str | None = None, detail: str | None = None
) -> dict[str, Any]:
    label = source_id.split("/")[1] if "/" in source_id else None
    found = {"source_id": source_id, "label": label, "sha256": None}
    return found | {"kind": kind, "other": other, "detail": detail}


def taken_for(label: str, other: str) -> dict[str, Any]:
    surest = [{"source_id": f"train/{label}/7.jpg", "probability": 0.84}]
    counts = {"images": 9, "mistaken": 3, "surest": surest}
    return {"label": label, "other": other, "probe": 0.35, "zero_shot": 0.04} | counts


def confused(*pair: str) -> list[float]:
    """The affinities of all pairs of classes, where one pair stands out."""
    return [0.3 if each == pair else 0.01 for each in combinations(DOMAIN.class_names, 2)]


def group(*source_ids: str) -> list[dict[str, str]]:
    return [{"source_id": name, "label": "tudor", "split": "train"} for name in source_ids]


@pytest.fixture
def report() -> dict[str, Any]:
    """As data_prep writes it, with every kind of finding."""
    quarantined = [
        set_aside(UNREADABLE, "unreadable", detail="image file is truncated <here>"),
        set_aside("odd.jpg", "no class", detail="it lies beside the class folders"),
        set_aside("train/moorish/a.jpg", "exact duplicate", other="train/moorish/b.jpg"),
        set_aside("train/gothic/l.jpg", "leak", other="test/gothic/9.jpg", detail="it is in test"),
        set_aside("train/gothic/c.jpg", "conflict", other="train/tudor/d.jpg"),
        set_aside("train/tudor/d.jpg", "conflict", other="train/gothic/c.jpg"),
    ]
    suspects = [suspect(AWKWARD, 0.00004), suspect("train/tudor/1.jpg", 0.04, "kept by hand")]
    sizes = {"train": 20, "validation": 5, "calibration": 5, "test": 12, "examined": 12}
    judged = {"images": 21, "wanted": 1, "suspect": 1, "dropped": 0}
    classes = [
        {"name": name, **sizes, "quarantined": 0, "samples": 120, "filter": judged}
        for name in DOMAIN.class_names
    ]
    kept = {split: size * len(classes) for split, size in sizes.items() if split != "examined"}
    return {
        "domain": "facades", "base": "some/base", "images": "/pictures", "seed": 3,
        "fingerprint": "0123456789abcdef",
        "counts": {
            "read": sum(kept.values()) + len(quarantined) + 1,
            "dropped_by_filter": 1, "left_out_of_training": 0, "kept": kept,
            "train_samples_per_epoch": 120 * len(classes),
        },
        "filter": {"mode": "linear_probe", "threshold": None, "max_drop_share": 0.3,
        "action": "drop"},
        "classes": classes, "warnings": [], "mended": {"EXIF orientation": 31},
        "quarantined": quarantined,
        "suspects": suspects,
        "least_likely_kept": [
            {"source_id": "train/tudor/2.jpg", "label": "tudor", "suspected_label": "gothic",
            "score": 0.3}
        ],
        "near_duplicates": [group("train/tudor/3.jpg", "train/tudor/4.jpg")],
        "alike_across_splits": [
            [{"source_id": f"{split}/tudor/5.jpg", "split": split, "cosine": 0.93}
            for split in ("test", "train")]
        ],
        "confusions": {
            "train": 240, "validation": 60, "affinity": confused("gothic", "romanesque"),
            "pairs": [taken_for("gothic", "romanesque"), taken_for("tudor", "gothic")],
        },
    }  # fmt: skip


def picture(source_id: str) -> Image.Image:
    """A drawing of its own for each file; of several shapes and modes, as stored images are."""
    if source_id == UNREADABLE or not source_id.startswith(("train/", "test/")):
        raise KeyError(source_id)
    number = sum(source_id.encode())
    image = draw(list(STYLES)[number % len(STYLES)], np.random.default_rng(number), 48)
    image = image.resize([(300, 200), (120, 400), (48, 48), (900, 90)][number % 4])
    return image.convert("L") if number % 3 == 0 else image


def page_of(report: dict[str, Any], folder: Path) -> str:
    write_report(folder / "report.html", report, DOMAIN, picture)
    return (folder / "report.html").read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    whole = rf'<(?:section|h2) id="{name}".*?(?=<h2 |</section>|<svg class="images")'
    return re.search(whole, page, re.DOTALL)[0]


class Structure(HTMLParser):
    """All attributes of a page, and the tags that are left open."""

    def __init__(self, page: str):
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "image", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_shows_every_suspect_and_every_quarantined_image_escaped(report, tmp_path):
    page = page_of(report, tmp_path)
    for entry in report["suspects"]:
        assert entry["source_id"] in unescape(section(page, "suspects"))
    for entry in report["quarantined"]:
        assert entry["source_id"] in section(page, "quarantine")
    assert "<b>bold" not in page and "truncated &lt;here&gt;" in page
    assert "kept by hand" in page and "&lt; 0.001" in page


def test_it_asks_no_one_for_anything(report, tmp_path):
    structure = Structure(page_of(report, tmp_path))
    assert structure.open == []
    leading = ("src", "href", "srcset", "action")
    links = [value for _, name, value in structure.attributes if name in leading]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    targets = {f"#{value}" for _, name, value in structure.attributes if name == "id"}
    assert {link for link in links if link.startswith("#")} <= targets
    styles = [value for _, name, value in structure.attributes if name == "style"]
    assert all(re.fullmatch(r"width: [\d.]+%", style) for style in styles)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"<script|@import|url\(|\son\w+=", page)


def test_same_input_same_bytes(report, tmp_path):
    page_of(report, tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    page_of(report, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_each_picture_is_there_once_small_and_named(report, tmp_path):
    # shown elsewhere already
    report["near_duplicates"].append(group("train/tudor/1.jpg", "train/tudor/3.jpg"))
    structure = Structure(page_of(report, tmp_path))
    attributes = structure.attributes
    pictures = [value for *found, value in attributes if found == ["image", "href"]]
    assert len(pictures) == len(set(pictures)) < sum(tag == "use" for tag, *_ in attributes)
    for uri in pictures:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert min(image.size) <= SHORT_SIDE and max(image.size) <= LONG_SIDE
            assert max(image.size) in (48, LONG_SIDE)  # 48: as it is stored
    named = {value for _, name, value in structure.attributes if name == "aria-label"}
    assert f"picture of {AWKWARD}" in named
    assert f"picture of {UNREADABLE}" not in named


def test_galleries_are_limited_and_say_what_they_leave_out(report, tmp_path):
    names = [f"{number:04d}.jpg" for number in range(SHOWN + 7)]
    report["suspects"] = [suspect(f"train/tudor/{name}", 0.01) for name in names]
    members = [[f"train/gothic/{number}-{n}.jpg" for n in range(9)] for number in range(23)]
    report["near_duplicates"] = [group(*of_group) for of_group in members]
    report["quarantined"] += [set_aside(f"train/art deco/{name}", "blank") for name in names[2:]]
    page = page_of(report, tmp_path)
    assert section(page, "suspects").count("<figure") == SHOWN
    assert "and 7 more in report.json, under “suspects”" in page
    assert section(page, "near-duplicates").count("<figure") == 20 * 6
    assert "and 3 more in report.json, under “near_duplicates”" in page
    blank = section(page, "quarantine").partition("<h3>blank")[2].partition("<h3>")[0]
    assert blank.count("<figure") == SHOWN and "<small>65</small>" in blank
    assert UNREADABLE in section(page, "quarantine")
    assert len((tmp_path / "report.html").read_bytes()) < 3e6


def test_images_that_contradict_each_other_stand_side_by_side_once(report, tmp_path):
    conflicts = section(page_of(report, tmp_path), "quarantine").partition("<h3>leak")[0]
    assert conflicts.count('class="group"') == 1 and conflicts.count("<use") == 2
    assert "<b>gothic</b>" in conflicts and "<b>tudor</b>" in conflicts


def test_missing_pictures_break_nothing(report, tmp_path):
    def nothing(source_id: str) -> Image.Image:
        raise KeyError(source_id)

    write_report(tmp_path / "report.html", report, DOMAIN, nothing)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in page and "1.jpg" in page


def test_warnings_come_first(report, tmp_path):
    assert "Nothing stands out" in page_of(report, tmp_path)
    report["warnings"] = [f"class {number}: too <few> images" for number in range(30)]
    page = page_of(report, tmp_path)
    assert "Nothing stands out" not in page and "30 warnings" in page
    assert all(escape(warning) in section(page, "warnings") for warning in report["warnings"])
    assert page.index("30 warnings") < page.index("images read")


def test_the_funnel_adds_up_and_classes_in_trouble_are_marked(report, tmp_path):
    few, capped, *_ = report["classes"]
    few["examined"] = few["test"] = 9
    capped["filter"] = {"images": 21, "wanted": 9, "suspect": 6, "dropped": 6}
    page = page_of(report, tmp_path)
    numbers = re.findall(r'"n">([\d,]+)<', section(page, "funnel"))
    left = [int(number.replace(",", "")) for number in numbers]
    counts = report["counts"]
    assert left[0] == counts["read"]
    assert left[-2:] == [sum(counts["kept"].values()), counts["train_samples_per_epoch"]]
    assert left[:-1] == sorted(left[:-1], reverse=True)
    assert [first - second for first, second in pairwise(left[:-1])] == [2, 3, 1, 1]
    marked = re.findall(r'<tr><th>([^<]+) <b class="flag">', section(page, "classes"))
    assert marked == [few["name"], capped["name"]]
    assert "6 of 9" in page


def test_all_else_is_told(report, tmp_path):
    page = page_of(report, tmp_path)
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    for told in ("some/base", "/pictures", "EXIF orientation", "31", "cosine 0.930", "review.csv"):
        assert told in text
    report["filter"] |= {"mode": "none"}
    report["mended"] = {}
    for name in ("suspects", "near_duplicates", "alike_across_splits", "least_likely_kept"):
        report[name] = []
    assert "The filter is off" in page_of(report, tmp_path)


def test_what_is_confused_is_proposed_as_a_cluster_and_shown(report, tmp_path):
    confusions = section(page_of(report, tmp_path), "confusions")
    text = unescape(re.sub(r"<[^>]+>", "", confusions))
    assert "c1gothic (arches), romanesque (arches)" in text
    assert "240 train and 60 validation images" in text and "1 of the domain file's 12" in text
    gothic, tudor = re.findall(r"<h3>(.*?)</h3>\n<p>(.*?)</p>", confusions)
    told = "3 of 9 train images; probe 35.0%, zero-shot 4.0%"
    assert gothic == ("gothic, taken for romanesque", told)
    assert "other cluster" in tudor[0]  # of the domain file
    assert "train/gothic/7.jpg" in confusions and "84%" in confusions
