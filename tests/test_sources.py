"""Class folders, tables and their provenance.

The same images give the same rows whatever they lie in.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import prepare
from data_prep.sources import fetch, source_of
from data_prep.sources.folders import read_folders
from data_prep.sources.rows import unusable
from data_prep.sources.tables import is_table, read_table
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain, QualityFilter, Source, Splits
from nicheclip.run import load_prepared
from tests.conftest import encoded

CLASSES = list(STYLES[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of twelve drawings, as a user's photos lie."""
    folder = tmp_path_factory.mktemp("photos")
    for number, style in enumerate(CLASSES):
        (folder / style).mkdir()
        for index in range(12):
            picture = draw(style, np.random.default_rng([number, index]), size=96)
            picture.save(folder / style / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> datasets.Dataset:
    paths = sorted(folder.rglob("*.png"))
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    schema = datasets.Features(columns)
    rows = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
    return datasets.Dataset.from_dict(rows, features=schema)


@pytest.fixture
def two_styles(domain: Domain) -> Domain:
    changes = {
        "classes": {style: domain.classes[style] for style in CLASSES},
        "clusters": {"both": CLASSES},
        "source": Source(),
        "splits": Splits(validation=2, calibration=2, test=3),
        "quality_filter": QualityFilter(mode="none"),
    }
    return domain.model_copy(update=changes)


def save(table: datasets.Dataset, tmp_path: Path, kind: str) -> Path:
    if kind == "parquet":
        table.to_parquet(tmp_path / "table.parquet")
        return tmp_path / "table.parquet"
    table.save_to_disk(tmp_path / "saved")
    return next((tmp_path / "saved").glob("*.arrow")) if kind == "arrow" else tmp_path / "saved"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_a_table_gives_the_same_dataset_as_the_folders(folder, table, two_styles, tmp_path, kind):
    expected = prepare(two_styles, tmp_path / "from_folders", images=folder)
    report = prepare(two_styles, tmp_path / "from_table", images=save(table, tmp_path, kind))
    assert report["fingerprint"] == expected["fingerprint"]
    if kind == "parquet":
        again = prepare(two_styles, tmp_path / "from_table", images=tmp_path / "table.parquet")
        assert again["fingerprint"] == expected["fingerprint"]


def test_a_table_may_have_other_columns_splits_and_words(table, tmp_path):
    labels = [CLASSES[label].upper() for label in table["label"]]
    columns = {"photo": table["image"], "style": labels, "by": ["me"] * len(table)}
    renamed = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image())
    parts = {name: renamed.select(range(n, 24, 2)) for n, name in enumerate(("train", "valid"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    named = {"image_column": "photo", "label_column": "style", "attribution_column": "by"}
    rows, unlabelled = read_table(tmp_path / "saved", CLASSES, splits={"train": None}, **named)
    assert unlabelled == []
    assert set(rows["class_name"]) == set(CLASSES)
    assert Counter(rows["split"]) == {None: 12, "validation": 12}
    assert set(rows["attribution"]) == {"me"}
    assert len(set(rows["source_id"])) == 24


def test_rows_without_a_label_are_named(table, tmp_path):
    labels = [CLASSES[label] for label in table["label"]]
    labels[3] = None
    unnamed = datasets.Dataset.from_dict({"image": table["image"], "label": labels})
    unnamed.to_parquet(tmp_path / "table.parquet")
    rows, unlabelled = read_table(tmp_path / "table.parquet", CLASSES)
    assert len(rows) == 23
    assert unlabelled == [unusable("table/0000003", "no class", "no label")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_column": "photo"},
            "no column 'photo'; set source.options.image_column to one of image, label",
        ),
        ({"colour": "red"}, "known options are image_column, label_column"),
        (
            {"splits": {"table": "exam"}},
            "splits.table: Input should be 'train', 'validation', .* got 'exam'",
        ),
    ],
)
def test_wrong_options_of_a_table_are_explained(table, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_table(save(table, tmp_path, "parquet"), CLASSES, **options)


def test_numbers_without_names_are_no_labels(table, tmp_path):
    table.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "table.parquet")
    told = "nothing says what they mean; expected a ClassLabel or strings"
    with pytest.raises(ValueError, match=told):
        read_table(tmp_path / "table.parquet", CLASSES)


def test_a_dataset_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder and no dataset 'nobody/nothing'"):
        read_table("nobody/nothing", CLASSES)


def test_folders_and_tables_are_told_apart(folder, table, tmp_path):
    assert not is_table(folder)
    assert is_table(save(table, tmp_path, "parquet"))
    assert is_table(save(table, tmp_path, "saved"))
    assert is_table("someone/some-dataset")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "state.json").write_text("{}")
    assert is_table(tmp_path / "linked")  # its data may lie behind a link


def test_a_plain_dataset_is_no_prepared_data(table, tmp_path):
    table.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="holds no prepared data.*run `python -m data_prep"):
        load_prepared(tmp_path)


def test_the_path_beside_an_images_bytes_is_but_a_name(tmp_path):
    image = {"bytes": encoded(Image.new("RGB", (40, 40)), "PNG"), "path": f"{'x' * 300}.png"}
    rows = datasets.Dataset.from_dict({"image": [image] * 2, "label": CLASSES})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "table.parquet")
    assert len(read_table(tmp_path / "table.parquet", CLASSES)[0]) == 2


def test_attributions_come_from_metadata(tmp_path):
    (tmp_path / "photos" / "gothic").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png"):
        draw("gothic", np.random.default_rng(0)).save(tmp_path / "photos" / "gothic" / name)
    ben = {"author": "Ben", "license": "CC0", "source_url": "https://example.org/b"}
    lines = [{"file_name": "gothic/a.png", "attribution": "A, Ann, CC BY 4.0", "group": 7}]
    lines.append({"file_name": "gothic/b.png"} | ben)
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, outside = read_folders(tmp_path / "photos", ["gothic"])
    credits = ["A, Ann, CC BY 4.0", "Ben, CC0, https://example.org/b", None]
    assert rows["attribution"][:] == credits
    assert rows["group"][:] == ["7", None, None]
    assert outside == []
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "photos")
    rows, _ = read_folders(tmp_path / "linked", ["gothic"])
    assert (rows["split"][:], rows["attribution"][:]) == (["train"] * 3, credits)


def test_what_changes_becomes_another_version(table, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "gothic").mkdir(exist_ok=True)
        draw("gothic", np.random.default_rng(0)).save(tmp_path / "gothic" / name)
    before = read_folders(tmp_path, ["gothic"])[0]["version"][:]
    draw("gothic", np.random.default_rng(1)).save(tmp_path / "gothic" / "b.png")
    after = read_folders(tmp_path, ["gothic"])[0]["version"][:]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
    path = save(table, tmp_path, "parquet")
    before = read_table(path, CLASSES)[0]["version"][:]
    table.select(range(23, -1, -1)).to_parquet(path)
    assert not set(before) & set(read_table(path, CLASSES)[0]["version"])


def test_attributions_reach_the_prepared_dataset(folder, table, two_styles, tmp_path):
    names, path = [f"photographer {index}" for index in range(24)], tmp_path / "table.parquet"
    table.add_column("attribution", names).to_parquet(path)
    options = {"attribution_column": "attribution"}
    source = Source(kind="dataset", path=str(path), options=options)
    prepare(two_styles.model_copy(update={"source": source}), tmp_path / "run")
    splits = load_prepared(tmp_path / "run").values()
    assert {name for rows in splits for name in rows["attribution"]} == set(names)


def test_a_module_draws_what_the_domain_asks_for(two_styles, tmp_path, monkeypatch):
    drawing = """
import json
def write_images(folder, domain, seed, **options):
    folder.mkdir()
    (folder / "order.json").write_text(json.dumps([domain.name, seed, options]))
    return folder
"""
    (tmp_path / "drawing_of_tests.py").write_text(drawing)
    monkeypatch.syspath_prepend(tmp_path)
    source = Source(kind="module", path="drawing_of_tests", options={"size": 8})
    drawn = two_styles.model_copy(update={"source": source})
    mine, images = tmp_path / "mine", tmp_path / "images"
    mine.mkdir()
    assert fetch(source_of(drawn, mine), images, drawn, 3) == str(mine)
    assert fetch(source_of(drawn, None), images, drawn, 3) == images
    order = json.loads((tmp_path / "images" / "order.json").read_text())
    assert order == ["facades", 3, {"size": 8}]
    absent = drawn.model_copy(update={"source": Source(kind="module", path="not.there")})
    with pytest.raises(ValueError, match="'not.there' can't be imported .* write_images"):
        fetch(absent.source, tmp_path, absent, 3)


def test_files_outside_of_a_class_are_named(folder, tmp_path):
    for style in CLASSES:
        (tmp_path / style).mkdir()
        Image.open(folder / style / "00.png").save(tmp_path / style / "00.png")
    (tmp_path / "stray.png").write_bytes((folder / CLASSES[0] / "01.png").read_bytes())
    rows, outside = read_folders(tmp_path, CLASSES)
    assert len(rows) == 2
    assert outside == [unusable("stray.png", "no class", "not in a class folder")]


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("train", "boat"):
        (tmp_path / name).mkdir()
        draw("tudor", np.random.default_rng(0)).save(tmp_path / name / "a.png")
    rows, _ = read_folders(tmp_path, ["train", "boat"])
    found = sorted(zip(rows["class_name"], rows["split"], strict=True))
    assert found == [("boat", None), ("train", None)]


def test_a_class_without_a_readable_image_is_named(folder, two_styles, tmp_path):
    for style in CLASSES:
        (tmp_path / "photos" / style).mkdir(parents=True)
        for path in (folder / style).iterdir():
            content = path.read_bytes() if style == CLASSES[0] else b"broken"
            (tmp_path / "photos" / style / path.name).write_bytes(content)
    told = f"no images in the 12 readable images for: {CLASSES[1]}"
    with pytest.raises(FileNotFoundError, match=told):
        prepare(two_styles, tmp_path / "run", images=tmp_path / "photos")
