"""What data_prep does to images, and what it leaves alone."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.duplicates import near_duplicate_groups
from data_prep.prepare import prepare
from data_prep.quality import choose_drops, visits_per_epoch
from data_prep.sources.folders import read_folders
from data_prep.sources.painter import STYLES, draw
from data_prep.splits import assign_splits
from data_prep.verify import verify_image
from nicheclip.data import TrainingVisits, augment, load_prepared
from nicheclip.domain import Augmentation, Domain, QualityFilter, Splits

HELD_OUT = ("validation", "calibration", "test")


@pytest.fixture(scope="module")
def report(prepared: Path) -> dict:
    return json.loads((prepared / "data" / "report.json").read_text())


@pytest.fixture(scope="module")
def truth(prepared: Path) -> dict:
    return json.loads((prepared / "images" / "truth.json").read_text())


def test_held_out_splits_hold_every_drawing_untouched(prepared):
    """No filtered, no oversampled and no altered image in validation, calibration and test."""
    splits = load_prepared(prepared)
    for name in HELD_OUT:
        files = {
            path.relative_to(prepared / "images").as_posix(): path
            for path in (prepared / "images" / name).rglob("*.jpg")
        }
        assert sorted(splits[name]["source_id"]) == sorted(files)
        assert set(splits[name]["repeats"]) == {1}
        assert set(splits[name]["zero_shot_score"]) == {None}
        for row in splits[name]:
            content = files[row["source_id"]].read_bytes()
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(content))))


def test_every_image_read_is_accounted_for(prepared, report):
    files = sum(path.is_file() for path in (prepared / "images").rglob("*.jpg"))
    counts = report["counts"]
    assert counts["read"] == files
    assert files == sum(counts["kept"].values()) + sum(counts["rejected"].values()) + counts["dropped_by_filter"]
    named = {entry["source_id"] for entry in [*report["rejected"], *report["dropped"]]}
    assert len(named) == len(report["rejected"]) + len(report["dropped"])


def test_planted_faults_are_found(report, truth):
    unreadable = {entry["source_id"] for entry in report["rejected"] if entry["reason"].startswith("unreadable")}
    assert truth["unreadable"] and unreadable == set(truth["unreadable"])  # noqa: PT018
    assert report["planted_faults"]["leaks"]["planted"] > 0
    assert report["planted_faults"]["leaks"]["found"] == report["planted_faults"]["leaks"]["planted"]


def test_only_train_is_filtered(report):
    assert {entry["source_id"].split("/")[0] for entry in report["dropped"]} <= {"train"}
    for entry in report["classes"]:
        assert entry["filter"]["dropped"] <= 0.3 * entry["filter"]["images"]


def test_an_epoch_visits_each_class_as_often_and_each_image_at_least_once(prepared, domain):
    train = load_prepared(prepared)["train"]
    visits = TrainingVisits(train, list(domain.classes.values()), domain.augmentation, side=96, seed=0)
    per_class = np.bincount(visits.labels)
    own = np.bincount(train["label"])
    assert (per_class == np.maximum(domain.samples_per_class, own)).all()
    assert set(visits.row_of_visit) == set(range(len(train)))
    assert len(train) == len(set(train["sha256"])), "oversampling must not copy pixels"


def test_each_visit_draws_its_own_view_and_prompt(prepared, domain):
    train = load_prepared(prepared)["train"]
    visits = TrainingVisits(train, list(domain.classes.values()), domain.augmentation, side=96, seed=0)
    row = int(np.argmax(train["repeats"]))
    same_image = np.flatnonzero(visits.row_of_visit == row)[:2]
    first, second = (np.asarray(visits[int(visit)]["image"]) for visit in same_image)
    assert not np.array_equal(first, second)
    again = np.asarray(visits[int(same_image[0])]["image"])
    assert np.array_equal(first, again), "the same visit of the same epoch is always the same"
    visits.set_epoch(1)
    assert not np.array_equal(first, np.asarray(visits[int(same_image[0])]["image"]))
    prompts = {visits[int(visit)]["prompt"] for visit in np.flatnonzero(visits.labels == 0)}
    assert len(prompts) > 1
    assert prompts <= set(domain.classes[domain.class_names[0]])


def test_preparing_again_gives_the_same_dataset(prepared, tmp_path, report):
    again = prepare(Domain.load(prepared), tmp_path / "again", images=prepared / "images")
    assert again["fingerprint"] == report["fingerprint"]
    assert again["counts"] == report["counts"]


def photo_folders(folder: Path, per_class: int = 12) -> Path:
    """Two classes of larger drawings without splits, as a user's photos lie."""
    for number, style in enumerate(STYLES[:2]):
        (folder / style).mkdir(parents=True)
        for index in range(per_class):
            draw(style, np.random.default_rng([number, index]), size=160).save(folder / style / f"{index} (1)%2C.png")
    return folder


@pytest.fixture
def two_styles(domain: Domain) -> Domain:
    return domain.model_copy(
        update={
            "classes": {style: domain.classes[style] for style in STYLES[:2]},
            "clusters": {"arches": list(STYLES[:2])},
            "splits": Splits(validation=2, calibration=2, test=3),
            "stored_short_side": 128,
            "quality_filter": QualityFilter(mode="none"),
        }
    )


def test_folders_without_splits_are_dealt_out_by_group(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos")
    copy = Image.open(folder / STYLES[0] / "0 (1)%2C.png").resize((150, 150))
    copy.save(folder / STYLES[0] / "recompressed.jpg", quality=60)
    (folder / STYLES[1] / "same.png").write_bytes((folder / STYLES[1] / "1 (1)%2C.png").read_bytes())
    (folder / STYLES[0] / "notes.txt").write_text("no image")
    report = prepare(two_styles, tmp_path / "run", images=folder)
    assert report["counts"]["rejected"] == {"not an image file": 1, "exact duplicate": 1}
    splits = load_prepared(tmp_path / "run")
    home = {row["source_id"]: (name, row["group_id"]) for name, rows in splits.items() for row in rows}
    assert home[f"{STYLES[0]}/recompressed.jpg"] == home[f"{STYLES[0]}/0 (1)%2C.png"]
    groups = [set(rows["group_id"]) for rows in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)), "no group is in two splits"
    assert {row["image"].size for rows in splits.values() for row in rows} == {(128, 128)}


def test_the_same_file_under_two_labels_is_a_conflict(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos")
    (folder / STYLES[1] / "same.png").write_bytes((folder / STYLES[0] / "3 (1)%2C.png").read_bytes())
    report = prepare(two_styles, tmp_path / "run", images=folder)
    assert report["counts"]["rejected"] == {"conflict": 2}


def test_wrong_folders_are_explained(tmp_path, two_styles):
    with pytest.raises(FileNotFoundError, match="one folder a class"):
        read_folders(tmp_path / "nowhere", two_styles.class_names)
    folder = photo_folders(tmp_path / "photos", per_class=1)
    with pytest.raises(FileNotFoundError, match="no images in .* for: moorish"):
        read_folders(folder, [*two_styles.class_names, "moorish"])
    (folder / "gothicc").mkdir()
    draw("gothic", np.random.default_rng(0)).save(folder / "gothicc" / "a.png")
    with pytest.raises(ValueError, match="gothicc.*did you mean 'gothic'"):
        read_folders(folder, two_styles.class_names)
    with pytest.raises(ValueError, match="pass --images"):
        prepare(Domain.load("domains/architecture"), tmp_path / "run")


def test_photos_in_a_folder_called_data_are_not_overwritten(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "data", per_class=12)
    with pytest.raises(ValueError, match="choose another --run"):
        prepare(two_styles, tmp_path, images=folder)
    assert len(list(folder.rglob("*.png"))) == 24


def test_classes_may_hold_folders(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos", per_class=12)
    (folder / STYLES[0] / "paris").mkdir()
    (folder / STYLES[0] / "0 (1)%2C.png").rename(folder / STYLES[0] / "paris" / "0.png")
    rows, others = read_folders(folder, two_styles.class_names)
    assert (len(rows), others) == (24, [])
    assert rows["class_name"][:].count(STYLES[0]) == 12


def test_sixteen_bit_pictures_keep_their_tones(tmp_path):
    tones = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(tones).save(tmp_path / "deep.png")
    stored = verify_image({"path": str(tmp_path / "deep.png")}, stored_short_side=64)
    values = np.asarray(Image.open(io.BytesIO(stored["image"]["bytes"])).convert("L"), dtype=int)
    assert np.abs(values - (tones >> 8)).mean() < 2


def test_a_split_without_images_of_a_class_is_refused(tmp_path, two_styles):
    with pytest.raises(ValueError, match="the train split has no image of"):
        prepare(two_styles, tmp_path / "run", images=photo_folders(tmp_path / "photos", per_class=6))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("CMYK", {"format": "JPEG"}), ("L", {"format": "JPEG"}), ("P", {"format": "GIF"}), ("RGBA", {"format": "PNG"})],
)
def test_odd_modes_are_stored_as_rgb(tmp_path, mode, options):
    path = tmp_path / "image"
    draw("tudor", np.random.default_rng(0)).convert(mode).save(path, **options)
    stored = verify_image({"path": str(path)}, stored_short_side=96)
    assert stored["error"] is None
    assert Image.open(io.BytesIO(stored["image"]["bytes"])).mode == "RGB"


def test_rotated_photos_are_stored_upright(tmp_path):
    image = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "image.jpg", exif=exif)
    stored = verify_image({"path": str(tmp_path / "image.jpg")}, stored_short_side=96)
    assert Image.open(io.BytesIO(stored["image"]["bytes"])).size == (40, 60)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_broken_files_are_named_not_raised(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    stored = verify_image({"path": str(tmp_path / "broken.jpg")}, stored_short_side=96)
    assert stored["image"] is None
    assert stored["error"]


def test_cropped_and_recompressed_copies_are_one_group_and_other_drawings_are_not(tmp_path):
    pictures = [draw(style, np.random.default_rng(index), 96) for index, style in enumerate(STYLES * 4)]
    copies = [picture.crop((2, 1, 94, 95)).resize((96, 96)) for picture in pictures[:12]]
    hashes = []
    for picture in [*pictures, *copies]:
        picture.save(tmp_path / "picture.jpg", quality=70)
        hashes.append(verify_image({"path": str(tmp_path / "picture.jpg")}, stored_short_side=96)["phash"])
    groups = near_duplicate_groups(hashes)
    assert len(set(groups[: len(pictures)])) == len(pictures)
    assert (groups[len(pictures) :] == groups[:12]).mean() >= 11 / 12


def test_the_filter_never_deletes_a_class_that_the_base_model_does_not_know():
    labels = np.repeat([0, 1], 100)
    scores = np.concatenate([np.full(100, 0.9), np.linspace(0, 0.06, 100)])  # class 1: 83 below 0.05
    drop, counts = choose_drops(scores, labels, QualityFilter(threshold=0.05, max_drop_share=0.3), 2)
    assert counts[0] == {"images": 100, "wanted": 0, "dropped": 0}
    assert counts[1]["wanted"] > 80
    assert counts[1]["dropped"] == 30
    assert scores[drop].max() < scores[(labels == 1) & ~drop].min(), "the least likely go first"
    assert not choose_drops(scores, labels, QualityFilter(mode="none"), 2)[0].any()


def test_visits_make_up_for_small_classes():
    labels = np.repeat([0, 1, 2], [3, 10, 25])
    visits = visits_per_epoch(labels, 20, np.random.default_rng(0))
    assert np.bincount(labels, weights=visits).tolist() == [20, 20, 25]
    assert visits[labels == 0].tolist() in ([7, 7, 6], [7, 6, 7], [6, 7, 7])


def test_splits_are_stratified_and_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 100])
    groups = [f"group {index}" for index in range(140)]
    splits = Splits(validation=0.1, calibration=5, test=0.25)
    assigned = dict(zip(groups, assign_splits(labels, groups, splits), strict=True))
    assert [list(assigned.values())[:40].count(name) for name in (*HELD_OUT, "train")] == [4, 5, 10, 21]
    assert [list(assigned.values())[40:].count(name) for name in (*HELD_OUT, "train")] == [10, 5, 25, 60]
    order = rng.permutation(140)
    shuffled = [groups[index] for index in order]
    again = dict(zip(shuffled, assign_splits(labels[order], shuffled, splits), strict=True))
    assert again == assigned


def test_augmentation_can_be_switched_off_and_never_leaves_the_square():
    off = Augmentation(
        crop_scale=(1, 1), horizontal_flip=0, rotation=0, perspective=0, brightness=0, contrast=0, saturation=0,
        hue=0, grayscale=0, blur=0,
    )  # fmt: skip
    image = draw("gothic", np.random.default_rng(0), 96)
    wide = image.resize((200, 96))
    for seed in range(20):
        assert augment(wide, 64, Augmentation(), np.random.default_rng(seed)).size == (64, 64)
    plain = np.asarray(augment(image, 96, off, np.random.default_rng(3)), dtype=int)
    assert np.abs(plain - np.asarray(image, dtype=int)).mean() < 12  # only the aspect ratio is drawn
