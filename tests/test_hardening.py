"""A run directory under bad luck: two commands at once, no room, kill -9, files missing."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import train
from calibrate import calibrate
from data_prep.prepare import prepare
from nicheclip.domain import Domain, DomainError, QualityFilter
from nicheclip.files import read_json
from nicheclip.run import HOLDER, LOCK, load_prepared, run_lock
from tests.conftest import ROOT
from tests.test_data_prep import photo_folders
from tests.test_resume import command, contents

KILLS = 6


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A prepared run directory that may be damaged."""
    unneeded = shutil.ignore_patterns("images", "checkpoints", "model")
    return shutil.copytree(prepared, tmp_path / "copy", ignore=unneeded)


def limited(arguments: list[str], limit: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """A command of the project under a limit that is set in its process before it starts."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error that a command ends with: one line, and no traceback."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.strip().splitlines()[-1]


def test_a_second_command_is_told_who_is_at_work_and_a_dead_one_is_not_in_the_way(
    copy, domain, tmp_path
):
    script = (
        "import pathlib, sys, time, nicheclip.run\n"
        "with nicheclip.run.run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print(flush=True)\n"
        "    time.sleep(99)\n"
    )
    held = [sys.executable, "-c", script, str(copy)]
    holder = subprocess.Popen(held, cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = contents(copy)
    told = rf"(?s)process {holder.pid} \(python -c .* is at work on '.*copy'; wait"
    for attempt in (lambda: prepare(domain, copy), lambda: train.train([str(copy)])):
        with pytest.raises(BlockingIOError, match=told):
            attempt()
    assert contents(copy) == before
    holder.kill()
    assert holder.wait() and str(holder.pid) in (copy / HOLDER).read_text(), "it is left behind"
    with run_lock(copy):
        assert str(os.getpid()) in (copy / HOLDER).read_text()


def test_where_nothing_may_be_written_the_folder_is_named(prepared, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)

    def obey_permissions() -> None:
        """Root ignores them, but for this: PR_CAPBSET_DROP, CAP_DAC_OVERRIDE."""
        ctypes.CDLL(None).prctl(24, 1)

    done = limited(command(prepared, folder / "run"), obey_permissions)
    assert "Permission denied" in last_line(done) and str(folder) in last_line(done)


def small_files(size: int) -> Callable[[], None]:
    """As on a full disk, a write ends with an OSError."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_without_room_data_prep_leaves_the_earlier_data(copy, prepared):
    before = contents(copy)
    shutil.rmtree(copy / "cache")
    done = limited(command(prepared, copy), small_files(50_000))
    assert "File too large" in last_line(done)
    assert contents(copy) == before
    load_prepared(copy)


@pytest.mark.slow
def test_without_room_training_leaves_the_earlier_model_and_is_not_taken_for_it(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("images"))
    before = (copy / "model" / "model.safetensors").read_bytes()
    done = limited(["train.py", str(copy)], small_files(400_000))
    assert "File too large" in last_line(done)
    assert (copy / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="run `accelerate launch train.py"):
        calibrate(copy)


@pytest.mark.slow
def test_killed_at_random_moments_data_prep_ends_with_the_same_result(prepared, tmp_path):
    """Six moments, one in each sixth of the time from the lock to the end."""
    whole, killed, quiet = tmp_path / "whole", 0, subprocess.DEVNULL

    def start(run: Path) -> subprocess.Popen:
        arguments = [sys.executable, *command(prepared, run)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=quiet, stderr=quiet)
        while not (run / LOCK).exists():
            assert process.poll() is None
            time.sleep(0.002)
        return process

    process, started = start(whole), time.monotonic()
    assert process.wait() == 0
    seconds, rng = time.monotonic() - started, random.Random(0)
    for kill in range(KILLS):
        run = tmp_path / str(kill)
        process = start(run)
        time.sleep(seconds * rng.uniform(kill, kill + 1) / KILLS)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (run / "data").exists():
            load_prepared(run)
        assert start(run).wait() == 0
        assert contents(run) == contents(whole), f"kill {kill}"
        assert not list(run.rglob(".*nicheclip-unfinished")), f"kill {kill}"
    assert killed >= KILLS - 2, "the others had ended before"


def damage(path: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(how, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "how", "remedy"),
    [
        ("data/report.json", "missing", "python -m data_prep"),
        ("data/report.json", "cut", "report.json' is damaged.*python -m data_prep"),
        ("data/report.json", "{}", "report.json.*python -m data_prep"),
        ("data/train", "missing", "python -m data_prep"),
        ("data/train/data-00000-of-00001.arrow", "missing", "python -m data_prep"),
        ("data/train/data-00000-of-00001.arrow", "cut", "python -m data_prep"),
        ("data/test/state.json", "{}", "python -m data_prep"),
        ("domain.yaml", "cut", "domain.yaml"),
        ("domain.yaml", "missing", "no domain file"),
    ],
)
def test_training_says_what_is_wrong_with_the_run_files(copy, name, how, remedy):
    damage(copy / name, how)
    with pytest.raises((ValueError, OSError), match=f"(?s){remedy}"):
        train.train([str(copy)])
    assert not (copy / "model").exists()


@pytest.mark.parametrize(
    ("name", "how", "remedy"),
    [
        ("training.json", "missing", "train.py"),
        ("training.json", "cut", "training.json' is damaged.*train.py"),
        ("trained_on.json", "missing", "train.py"),
        ("model", "missing", "model"),
        ("data/report.json", "missing", "data_prep"),
    ],
)
def test_calibration_says_what_is_wrong_with_the_run_files(run, tmp_path, name, how, remedy):
    unneeded = shutil.ignore_patterns("images", "cache", "checkpoints")
    copy = shutil.copytree(run, tmp_path / "copy", ignore=unneeded)
    damage(copy / name, how)
    with pytest.raises((ValueError, OSError), match=f"(?s){remedy}"):
        calibrate(copy)


def test_a_class_added_after_data_prep_is_told(copy, monkeypatch, tmp_path):
    raw = yaml.safe_load((copy / "domain.yaml").read_text(encoding="utf-8"))
    raw["classes"]["brutalism"] = ["a drawing of a brutalist building"]
    raw["clusters"]["late"] = ["brutalism"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "facades")
    monkeypatch.chdir(tmp_path)
    told = "prepared for 12 classes .* has 13 classes .* run `python -m data_prep` again"
    with pytest.raises(DomainError, match=told):
        train.train(["more.yaml"])


@pytest.mark.slow
def test_the_seed_decides_what_is_painted(domain, report_of_seed_0, tmp_path):
    again, other = (prepare(domain, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert again["fingerprint"] == report_of_seed_0["fingerprint"] != other["fingerprint"]


def test_the_seed_draws_who_is_visited_more_often(two_classes, tmp_path):
    """And not the splits of photos: they depend on the images alone; an added one moves none."""
    photos = photo_folders(tmp_path / "photos", per_class=14)
    reports, samples, splits = [], [], []
    for n, seed in enumerate((3, 3, 4)):
        reports.append(prepare(two_classes, tmp_path / str(n), images=photos, seed=seed))
        data = load_prepared(tmp_path / str(n))
        samples.append(data["train"]["repeats"][:])
        splits.append({name: data[name]["source_id"][:] for name in data})
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"] != reports[2]["fingerprint"]
    assert samples[0] == samples[1] != samples[2]
    assert splits[0] == splits[1] == splits[2]


@pytest.fixture
def report_of_seed_0(prepared: Path) -> dict:
    return read_json(prepared / "data" / "report.json", "")


@pytest.fixture
def two_classes(domain: Domain) -> Domain:
    names = domain.class_names[:2]
    changes = {
        "classes": {name: domain.classes[name] for name in names},
        "clusters": {"arches": names},
        "samples_per_class": 33,
        "quality_filter": QualityFilter(mode="none"),
    }
    return domain.model_copy(update=changes)


def test_a_run_says_what_it_was_made_with(run):
    for name in ("data/report.json", "training.json"):
        made = read_json(run / name, "")["provenance"]
        assert made["command"].startswith("python ")
        assert made["python"] == ".".join(map(str, sys.version_info[:3]))
        assert set(made["packages"]) >= {"torch", "transformers", "datasets", "pillow"}
        if (ROOT / ".git").exists():
            assert len(made["git_commit"].removesuffix("-dirty")) == 40
