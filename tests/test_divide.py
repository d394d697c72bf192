"""Which image goes where: no group crosses a split, and the exam comes first."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_prep.divide import Reason, divide
from data_prep.duplicates import Fingerprints
from nicheclip.domain import Domain

SPLITS = ["test", "calibration", "validation", "train"]


class World:
    """Two classes of distinct pictures, to which a test adds its own."""

    def __init__(self, domain: Domain, per_split: int = 3):
        names = domain.class_names[:2]
        classes = {name: domain.classes[name] for name in names}
        self.domain = domain.model_copy(update={"classes": classes})
        self.rng = np.random.default_rng(0)
        self.rows: list[tuple[str, str, str, str | None]] = []
        self.bits: list[np.ndarray] = []
        self.groups: list[str | None] = []
        for split in SPLITS:
            for name in names:
                for _ in range(per_split):
                    self.add(name, split)

    def add(self, class_name, split, near: int | None = None, distance=0, same_file=False) -> int:
        """A picture, or a copy of picture number `near`; gives its number."""
        bits = self.rng.integers(0, 2, 144, dtype=np.uint8)
        if near is not None:
            bits = self.bits[near].copy()
            bits[self.rng.choice(144, distance, replace=False)] ^= 1
        number = len(self.rows)
        self.bits.append(bits)
        sha256 = self.rows[near][2] if same_file else f"{number:016d}"
        self.rows.append((f"image {number}", class_name, sha256, split))
        return number

    def prints(self, cosine: float = 1.0) -> Fingerprints:
        plain = np.packbits(np.array(self.bits), axis=1)
        mirrored = self.rng.integers(0, 256, plain.shape, dtype=np.uint8)
        bits, embeds = np.stack([plain, mirrored]), np.full((len(plain), 1), cosine)
        return Fingerprints(bits, embeds, (0.5, 0.5, 2.0))

    def divide(self, decisions=None):
        images = pd.DataFrame(self.rows, columns=["source_id", "label", "sha256", "given"])
        images["group"] = self.groups or None
        images = images.astype(object).where(images.notna(), None)
        keys = zip(images.sha256, images.label, strict=True)
        images["decision"] = [(decisions or {}).get(key, "") for key in keys]
        return divide(images, self.prints().near_duplicates(), self.domain)


def reasons(found: pd.DataFrame) -> dict[int, tuple]:
    aside = found[found.kind.notna()]
    assert (aside.split == "").all() and (found.split[found.kind.isna()] != "").all()
    return {row.Index: (row.kind, row.other, row.detail) for row in aside.itertuples()}


@pytest.fixture
def world(domain: Domain) -> World:
    return World(domain)


def test_a_train_copy_of_an_exam_picture_is_a_leak_and_names_it(world):
    name = world.domain.class_names[0]
    copy = world.add(name, "train", near=0, distance=10)
    found = world.divide()
    assert found.split[copy] == "" and found.split[0] == "test"
    assert reasons(found) == {copy: Reason("leak", "image 0", "test")}


@pytest.mark.parametrize("split", SPLITS[1:])
@pytest.mark.parametrize("same_file", [True, False])
@pytest.mark.parametrize("other_label", [True, False])
def test_the_test_split_loses_nothing_to_the_others(world, split, same_file, other_label):
    """Whatever lies elsewhere and looks like a test image goes, and the exam stays whole."""
    own, other = world.domain.class_names
    name, distance = other if other_label else own, 0 if same_file else 8
    copy = world.add(name, split, near=0, distance=distance, same_file=same_file)
    found = world.divide()
    if same_file and other_label:  # one file under two labels tells nothing, not even in an exam
        assert {0, copy} == set(reasons(found))
        return
    assert found.split[0] == "test"
    assert set(reasons(found)) == {copy}


def test_groups_go_to_one_split_as_a_whole(domain):
    world = World(domain, per_split=30)
    world.rows = [(source_id, name, sha256, None) for source_id, name, sha256, _ in world.rows]
    for number in range(60):
        world.add(world.rows[number][1], None, near=number, distance=12)
    found = world.divide()
    assert not reasons(found)
    assert found.split[240:].tolist() == found.split[:60].tolist()
    assert len(set(found.split[:60])) == 4


def test_no_pair_of_near_duplicates_lies_in_two_splits(domain, monkeypatch):
    """Chains too, and whatever the size of the blocks that are compared."""
    monkeypatch.setattr("data_prep.duplicates.CELLS", 500)
    world = World(domain, per_split=10)
    world.rows = [(source_id, name, sha256, None) for source_id, name, sha256, _ in world.rows]
    for number in range(40):
        link = world.add(world.rows[number][1], None, near=number, distance=12)
        world.add(world.rows[number][1], None, near=link, distance=12)
    found = world.divide()
    pairs = world.prints().near_duplicates()
    assert {(number, 80 + 2 * number) for number in range(40)} <= set(map(tuple, pairs.tolist()))
    assert found.split[pairs[:, 0]].tolist() == found.split[pairs[:, 1]].tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_needs_every_class(world, split):
    name = world.domain.class_names[0]
    world.rows = [row for row in world.rows if (row[1], row[3]) != (name, split)]
    world.bits = world.bits[: len(world.rows)]
    with pytest.raises(ValueError, match=f"the {split} split has no image of: {name}"):
        world.divide()


def test_a_person_decides_between_two_labels(world):
    own, other = world.domain.class_names
    copy = world.add(other, "train", near=20, same_file=True)
    sha256 = world.rows[20][2]
    assert set(reasons(world.divide())) == {20, copy}
    assert set(reasons(world.divide({(sha256, world.rows[20][1]): "keep"}))) == {copy}
    dropped = reasons(world.divide({(sha256, other): "drop"}))
    assert dropped == {copy: Reason("dropped by hand")}
