"""The drawn façades: every pixel as it always was, faults planted as truth.json says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domains.facades import paint, shapes
from domains.facades.make_base import caption, noisy_name
from domains.facades.painter import STYLES
from domains.facades.painter import paint as paint_one
from domains.facades.score import score
from nicheclip.domain import Domain
from tests.conftest import FACADES

DOMAIN = Domain.load(FACADES)
DRAWINGS = "52baeabb1b856895"
COLOURS = "ca934ece27bf74fc"


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"smallest_class": 9, "largest_class": 30}
    options |= {"validation": 2, "calibration": 3, "test": 4}
    shares = {"wrong_labels": 0.2, "near_duplicates": 0.1, "unreadable": 0.05, "size": 24}
    folder = tmp_path_factory.mktemp("painted") / "images"
    return paint.write_images(folder, DOMAIN, 3, **options, **shares)


def test_every_drawing_and_what_is_told_of_it_is_as_it_always_was():
    digest = hashlib.sha256()
    for style in STYLES:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            picture, facts = paint_one(style, rng)
            digest.update(picture.tobytes() + caption(facts, style, rng).encode())
    assert digest.hexdigest()[:16] == DRAWINGS


def test_the_base_hears_few_names_and_most_of_them_wrong_but_of_the_same_cluster():
    rng, clusters = np.random.default_rng(0), list(DOMAIN.clusters.values())
    names = [noisy_name("tudor", clusters, rng) for _ in range(4000)]
    told = [name for name in names if name]
    wrong = [name for name in told if name != "tudor"]
    assert 0.22 < len(told) / len(names) < 0.28 and 0.56 < len(wrong) / len(told) < 0.66
    assert 0.75 < np.isin(wrong, DOMAIN.clusters["gables"]).mean() < 0.85


def test_every_shape_is_as_it_always_was(tmp_path):
    folder = shapes.write_images(tmp_path / "shapes", DOMAIN, 3)
    digest = hashlib.sha256()
    files = sorted(folder.rglob("*.png"))
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(Image.open(path).tobytes())
    assert len(files) == len(DOMAIN.retention.classes) * DOMAIN.retention.images_per_class
    assert digest.hexdigest()[:16] == COLOURS


def test_faults_are_planted_in_train_alone_and_as_often_as_told(painted):
    truth = json.loads((painted / "truth.json").read_text())
    pool = len(list((painted / "train").rglob("[0-9]*.jpg")))
    home = {style: name for name, styles in DOMAIN.clusters.items() for style in styles}
    wrong = {k: v for k, v in truth["wrong_labels"].items() if "copy" not in k}
    inside = [home[name.split("/")[1]] == home[style] for name, style in wrong.items()]
    assert len(wrong) == round(0.2 * pool) and 0.5 < np.mean(inside) < 0.85
    assert all(name.split("/")[1] != style for name, style in wrong.items())
    assert len(truth["unreadable"]) == round(0.05 * pool)
    copies = truth["near_duplicates"]
    leaks = [original for original in copies.values() if not original.startswith("train/")]
    assert len(copies) == round(0.1 * pool) and len(leaks) == -(-len(copies) // 4)
    assert not (set(copies.values()) | set(wrong)) & set(truth["unreadable"])
    faulty = [*truth["wrong_labels"], *truth["unreadable"], *copies]
    assert all(name.startswith("train/") for name in faulty)
    assert len(list((painted / "test" / "tudor").iterdir())) == 4


def test_what_is_painted_is_not_painted_again_and_nothing_else_is_overwritten(painted, tmp_path):
    before = (painted / "truth.json").stat().st_mtime_ns
    order = json.loads((painted / "truth.json").read_text())["order"]
    options = {name: order[name] for name in paint.FacadeOptions.__annotations__}
    paint.write_images(painted, DOMAIN, 3, **options)
    assert (painted / "truth.json").stat().st_mtime_ns == before
    (tmp_path / "mine.jpg").write_bytes(b"a photo")
    with pytest.raises(ValueError, match="was not painted here"):
        paint.write_images(tmp_path, DOMAIN, 3)
    assert (tmp_path / "mine.jpg").read_bytes() == b"a photo"


def test_score_counts_what_is_found_and_what_is_named_falsely(prepared):
    report = json.loads((prepared / "data" / "report.json").read_text())
    truth = json.loads((prepared / "images" / "truth.json").read_text())
    kinds = {entry["source_id"]: entry["kind"] for entry in report["quarantined"]}
    suspects = {entry["source_id"] for entry in report["suspects"]}
    found = score(prepared)
    planted = set(truth["wrong_labels"]) - set(kinds)
    counts = [len(planted), len(planted & suspects), len(suspects - planted)]
    assert list(found["wrong labels"].values()) == counts
    copies = found["near-duplicates"]
    assert copies["planted"] >= copies["found"] > 0.8 * copies["planted"] > copies["falsely"]
