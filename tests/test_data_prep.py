"""What data_prep does to images, and what it leaves alone."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from data_prep.divide import assign_folds, assign_splits
from data_prep.duplicates import Fingerprints, connected_groups
from data_prep.prepare import prepare
from data_prep.quality import judge, out_of_fold_probabilities, samples_per_epoch
from data_prep.report import warnings
from data_prep.sources.folders import read_folders
from data_prep.verify import verify_rows
from domains.facades.painter import STYLES, draw
from domains.facades.score import score
from nicheclip.clip import encode_images, load_clip
from nicheclip.domain import Augmentation, Domain, QualityFilter, Source, Splits
from nicheclip.run import load_prepared
from nicheclip.training.data import TrainingSamples, augment
from tests.conftest import encoded

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
        paths = (prepared / "images" / name).rglob("*.jpg")
        files = {path.relative_to(prepared / "images").as_posix(): path for path in paths}
        assert sorted(splits[name]["source_id"]) == sorted(files)
        assert set(splits[name]["repeats"]) == {1}
        assert set(splits[name]["zero_shot_score"]) == {None}
        for row in splits[name]:
            content = files[row["source_id"]].read_bytes()
            assert row["sha256"] == hashlib.sha256(content).hexdigest()
            assert np.array_equal(row["image"], Image.open(io.BytesIO(content)))


def test_every_image_read_is_accounted_for(prepared, report):
    files = sum(path.is_file() for path in (prepared / "images").rglob("*.jpg"))
    counts = report["counts"]
    found = sum(counts["kept"].values()) + sum(counts["quarantined"].values())
    assert counts["read"] == files == found + counts["dropped_by_filter"]
    named = {entry["source_id"] for entry in [*report["quarantined"], *report["suspects"]]}
    assert len(named) == len(report["quarantined"]) + len(report["suspects"])


def test_planted_faults_are_found(prepared, report, truth):
    aside = [entry for entry in report["quarantined"] if entry["kind"] == "unreadable"]
    unreadable = [entry["source_id"] for entry in aside]
    assert unreadable and sorted(unreadable) == sorted(truth["unreadable"])
    found = score(prepared)
    assert found["leaks"]["planted"] > 0
    assert found["leaks"]["found"] == found["leaks"]["planted"]


def test_only_train_is_filtered(report):
    assert {entry["source_id"].split("/")[0] for entry in report["suspects"]} == {"train"}
    for entry in report["classes"]:
        assert entry["filter"]["dropped"] <= 0.3 * entry["filter"]["images"]


@pytest.fixture
def samples(prepared, domain) -> TrainingSamples:
    train, processor = load_prepared(prepared)["train"], load_clip(domain.base)[1]
    return TrainingSamples(train, domain.prompt_bank[1], domain.augmentation, processor, seed=0)


def test_an_epoch_visits_each_class_as_often_and_each_image_at_least_once(samples, domain):
    train = samples.rows
    per_class = np.bincount(samples.labels)
    own = np.bincount(train["label"])
    assert (per_class == np.maximum(domain.samples_per_class, own)).all()
    assert set(samples.row_of_sample) == set(range(len(train)))
    assert len(train) == len(set(train["sha256"])), "oversampling must not copy pixels"


def test_each_visit_draws_its_own_view_and_prompt(samples, domain):
    row = int(np.argmax(samples.rows["repeats"]))
    same_image = np.flatnonzero(samples.row_of_sample == row)[:2]
    first, second = (np.asarray(samples[int(sample)]["images"]) for sample in same_image)
    assert not np.array_equal(first, second)
    again = np.asarray(samples[int(same_image[0])]["images"])
    assert np.array_equal(first, again), "the same sample of the same epoch is always the same"
    samples.set_epoch(1)
    assert not np.array_equal(first, np.asarray(samples[int(same_image[0])]["images"]))
    view, samples.seed = np.asarray(samples.view(row, 0)), 1
    assert not np.array_equal(view, np.asarray(samples.view(row, 0)))
    bank, _ = domain.prompt_bank
    of_class = np.flatnonzero(samples.labels == 0).tolist()
    prompts = {bank[samples[sample]["prompts"]] for sample in of_class}
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
            picture = draw(style, np.random.default_rng([number, index]), size=160)
            picture.save(folder / style / f"{index} (1)%2C.png")
    return folder


@pytest.fixture
def two_styles(domain: Domain) -> Domain:
    changes = {
        "classes": {style: domain.classes[style] for style in STYLES[:2]},
        "clusters": {"arches": list(STYLES[:2])},
        "splits": Splits(validation=2, calibration=2, test=3),
        "stored_short_side": 128,
        "quality_filter": QualityFilter(mode="none"),
    }
    return domain.model_copy(update=changes)


def test_folders_without_splits_are_dealt_out_by_group(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos")
    copy = Image.open(folder / STYLES[0] / "0 (1)%2C.png").crop((1, 1, 158, 159)).resize((150, 150))
    copy.save(folder / STYLES[0] / "recompressed.jpg", quality=60)
    shutil.copy(folder / STYLES[1] / "1 (1)%2C.png", folder / STYLES[1] / "same.png")
    (folder / STYLES[0] / "notes.txt").write_text("no image")
    report = prepare(two_styles, tmp_path / "run", images=folder)
    assert report["counts"]["quarantined"] == {"unreadable": 1, "exact duplicate": 1}
    splits = load_prepared(tmp_path / "run")
    group_of = {row["source_id"]: row["group_id"] for rows in splits.values() for row in rows}
    assert group_of[f"{STYLES[0]}/recompressed.jpg"] == group_of[f"{STYLES[0]}/0 (1)%2C.png"]
    groups = [set(rows["group_id"]) for rows in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)), "no group is in two splits"
    assert {row["image"].size for rows in splits.values() for row in rows} == {(128, 128)}


def test_splits_may_lie_one_after_the_other_in_several_shards(tmp_path, two_styles, monkeypatch):
    """All are given by folders, so each takes a run of rows as they were listed."""
    monkeypatch.setattr("nicheclip.cached_map.SHARD_ROWS", 10)
    folder = photo_folders(tmp_path / "photos", per_class=12)
    for style in STYLES[:2]:
        for index, name in enumerate(sorted(path.name for path in (folder / style).iterdir())):
            split = ("calibration", "test", "train", "validation")[index // 3]
            (tmp_path / "split" / split / style).mkdir(parents=True, exist_ok=True)
            (folder / style / name).rename(tmp_path / "split" / split / style / name)
    report = prepare(two_styles, tmp_path / "run", images=tmp_path / "split")
    assert set(report["counts"]["kept"].values()) == {6}
    for name, rows in load_prepared(tmp_path / "run").items():
        assert all(row["source_id"].startswith(name) for row in rows)
        assert all(row["source_id"].split("/")[1] == STYLES[row["label"]] for row in rows)


def test_the_same_file_under_two_labels_is_a_conflict(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos")
    shutil.copy(folder / STYLES[0] / "3 (1)%2C.png", folder / STYLES[1] / "same.png")
    report = prepare(two_styles, tmp_path / "run", images=folder)
    assert report["counts"]["quarantined"] == {"conflict": 2}


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
        prepare(two_styles.model_copy(update={"source": Source()}), tmp_path / "run")
    with pytest.raises(ValueError, match="pass --contact"):
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


def test_a_split_without_images_of_a_class_is_refused(tmp_path, two_styles):
    folder = photo_folders(tmp_path / "photos", per_class=3)
    with pytest.raises(ValueError, match="the train split has no image of"):
        prepare(two_styles, tmp_path / "run", images=folder)


def prints(pictures: list[Image.Image], domain: Domain) -> Fingerprints:
    encode = partial(encode_images, *load_clip(domain.base), progress=False)
    files = [
        {"image": {"bytes": encoded(picture, "JPEG", quality=70), "path": None}}
        for picture in pictures
    ]
    rows = verify_rows(files, stored_short_side=96, smallest_side=1)
    return Fingerprints.make(rows, encode(pictures, len(pictures)), encode)


def drawn(count: int) -> list[Image.Image]:
    styles = enumerate(STYLES * (count // len(STYLES)))
    return [draw(style, np.random.default_rng(index), 96) for index, style in styles]


@pytest.fixture(scope="module")
def drawings_and_copies(domain: Domain) -> Fingerprints:
    """96 drawings, then cropped copies of the first 24."""
    drawings = drawn(96)
    copies = [picture.crop((2, 1, 94, 95)).resize((96, 96)) for picture in drawings[:24]]
    return prints(drawings + copies, domain)


def test_cropped_and_recompressed_copies_are_one_group_and_others_are_not(drawings_and_copies):
    groups = connected_groups(drawings_and_copies.near_duplicates(), 120)
    assert len(set(groups[:96])) == 96
    assert (groups[96:] == groups[:24]).sum() >= 23


def test_a_mirrored_picture_is_the_same_picture(domain):
    """Training flips half of its views: a mirrored test image in train is a test image."""
    drawings = drawn(48)
    found = prints([*drawings, *(ImageOps.mirror(drawing) for drawing in drawings[:12])], domain)
    groups = connected_groups(found.near_duplicates(), 60)
    assert (groups[48:] == groups[:12]).all()
    assert len(set(groups[:48])) == 48


def test_the_search_misses_no_pair_and_invents_none():
    """On random hashes with planted neighbours at up to 32 of 144 bits."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (2, 8000, 144), dtype=np.uint8)
    for index in range(1000):
        order = [0, 1] if index % 2 else [1, 0]  # a copy, or the mirror image
        bits[:, 2 * index + 1] = bits[order, 2 * index]
        bits[:, 2 * index + 1, rng.choice(144, 32 if index % 2 else 24, replace=False)] ^= 1
    alike = np.ones((8000, 1), dtype=np.float32)
    prints = Fingerprints(np.packbits(bits, axis=2), alike, (0.0, 0.0, 2.0))
    pairs = {tuple(pair) for pair in prints.near_duplicates().tolist()}
    assert pairs <= {(2 * index, 2 * index + 1) for index in range(1000)}
    assert len(pairs) == 1000


@pytest.mark.slow
def test_an_exact_copy_is_never_lost_among_many():
    """A thousand pictures with one hash are one group, without comparing all pairs."""
    hashes = np.tile(np.arange(18, dtype=np.uint8), (2, 1000, 1))
    pairs = Fingerprints(hashes, np.ones((1000, 1)), (0.9, 0.9, 0.9)).near_duplicates()
    assert len(set(connected_groups(pairs, 1000))) == 1


@pytest.mark.parametrize("mode", ["zero_shot", "linear_probe"])
def test_the_filter_never_deletes_a_class_that_the_base_model_does_not_know(mode):
    """A Georgian-like class: base CLIP gives 89 % of it less than 0.05."""
    labels = np.repeat([0, 1], 100)
    own = np.concatenate([np.full(100, 0.9), np.linspace(0, 0.056, 100)])
    probabilities = np.where(labels[:, None] == [0, 1], own[:, None], 1 - own[:, None])
    trusted = np.zeros(200, dtype=bool)
    verdict = judge(probabilities, labels, QualityFilter(mode=mode), trusted)
    counts = verdict[["wanted", "suspect"]].groupby(labels).sum()
    assert counts.wanted.tolist() == [0, 89 if mode == "zero_shot" else 10]
    assert counts.suspect[0] == 0 and counts.suspect[1] <= 30
    # the least likely go first
    assert own[verdict.suspect].max() < own[(labels == 1) & ~verdict.suspect].min()
    assert set(verdict.suspected_label[labels == 1]) == {0}
    assert not judge(probabilities, labels, QualityFilter(mode="none"), trusted).suspect.any()


def test_what_a_person_has_kept_is_not_suspected():
    labels, trusted = np.repeat([0, 1], 50), np.arange(100) == 0
    own = np.where(np.arange(100) % 50 < 5, 0.01, 0.9)
    probabilities = np.where(labels[:, None] == [0, 1], own[:, None], 1 - own[:, None])
    verdict = judge(probabilities, labels, QualityFilter(), trusted)
    assert verdict.suspect.sum() == 9 and not verdict.suspect[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_classes_of_few_images_are_judged_or_left_alone(size):
    rng = np.random.default_rng(size)
    labels = np.repeat([0, 1, 2], size)
    embeds = np.eye(8)[labels] + 0.05 * rng.normal(size=(3 * size, 8))
    probabilities = out_of_fold_probabilities(embeds, labels, np.arange(3 * size), 3)
    assert np.isfinite(probabilities).all()
    trusted = np.zeros(3 * size, dtype=bool)
    assert not judge(probabilities, labels, QualityFilter(), trusted).suspect.any()


def test_the_probe_judges_an_image_without_having_seen_its_near_duplicates():
    """Random embeddings: only who has seen an image or its copy can know its label."""
    rng = np.random.default_rng(0)
    embeds = np.repeat(rng.normal(size=(100, 64)), 2, axis=0)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    labels, groups = np.repeat(np.arange(100) % 4, 2), np.repeat(np.arange(100), 2)
    probabilities = out_of_fold_probabilities(embeds, labels, groups, 4)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == labels).mean() < 0.4
    leaky = out_of_fold_probabilities(embeds, labels, np.arange(200), 4)
    assert (leaky.argmax(axis=1) == labels).mean() > 0.6


def test_only_a_class_that_the_cap_has_protected_is_warned_of(drawings_and_copies):
    judged = {"held": (9, 6), "noisy": (2, 2)}
    classes = [
        {"name": name, "examined": 20, "filter": {"wanted": wanted, "images": 20, "suspect": taken}}
        for name, (wanted, taken) in judged.items()
    ]
    images = pd.DataFrame({"sha256": [], "label": []})
    (told,) = warnings(classes, images, {}, [], drawings_and_copies)
    assert told.startswith("held: the filter wanted 9 of 20 images")


def test_visits_make_up_for_small_classes():
    labels = np.repeat([0, 1, 2], [3, 10, 25])
    samples = samples_per_epoch(labels, 20, np.random.default_rng(0))
    assert np.bincount(labels, weights=samples).tolist() == [20, 20, 25]
    assert samples[labels == 0].tolist() in ([7, 7, 6], [7, 6, 7], [6, 7, 7])


def split_of(labels: np.ndarray, groups: list[str], splits: Splits) -> dict[str, str]:
    return dict(zip(groups, assign_splits(labels, groups, splits), strict=True))


def test_splits_are_stratified_and_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [400, 1000])
    groups = [f"group {index}" for index in range(1400)]
    splits = Splits(validation=0.1, calibration=150, test=0.25)
    assigned = split_of(labels, groups, splits)
    for label, size in ((0, 250), (1, 850)):  # the shares are of what the count leaves
        counts = Counter(assigned[groups[index]] for index in np.flatnonzero(labels == label))
        assert counts["calibration"] == 150
        assert abs(counts["test"] - 0.25 * size) <= 0.5
        assert abs(counts["validation"] - 0.1 * size) <= 0.5
    order = rng.permutation(1400)
    assert split_of(labels[order], [groups[index] for index in order], splits) == assigned


def test_added_images_move_few_earlier_ones():
    labels = np.repeat([0, 1], [60, 140])
    groups = [f"group {index}" for index in range(200)]
    shares, counts = Splits(), Splits(validation=5, calibration=5, test=10)
    more = np.append(labels, np.arange(40) % 2), [*groups, *(f"later {n}" for n in range(40))]
    for splits in (shares, counts):
        before, after = split_of(labels, groups, splits), split_of(*more, splits)
        moved = [group for group in groups if after[group] != before[group]]
        assert len(moved) <= 20, "shares and counts are exact, so an added image may push one out"
    folds, later = assign_folds(labels, groups, 5), assign_folds(*more, 5)
    assert (folds != later[: len(groups)]).sum() <= 30


def test_folds_are_stratified_and_keep_groups_together():
    labels = np.repeat([0, 1, 2], [101, 43, 7])
    groups = [f"group {index // 2}" if index < 60 else f"group {index}" for index in range(151)]
    folds = assign_folds(labels, groups, 5)
    for label in range(3):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 2, "pairs may not be torn apart"
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == len(
        set(groups)
    )
    order = np.random.default_rng(0).permutation(151)
    again = assign_folds(labels[order], [groups[index] for index in order], 5)
    assert again.tolist() == folds[order].tolist()


def test_every_class_gets_an_image_in_every_split():
    labels = np.repeat(np.arange(30), 5)
    assigned = np.array(assign_splits(labels, [f"group {index}" for index in range(150)], Splits()))
    for name in HELD_OUT:
        assert set(labels[assigned == name]) == set(range(30))


def test_augmentation_can_be_switched_off_and_never_leaves_the_square():
    names = [name for name in Augmentation.model_fields if name != "crop_scale"]
    off = Augmentation(crop_scale=(1, 1), **dict.fromkeys(names, 0))
    image = draw("gothic", np.random.default_rng(0), 96)
    wide = image.resize((200, 96))
    for seed in range(20):
        assert augment(wide, 64, Augmentation(), np.random.default_rng(seed)).size == (64, 64)
    plain = np.asarray(augment(image, 96, off, np.random.default_rng(3)), dtype=int)
    # only the aspect ratio is drawn
    assert np.abs(plain - np.asarray(image, dtype=int)).mean() < 12
