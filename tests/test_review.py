"""A person decides on what data_prep suspects, and the next run obeys."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import prepare
from data_prep.review import Suspicion, read_decisions, write_review
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain, QualityFilter, Source, Splits
from nicheclip.run import load_prepared

CLASSES = list(STYLES[:3])


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three styles; one gothic drawing lies under romanesque, and one picture under two labels."""
    folder = tmp_path_factory.mktemp("photos")
    for number, style in enumerate(CLASSES):
        (folder / style).mkdir()
        for index in range(30):
            picture = draw(style, np.random.default_rng([number, index]), 96)
            picture.save(folder / style / f"{index:02d}.png")
    draw(CLASSES[0], np.random.default_rng(999), 96).save(folder / CLASSES[1] / "wrong.png")
    twice = draw(CLASSES[2], np.random.default_rng(998), 96)
    twice.save(folder / CLASSES[2] / "twice.png")
    shifted = twice.crop((1, 1, 95, 95)).resize((96, 96), Image.Resampling.BICUBIC)
    shifted.save(folder / CLASSES[0] / "twice.jpg", quality=80)
    return folder


@pytest.fixture
def three_styles(domain: Domain) -> Domain:
    changes = {
        "classes": {style: domain.classes[style] for style in CLASSES},
        "clusters": {"all": CLASSES},
        "source": Source(),
        "splits": Splits(validation=3, calibration=3, test=5),
        "quality_filter": QualityFilter(mode="zero_shot", threshold=0.5),
    }
    return domain.model_copy(update=changes)


def lines(run: Path) -> dict[str, dict[str, str]]:
    with (run / "review.csv").open(encoding="utf-8-sig", newline="") as file:
        return {line["source_id"]: line for line in csv.DictReader(file)}


def decide(run: Path, decisions: dict[str, str]) -> None:
    table = lines(run)
    for source_id, decision in decisions.items():
        table[source_id]["decision"] = decision
    with (run / "review.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, next(iter(table.values())))
        writer.writeheader()
        writer.writerows(table.values())


def kept(run: Path) -> set[str]:
    return {source_id for rows in load_prepared(run).values() for source_id in rows["source_id"]}


def test_decisions_hold_for_the_next_runs(photos, three_styles, tmp_path):
    run = tmp_path / "run"
    report = prepare(three_styles, run, images=photos)
    conflict = {f"{CLASSES[2]}/twice.png", f"{CLASSES[0]}/twice.jpg"}
    # the same picture under two labels
    assert {entry["source_id"] for entry in report["quarantined"]} == conflict
    suspects = [entry["source_id"] for entry in report["suspects"]]
    assert set(lines(run)) == conflict | set(suspects)
    assert len(suspects) >= 2
    assert not kept(run) & (conflict | set(suspects))

    spared, right = suspects[0], f"{CLASSES[2]}/twice.png"
    decide(run, {spared: "Keep", suspects[1]: "drop", right: "keep"})
    for _ in range(2):  # what was decided stays decided
        report = prepare(three_styles, run, images=photos)
        assert {spared, right} <= kept(run)
        reasons = {entry["source_id"]: entry["kind"] for entry in report["quarantined"]}
        assert reasons[suspects[1]] == "dropped by hand"
        assert reasons[f"{CLASSES[0]}/twice.jpg"] == "conflict"
        assert right not in reasons
        assert lines(run)[spared]["decision"] == "keep"


def test_suspects_can_be_flagged_only(photos, three_styles, tmp_path):
    flag = three_styles.quality_filter.model_copy(update={"action": "flag"})
    flagging = three_styles.model_copy(update={"quality_filter": flag})
    report = prepare(flagging, tmp_path / "run", images=photos)
    suspects = {entry["source_id"] for entry in report["suspects"]}
    assert suspects
    assert suspects <= kept(tmp_path / "run")
    assert {entry["outcome"] for entry in report["suspects"]} == {"flagged"}
    assert report["counts"]["dropped_by_filter"] == 0
    assert suspects <= set(lines(tmp_path / "run"))


def test_a_wrong_decision_is_explained(tmp_path):
    path = tmp_path / "review.csv"
    path.write_text("source_id,label,sha256,decision\na.jpg,gothic,ff,maybe\n")
    told = r"line 2: decision 'maybe'; expected keep, drop or nothing"
    with pytest.raises(ValueError, match=told):
        read_decisions(path)
    path.write_text("source_id,decision\na.jpg,keep\n")
    told = "lacks the column label, sha256; its first line should be"
    with pytest.raises(ValueError, match=told):
        read_decisions(path)
    assert read_decisions(tmp_path / "none.csv") == {}


@pytest.mark.parametrize(
    ("delimiter", "encoding"),
    [(",", "utf-8"), (";", "utf-8-sig"), (";", "cp1252"), ("\t", "utf-16")],
)
def test_what_spreadsheets_make_of_it_is_read(tmp_path, delimiter, encoding):
    path = tmp_path / "review.csv"
    table = [["source_id", "label", "sha256", "decision"], ["été.jpg", "façade", "ff", "KEEP"]]
    table.append(["b", "c", "d", ""])
    path.write_bytes("\r\n".join(delimiter.join(line) for line in table).encode(encoding))
    decided = read_decisions(path)
    assert [(line.source_id, line.decision) for line in decided.values()] == [("été.jpg", "keep")]
    assert set(decided) == {("ff", "façade")}


def test_a_decision_is_about_the_picture_and_not_its_place(tmp_path):
    path = tmp_path / "review.csv"
    for sha256, decision in (("ff", "drop"), ("ee", "")):
        line = Suspicion("table/0000003", "gothic", sha256, "wrong label?", decision=decision)
        write_review(path, [line])
    assert set(read_decisions(path)) == {("ff", "gothic")}
    assert len(path.read_text(encoding="utf-8-sig").splitlines()) == 3
