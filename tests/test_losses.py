"""The losses against known answers, and batches that are spread over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from nicheclip.training.losses import (
    LOSSES,
    class_prompts,
    gather,
    info_nce,
    multi_positive,
)
from tests.conftest import ROOT
from tests.two_processes import gradients, joint_batch, tiny_model


def random_logits(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 3


def test_losses_by_hand_where_both_images_are_of_one_class():
    # probabilities 3/4 and 1/4 in both directions
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) * np.log(3)
    labels = torch.tensor([0, 0])
    assert info_nce(logits, labels).item() == pytest.approx(-np.log(3 / 4))
    smoothed = -0.9 * np.log(3 / 4) - 0.1 * np.log(1 / 4)
    assert info_nce(logits, labels, 0.2).item() == pytest.approx(smoothed)
    both = -(np.log(3 / 4) + np.log(1 / 4)) / 2
    assert multi_positive(logits, labels).item() == pytest.approx(both)


def test_info_nce_and_multi_positive_agree_when_no_class_comes_twice_and_differ_when_one_does():
    logits = random_logits(6, 6)
    distinct, repeated = torch.arange(6), torch.tensor([0, 0, 1, 2, 3, 4])
    by_hand = (cross_entropy(logits, distinct) + cross_entropy(logits.T, distinct)) / 2
    assert info_nce(logits, repeated).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert multi_positive(logits, distinct).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert multi_positive(logits, repeated).item() != pytest.approx(by_hand.item(), rel=1e-3)
    smoothed = multi_positive(logits, distinct, 0.1).item()
    assert smoothed == pytest.approx(info_nce(logits, distinct, 0.1).item(), rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_info_nce_pushes_same_class_pairs_apart_and_multi_positive_pulls_them_together(
    label_smoothing,
):
    labels = torch.tensor([0, 0, 1, 1])
    others_alike = (labels[:, None] == labels[None, :]) & ~torch.eye(4, dtype=torch.bool)
    for loss, sign in ((info_nce, 1), (multi_positive, -1)):
        logits = torch.zeros(4, 4, requires_grad=True)
        loss(logits, labels, label_smoothing).backward()
        # descent moves against the gradient
        assert (logits.grad[others_alike].sign() == sign).all()


def test_multi_positive_rests_where_same_class_pairs_are_alike():
    labels = torch.tensor([0, 0, 1, 1])
    same = labels[:, None] == labels[None, :]
    for loss, rests in ((multi_positive, True), (info_nce, False)):
        logits = (10.0 * same).requires_grad_()  # already right: same-class pairs alike, others far
        loss(logits, labels).backward()
        assert (logits.grad[same].abs() < 1e-4).all().item() is rests


def test_class_prompts_is_the_cross_entropy_of_the_zero_shot_classifier():
    logits, labels = random_logits(7, 4), torch.tensor([0, 1, 2, 3, 3, 3, 0])
    for smoothing in (0.0, 0.1):
        by_torch = cross_entropy(logits, labels, label_smoothing=smoothing)
        assert class_prompts(logits, labels, smoothing).item() == pytest.approx(by_torch.item())


def test_a_single_process_gathers_nothing():
    embeds = torch.ones(2, 3, requires_grad=True)
    assert gather(embeds) is embeds


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("two") / "gradients.safetensors"
    script = Path(__file__).with_name("two_processes.py")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 {script} {out}".split()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, piped = [sys.executable, *launch], subprocess.PIPE
    with subprocess.Popen(command, env=env, stderr=piped, text=True) as launched:
        try:
            _, errors = launched.communicate(timeout=120)
        finally:
            # a launcher that is terminated takes its processes along, a killed one leaves them
            launched.terminate()
    assert launched.returncode == 0, errors[-3000:]
    return load_file(out)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(loss, of_two):
    model = tiny_model()
    of_one = gradients(loss, model, model, joint_batch())
    assert of_one["logit_scale"].abs() > 1e-3
    for name, expected in of_one.items():
        torch.testing.assert_close(of_two[f"{loss}/{name}"], expected, rtol=1e-4, atol=1e-6)
