"""Clusters are proposed from what the base model confuses in train and validation alone."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from data_prep.clusters import agreement, main, measure, propose, soft_confusion
from nicheclip.domain import Domain


def proposal(domain: Path, run: Path, *options: str) -> tuple[dict, str]:
    """The parsed YAML of stdout, and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        main([str(domain), "--run", str(run), *options])
    return yaml.safe_load(stdout.getvalue()), stderr.getvalue()


def changed(folder: Path, run: Path, **values: object) -> Path:
    """The run's domain file with other values; None takes one out."""
    raw = yaml.safe_load((run / "domain.yaml").read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "other.yaml").write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return folder / "other.yaml"


def test_the_proposal_can_be_pasted_and_is_compared(prepared, domain):
    proposed, notes = proposal(prepared, prepared)
    members = [name for names in proposed["clusters"].values() for name in names]
    assert sorted(members) == sorted(domain.class_names)
    assert 1 < max(map(len, proposed["clusters"].values())) <= 4
    raw = yaml.safe_load((prepared / "domain.yaml").read_text(encoding="utf-8"))
    assert Domain.model_validate(raw | proposed).clusters == proposed["clusters"]
    both, own = re.search(r"(\d+) of the domain file's (\d+) pairs", notes).groups()
    # the tiny sample still finds most of the painter's clusters
    assert int(both) > 6 and own == "12"


def test_a_domain_without_clusters_and_smaller_ones(prepared, tmp_path):
    bare = changed(tmp_path, prepared, clusters=None)
    proposed, notes = proposal(bare, prepared, "--largest", "2")
    assert "no clusters of its own" in notes and "Rand" not in notes
    assert max(map(len, proposed["clusters"].values())) == 2


def test_errors_say_what_to_do(prepared, domain, tmp_path):
    with pytest.raises(SystemExit, match="python -m data_prep .* --run .*empty"):
        main([str(prepared), "--run", str(tmp_path / "empty")])
    classes = {name: domain.classes[name] for name in domain.class_names[1:]}
    other = changed(tmp_path, prepared, classes=classes, clusters=None)
    with pytest.raises(SystemExit, match="other classes"):
        main([str(other), "--run", str(prepared)])


def test_confusions_are_measured_on_what_trains_and_on_validation_alone(domain):
    rng = np.random.default_rng(0)
    parts = rng.choice(["train", "validation", "calibration", "test", ""], 400)
    labels = np.arange(400) % 4
    image_embeds = np.eye(12, 16)[labels] + 0.4 * rng.normal(size=(400, 16))
    zero_shot = rng.dirichlet(np.ones(12), 400)
    zero_shot[(labels == 2), 3] += 1
    names = [f"{part}/{index}" for index, part in enumerate(parts)]
    dropped = {name for name in names if name.startswith("train/1")}
    images = pd.DataFrame({"source_id": names, "group_id": names, "split": parts})
    images["label"] = [domain.class_names[i] for i in labels]
    kept = images[(parts != "") & ~images.source_id.isin(dropped)]
    found = measure(domain, kept, image_embeds, zero_shot)

    train = (parts == "train") & ~np.isin(names, list(dropped))
    used = train | (parts == "validation")
    assert (found["train"], found["validation"]) == (train.sum(), (parts == "validation").sum())
    there, back = found["pairs"][:2]
    assert (there["label"], there["other"]) == tuple(domain.class_names[2:4])
    assert (back["label"], back["other"]) == tuple(domain.class_names[3:1:-1])
    assert there["zero_shot"] == pytest.approx(zero_shot[used & (labels == 2), 3].mean(), abs=1e-4)
    both = np.mean([way[name] for way in (there, back) for name in ("probe", "zero_shot")])
    assert max(found["affinity"]) == pytest.approx(both, abs=1e-4)
    for way in found["pairs"]:
        own = train & (labels == domain.class_names.index(way["label"]))
        surest = [each["source_id"] for each in way["surest"]]
        assert set(surest) <= set(np.array(names)[own]) and way["images"] == own.sum()
        chances = [each["probability"] for each in way["surest"]]
        assert chances == sorted(chances, reverse=True) and way["mistaken"] >= len(chances)
    assert any(way["surest"] for way in found["pairs"])

    image_embeds[~used], zero_shot[~used] = 0, 1 / 12
    assert measure(domain, kept, image_embeds, zero_shot) == found


def noise(classes: int, seed: int) -> np.ndarray:
    """Symmetric confusions of 2 to 4 %."""
    affinity = np.random.default_rng(seed).uniform(0.02, 0.04, (classes, classes))
    affinity = (affinity + affinity.T) / 2
    np.fill_diagonal(affinity, 0)
    return affinity


def members(affinity: np.ndarray, **options: int) -> list[list[int]]:
    return list(propose(range(len(affinity)), affinity, **options).values())


def test_planted_blocks_are_found():
    blocks = [[0, 5, 9], [1, 2], [3, 7, 8, 11]]
    affinity = noise(12, seed=0)
    for block in blocks:
        affinity[np.ix_(block, block)] += 0.15
    np.fill_diagonal(affinity, 0)
    assert members(affinity) == [*blocks, [4], [6], [10]]
    smaller = members(affinity, largest=3)
    assert max(map(len, smaller)) == 3 and [0, 5, 9] in smaller
    assert sorted(sum(smaller, [])) == list(range(12))


@pytest.mark.parametrize(
    "affinity", [noise(12, seed=1), np.zeros((12, 12)), np.ones((2, 2)) - np.eye(2)]
)
def test_without_a_pair_that_stands_out_every_class_is_alone(affinity):
    assert members(affinity) == [[index] for index in range(len(affinity))]


def test_rare_mistakes_join_nothing():
    affinity = np.zeros((5, 5))
    affinity[0, 1] = affinity[1, 0] = 0.005  # far above the mean, and yet next to nothing
    assert members(affinity) == [[0], [1], [2], [3], [4]]


def test_confusion_does_not_depend_on_class_sizes():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    labels = np.arange(3)
    many = np.repeat(labels, [1, 50, 3])
    expected = [[0, 0.2, 0.1], [0.1, 0, 0.4], [0.3, 0.3, 0]]
    assert np.allclose(soft_confusion(probabilities, labels), expected)
    assert np.allclose(soft_confusion(probabilities[many], many), expected)


def test_agreement_counts_pairs(domain):
    arches, classical, *others = domain.clusters.values()
    proposed = {"c1": [*arches, classical[0]], "c2": classical[1:], "c3": sum(others, [])}
    told = "10 of the domain file's 12 pairs are among the proposal's 22"
    assert told in agreement(domain, proposed)
    reversed_names = [(f"c{n}", own) for n, own in enumerate(domain.clusters.values())][::-1]
    assert "index 1.00" in agreement(domain, dict(reversed_names))
