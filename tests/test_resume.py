"""A killed data_prep goes on where it was, and several processes make the same dataset as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT


def command(prepared: Path, run: Path) -> list[str]:
    return ["-m", "data_prep", str(prepared), "--images", str(prepared / "images"), "--run", str(run)]


def contents(run: Path) -> dict[str, bytes]:
    """Every byte that training and a reader see; state.json holds random names."""
    files = [*(run / "data").rglob("*.arrow"), run / "data" / "report.json", run / "data" / "report.html"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in [*files, run / "review.csv"]}


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run([sys.executable, *command(prepared, run)], cwd=ROOT, check=True, capture_output=True)
    return run


@pytest.mark.parametrize("step", ["verified", "encoded"])
def test_a_killed_run_ends_with_the_same_bytes(prepared, uninterrupted, tmp_path, step):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command(prepared, run)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def finished_shards() -> dict[str, int]:
        cache = run / "cache" / step
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*") if not path.name.endswith(".tmp")}

    while not finished_shards():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "data").exists()
    done = finished_shards()
    subprocess.run([sys.executable, *command(prepared, run)], cwd=ROOT, check=True, capture_output=True)
    assert contents(run) == contents(uninterrupted)
    assert {name: finished_shards()[name] for name in done} == done, "finished shards are not made again"


def test_two_processes_make_the_same_dataset(prepared, uninterrupted, tmp_path):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    subprocess.run(
        [sys.executable, *launch, *command(prepared, run)], cwd=ROOT, check=True, capture_output=True, timeout=240
    )
    alone, together = (json.loads((folder / "data" / "report.json").read_text()) for folder in (uninterrupted, run))
    assert together["fingerprint"] == alone["fingerprint"]
    assert together["counts"] == alone["counts"]
