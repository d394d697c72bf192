"""What the tiny run comes to, down to the digests of its weights; a seed decides all of it.

`python -m tests.test_reproducible RUN` records golden.json anew from such a run; the commit that
does so says which value has moved, and why.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

import calibrate
import train
from data_prep.prepare import prepare
from nicheclip.clip import fast_dtype
from nicheclip.domain import Domain
from tests.conftest import tiny_facades

GOLDEN = Path(__file__).parent / "golden.json"


def machine() -> str:
    """What the last bits of a sum depend on."""
    cpu, wanted = Path("/proc/cpuinfo"), ("cpu family", "model", "stepping")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.is_file() else []
    told = [line.partition(":")[2].strip() for line in lines if line.startswith(wanted)]
    processor = ", ".join(told) or platform.processor()
    return f"{processor}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def encoding() -> str:
    """The precision of data_prep's image_embeds: in another one it suspects other labels."""
    return str(fast_dtype(torch.device("cpu")))


def weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{name} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def results(run: Path) -> dict[str, Any]:
    """Fingerprint, digest of the weights, stages, scorecard, settings, predictions."""
    training = json.loads((run / "training.json").read_text())
    scorecard = json.loads((run / "scorecard.json").read_text())
    scorecard.pop("provenance")
    return {
        "data_fingerprint": json.loads((run / "data" / "report.json").read_text())["fingerprint"],
        "weights": weights_digest(run / "model"),
        "epochs": training["epochs"],
        "stages": training["stages"],
        "scorecard": scorecard,
        "nicheclip.json": json.loads((run / "hub" / "nicheclip.json").read_text()),
        "predictions": pq.read_table(run / "predictions.parquet").to_pydict(),
    }


def differences(expected: Any, found: Any, tolerance: float, where: str = "") -> list[str]:
    """The places where two JSON trees differ; numbers may by as much as `tolerance`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = list(dict.fromkeys([*expected, *found]))
        return [
            d
            for key in keys
            for d in differences(expected.get(key), found.get(key), tolerance, f"{where}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            d
            for i, pair in enumerate(zip(expected, found, strict=True))
            for d in differences(*pair, tolerance, f"{where}/{i}")
        ]
    if isinstance(expected, float) and isinstance(found, float):
        return (
            []
            if math.isclose(expected, found, rel_tol=tolerance, abs_tol=tolerance)
            else [f"{where}: {expected} -> {found}"]
        )
    return [] if expected == found else [f"{where}: {expected} -> {found}"]


def test_the_tiny_run_gives_what_it_always_gave(run):
    golden, found = json.loads(GOLDEN.read_text()), results(run)
    if golden.pop("encoding") != encoding():
        pytest.skip("golden.json was recorded where data_prep encodes in another precision")
    tolerance, left_out = 1e-5, "nothing"
    if golden.pop("machine") != machine():
        # Other last bits: weights drift in training, and some pictures change sides.
        tolerance, left_out = 0.15, r"/(weights|predictions/prediction_set/|.*/(n|more)):?"
    found_different = differences(golden, found, tolerance)
    assert [told for told in found_different if not re.match(left_out, told)] == []


def made(folder: Path, seed: int) -> tuple[str, str, dict]:
    """The fingerprint of the data, that of the weights, and the scorecard of a whole run."""
    run = folder / "run"
    report = prepare(Domain.load(tiny_facades(folder)), run, seed=seed)
    train.train([str(run), "--seed", str(seed)])
    calibrate.calibrate(run)
    scorecard = json.loads((run / "scorecard.json").read_text())
    assert scorecard.pop("provenance")["packages"]["torch"]
    return report["fingerprint"], weights_digest(run / "model"), scorecard


@pytest.mark.slow
def test_a_seed_decides_everything(tmp_path: Path):
    made_by = []
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        (tmp_path / name).mkdir()
        made_by.append(made(tmp_path / name, seed))
    first, again, other = made_by
    assert first == again
    assert first[0] != other[0] and first[1] != other[1] and first[2] != other[2]


if __name__ == "__main__":
    recorded = {"machine": machine(), "encoding": encoding(), **results(Path(sys.argv[1]))}
    GOLDEN.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
