"""Clusters of classes are proposed from what the base model confuses in train and validation, and in nothing else."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.clusters import agreement, main, propose, soft_confusion
from nicheclip.domain import Domain


def proposal(domain: Path, run: Path, *options: str) -> tuple[dict, str]:
    """The parsed YAML of stdout, and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        main([str(domain), "--run", str(run), *options])
    return yaml.safe_load(stdout.getvalue()), stderr.getvalue()


@pytest.fixture(scope="module")
def without_exam(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared run, with a calibration split that can't be read, and without test images."""
    run = tmp_path_factory.mktemp("clusters") / "run"
    shutil.copytree(prepared, run, ignore=shutil.ignore_patterns("images", "cache"))
    shutil.rmtree(run / "data" / "test")
    for path in (run / "data" / "calibration").iterdir():
        path.write_bytes(b"closed")
    return run


def test_the_proposal_can_be_pasted_and_is_compared(without_exam, domain):
    proposed, notes = proposal(without_exam, without_exam)
    members = [name for names in proposed["clusters"].values() for name in names]
    assert sorted(members) == sorted(domain.class_names)
    assert 1 < max(map(len, proposed["clusters"].values())) <= 4
    raw = yaml.safe_load((without_exam / "domain.yaml").read_text(encoding="utf-8"))
    assert Domain.model_validate(raw | proposed).clusters == proposed["clusters"]
    both, own = re.search(r"(\d+) of the domain file's (\d+) pairs", notes).groups()
    # the tiny sample still finds most of the painter's clusters
    assert int(both) > 6 and own == "12"

    page = (without_exam / "clusters.html").read_text(encoding="utf-8")
    assert "data:image/jpeg" in page and "taken for" in page
    shown = set(re.findall(r'alt="picture of ([^"]+)"', page))
    assert shown and all(source_id.startswith("train/") for source_id in shown)


def test_a_domain_without_clusters_and_smaller_ones(without_exam, tmp_path):
    raw = yaml.safe_load((without_exam / "domain.yaml").read_text(encoding="utf-8"))
    del raw["clusters"]
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    proposed, notes = proposal(bare, without_exam, "--largest", "2")
    assert "no clusters of its own" in notes and "Rand" not in notes
    assert max(map(len, proposed["clusters"].values())) == 2


def test_errors_say_what_to_do(without_exam, tmp_path):
    with pytest.raises(SystemExit, match="python -m data_prep DOMAIN --run .*empty"):
        main([str(without_exam), "--run", str(tmp_path / "empty")])
    raw = yaml.safe_load((without_exam / "domain.yaml").read_text(encoding="utf-8"))
    raw["classes"]["brutalist"] = ["a drawing of a brutalist building"]
    raw["clusters"]["modern"].append("brutalist")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    with pytest.raises(SystemExit, match="other classes"):
        main([str(other), "--run", str(without_exam)])


def noise(classes: int, seed: int) -> np.ndarray:
    """Symmetric confusions of 2 to 4 %."""
    affinity = np.random.default_rng(seed).uniform(0.02, 0.04, (classes, classes))
    affinity = (affinity + affinity.T) / 2
    np.fill_diagonal(affinity, 0)
    return affinity


def test_planted_blocks_are_found():
    blocks = [[0, 5, 9], [1, 2], [3, 7, 8, 11]]
    affinity = noise(12, seed=0)
    for block in blocks:
        affinity[np.ix_(block, block)] += 0.15
    np.fill_diagonal(affinity, 0)
    assert propose(affinity) == [*blocks, [4], [6], [10]]
    smaller = propose(affinity, largest=3)
    assert max(map(len, smaller)) == 3 and [0, 5, 9] in smaller
    assert sorted(sum(smaller, [])) == list(range(12))


@pytest.mark.parametrize(
    "affinity", [noise(12, seed=1), np.zeros((12, 12)), np.ones((2, 2)) - np.eye(2)]
)
def test_without_a_pair_that_stands_out_every_class_is_alone(affinity):
    assert propose(affinity) == [[index] for index in range(len(affinity))]


def test_rare_mistakes_join_nothing():
    affinity = np.zeros((5, 5))
    affinity[0, 1] = affinity[1, 0] = 0.005  # far above the mean, and yet next to nothing
    assert propose(affinity) == [[0], [1], [2], [3], [4]]


def test_confusion_does_not_depend_on_class_sizes():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]])
    labels = np.arange(3)
    many = np.repeat(labels, [1, 50, 3])
    expected = [[0, 0.2, 0.1], [0.1, 0, 0.4], [0.3, 0.3, 0]]
    assert np.allclose(soft_confusion(probabilities, labels), expected)
    assert np.allclose(soft_confusion(probabilities[many], many), expected)


def test_agreement_counts_pairs():
    found = agreement(["c1", "c1", "c1", "c2"], ["a", "a", "b", "b"])
    assert (found["both"], found["proposed"], found["own"]) == (1, 3, 2)
    assert agreement(["c1", "c1", "c2", "c2"], ["b", "b", "a", "a"])["rand"] == 1
