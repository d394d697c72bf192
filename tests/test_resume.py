"""A killed data_prep goes on where it was, and several processes make the same dataset as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image

from data_prep.prepare import prepare
from nicheclip.run import LOCK, load_prepared
from tests.conftest import ROOT


def command(prepared: Path, run: Path) -> list[str]:
    options = ["--images", str(prepared / "images"), "--run", str(run)]
    return ["-m", "data_prep", str(prepared), *options]


def prepare_alone(prepared: Path, run: Path) -> None:
    arguments = [sys.executable, *command(prepared, run)]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)


def contents(run: Path) -> dict[str, Any]:
    """Every byte that training and a reader see; state.json holds random names."""
    files = [*(run / "data").rglob("*.arrow"), run / "data" / "report.html", run / "review.csv"]
    report = json.loads((run / "data" / "report.json").read_text())
    del report["provenance"]  # its command differs
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in files}
    return found | {"report": report}


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    prepare_alone(prepared, run)
    return run


@pytest.mark.parametrize("step", [pytest.param("verified", marks=pytest.mark.slow), "encoded"])
def test_a_killed_run_ends_with_the_same_bytes(prepared, uninterrupted, tmp_path, step):
    run, quiet = tmp_path / "run", subprocess.DEVNULL
    arguments = [sys.executable, *command(prepared, run)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=quiet, stderr=quiet)

    def finished_shards() -> dict[str, int]:
        found = (run / "cache" / step).glob("[!.]*")
        return {path.name: path.stat().st_mtime_ns for path in found}

    while not finished_shards():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "data").exists()
    done = finished_shards()
    prepare_alone(prepared, run)
    assert contents(run) == contents(uninterrupted)
    # finished shards are not made again
    assert {name: finished_shards()[name] for name in done} == done


@pytest.mark.slow
def test_two_processes_make_the_same_dataset(prepared, uninterrupted, tmp_path):
    run, script = tmp_path / "run", tmp_path / "launched.py"
    script.write_text(
        "from data_prep.__main__ import main\n"
        "from nicheclip.processes import processes\n"
        "if __name__ == '__main__':\n"
        "    assert processes().num_processes == 2\n"
        "    main()\n"
    )
    launch = "-m torch.distributed.run --nproc_per_node 2 --master_port 29541 --".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *launch, str(script), *command(prepared, run)[2:]],
        cwd=ROOT, check=True, capture_output=True, timeout=240, env=environment,
    )  # fmt: skip
    alone, together = (contents(folder)["report"] for folder in (uninterrupted, run))
    assert together["fingerprint"] == alone["fingerprint"]
    assert together["counts"] == alone["counts"]


def test_a_run_directory_takes_one_data_prep_at_a_time(prepared, tmp_path):
    (tmp_path / "run").mkdir()
    arguments = [sys.executable, *command(prepared, tmp_path / "run")]
    with FileLock(tmp_path / "run" / LOCK):
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "another command is at work on" in done.stderr


def test_the_cache_knows_what_its_contents_depend_on(prepared, domain, tmp_path):
    """Smaller stored images, and a replaced file under an old name, give what a fresh run gives."""
    images = tmp_path / "images"
    shutil.copytree(prepared / "images", images, ignore=shutil.ignore_patterns("truth.json"))
    first = prepare(domain, tmp_path / "run", images=images)
    smaller = domain.model_copy(update={"stored_short_side": 48})
    victim = sorted((images / "train").rglob("*.jpg"))[7]
    Image.open(sorted((images / "train").rglob("*.jpg"))[9]).rotate(20).save(victim)
    again = prepare(smaller, tmp_path / "run", images=images)
    fresh = prepare(smaller, tmp_path / "fresh", images=images)
    assert again == fresh != first
    one, other = (load_prepared(tmp_path / run)["train"] for run in ("run", "fresh"))
    assert one["zero_shot_score"][:] == other["zero_shot_score"][:]
