"""Training as it is launched: killed at any moment, and in several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from nicheclip.domain import Domain
from nicheclip.evaluation.probe import STRONG_PROBE_FILE
from nicheclip.run import load_prepared
from nicheclip.training.sampler import ClusterBatchSampler
from tests.conftest import ROOT
from tests.test_training import TWO_STAGES

KILLS = 6
EVERY_STEP = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3"]


def fresh(prepared: Path, run: Path, **changes) -> Path:
    shutil.copytree(prepared / "data", run / "data")
    Domain.load(prepared).model_copy(update=changes).save(run / "domain.yaml")
    return run


def checkpoints_begun(run: Path) -> int:
    """Of all stages and variants; those that are gone again are counted too."""
    stages, last = run / "checkpoints", dict[Path, int]()
    # Not inside of a checkpoint: it may vanish meanwhile.
    for path in [*stages.glob("*/checkpoint-*"), *stages.glob("*/variant-*/checkpoint-*")]:
        step = int(path.name.split("-")[1])
        last[path.parent] = max(step, last.get(path.parent, 0))
    return sum(last.values())


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_weights(prepared, tmp_path):
    """In equal parts of all steps of all stages: in a step, or while a checkpoint is written."""
    command = [sys.executable, "train.py"]
    whole = fresh(prepared, tmp_path / "whole")
    subprocess.run([*command, str(whole), *EVERY_STEP], cwd=ROOT, check=True, capture_output=True)
    expected, steps = (whole / "model" / "model.safetensors").read_bytes(), checkpoints_begun(whole)
    rng = np.random.default_rng(0)
    for kill in range(KILLS):
        run = fresh(prepared, tmp_path / f"killed-{kill}")
        begin, end = (steps - 1) * kill // KILLS, (steps - 1) * (kill + 1) // KILLS
        step, quiet = rng.integers(begin, end), subprocess.DEVNULL
        arguments = [*command, str(run), *EVERY_STEP]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=quiet, stderr=quiet)
        while checkpoints_begun(run) < step or not (run / "checkpoints" / "begun.json").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        arguments += ["--resume_from_checkpoint", "True"]
        subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
        found = (run / "model" / "model.safetensors").read_bytes()
        assert found == expected, f"killed after step {step}"
        shutil.rmtree(run)


@pytest.mark.slow
def test_two_processes_see_each_batch_once_and_learn_as_one(prepared, tmp_path):
    """Two processes: the same global batches, loss curve and files as one process."""
    runs = [tmp_path / "alone", tmp_path / "together"]
    alone, together = (fresh(prepared, run, stages=TWO_STAGES) for run in runs)
    script = tmp_path / "watched.py"  # train.py, which writes down who visits what
    script.write_text(
        "import json, os, sys, train\n"
        "from nicheclip.training.data import TrainingSamples\n"
        "seen, get = [], TrainingSamples.__getitem__\n"
        "def watched(self, index):\n"
        "    seen.append([self.epoch, int(index)])\n"
        "    return get(self, index)\n"
        "TrainingSamples.__getitem__ = watched\n"
        "train.main()\n"
        f"json.dump(seen, open(os.path.join({str(tmp_path)!r}, "
        "'rank' + os.environ.get('RANK', '') + '.json'), 'w'))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "--"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (
        [str(script), str(alone)],
        ["-m", *launch, str(script), str(together), "--per_device_train_batch_size", "12"],
    ):
        subprocess.run(
            [sys.executable, *command],
            cwd=ROOT, check=True, capture_output=True, timeout=240, env=environment,
        )  # fmt: skip

    one, first, second = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in ("", "0", "1")
    )
    domain, labels = Domain.load(prepared), load_prepared(prepared)["train"]
    visited = np.repeat(labels["label"][:], labels["repeats"][:])
    sampler = ClusterBatchSampler(visited, domain.class_clusters, 24, seed=42)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        promised = np.array(list(sampler.global_batches()))
        of_ranks = [
            np.array([i for e, i in seen if e == epoch]).reshape(-1, 12) for seen in (first, second)
        ]
        assert (np.hstack(of_ranks) == promised).all()
        assert [i for e, i in one if e == epoch] == promised.ravel().tolist()
        assert set(promised.ravel()) == set(range(len(visited)))

    records = [json.loads((run / "training.json").read_text()) for run in (alone, together)]
    assert [record["processes"] for record in records] == [1, 2]
    curves = [[row["loss"] for row in record["epochs"]] for record in records]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    states = [load_file(run / "model" / "model.safetensors") for run in (alone, together)]
    assert max((states[0][name] - states[1][name]).abs().max().item() for name in states[0]) < 1e-3
    files = [{path.name for path in run.iterdir()} for run in (alone, together)]
    written = {"cache", "checkpoints", "model", "training.json", "trained_on.json"}
    given = {"data", "domain.yaml", ".lock", ".holder"}
    assert files[0] == files[1] == {*given, *written, STRONG_PROBE_FILE}


@pytest.mark.slow
def test_two_processes_choose_and_learn_the_default_recipe_as_one(prepared, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", "29543", "--"]
    found = []
    for name, command in (("alone", [sys.executable]), ("together", launch)):
        run = fresh(prepared, tmp_path / name)
        arguments = [*command, "train.py", str(run)]
        subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, timeout=400)
        record = json.loads((run / "training.json").read_text())
        found.append((record["stages"], load_file(run / "model" / "model.safetensors")))
    (alone, one), (together, other) = found
    assert [stage["chosen"] for stage in alone] == [stage["chosen"] for stage in together]
    losses = [
        [row["eval_nll"] for stage in stages for row in stage["tried"]] for stages, _ in found
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 2e-3


def test_processes_that_accelerate_would_not_start_are_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "torchrun --nproc_per_node 2 -- train.py" in done.stderr
