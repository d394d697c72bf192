"""The same seed gives the same data, weights and scorecard; another seed gives others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import calibrate
import train
from data_prep.prepare import prepare
from nicheclip.domain import Domain
from tests.conftest import tiny_facades


def made(folder: Path, seed: int) -> tuple[str, str, dict]:
    """The fingerprint of the data, that of the weights, and the scorecard of a whole run."""
    run = folder / "run"
    report = prepare(Domain.load(tiny_facades(folder)), run, seed=seed)
    train.train([str(run), "--seed", str(seed)])
    calibrate.calibrate(run)
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    scorecard = json.loads((run / "scorecard.json").read_text())
    assert scorecard.pop("made_with")["packages"]["torch"]
    return report["fingerprint"], weights, scorecard


@pytest.mark.slow
def test_a_seed_decides_everything(tmp_path: Path):
    results = []
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        (tmp_path / name).mkdir()
        results.append(made(tmp_path / name, seed))
    first, again, other = results
    assert first == again
    assert first[0] != other[0] and first[1] != other[1] and first[2] != other[2]
