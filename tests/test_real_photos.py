"""The whole way on real photographs, with a base that has seen buildings. Neither is kept in the project."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from nicheclip.domain import Domain
from tests.conftest import ROOT, shared


@pytest.mark.slow
def test_five_styles_from_photos_to_a_published_model(tmp_path):
    photos, base = shared("data/arch5_colour"), shared("models/photo-clip-toy")
    architecture = Domain.load(ROOT / "domains" / "architecture")
    names = sorted(path.name for path in photos.iterdir() if path.is_dir())
    raw = architecture.model_dump(mode="json") | {
        "name": "five-styles",
        "classes": {name: [f"a photo of {name.replace('_', ' ')} architecture"] for name in names},
        "clusters": {"old": ["ancient_egyptian", "byzantine"], "later": ["baroque", "classical", "gothic"]},
        "samples_per_class": 48,
    }
    for stage in raw["stages"]:
        stage |= {"epochs": 1, "learning_rate": 1e-4}
    (tmp_path / "five.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    run = tmp_path / "run"
    places = ["--images", str(photos), "--base", str(base), "--run", str(run)]
    for command in (
        ["-m", "data_prep", str(tmp_path / "five.yaml"), *places],
        ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "train.py", str(run)],
        ["calibrate.py", str(run)],
        ["-m", "model_card", str(run)],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    scorecard = json.loads((run / "scorecard.json").read_text())
    report = json.loads((run / "data" / "report.json").read_text())
    assert report["counts"]["read"] == 280
    assert scorecard["metrics"]["accuracy"]["n"] == report["counts"]["kept"]["test"]
    assert (run / "hub" / "README.md").is_file()
