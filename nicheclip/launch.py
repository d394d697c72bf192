"""The processes that work together."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser


def processes() -> PartialState:
    """This process among those of `accelerate launch` or torchrun; they may wait long for each other.

    `accelerate launch --cpu --num_processes 2` starts a single process (all of them only under MPI) and says nothing.
    That process becomes a torchrun of as many as were asked for, which talk through gloo.
    """
    alone = "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ
    if alone and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        _become_torchrun(psutil.Process(os.getppid()).cmdline())
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def _become_torchrun(launcher: list[str]) -> None:
    """Replaces this process by what `accelerate launch`, whose command line is given, was asked for."""
    words = iter(launcher)
    while not next(words).endswith("launch"):  # accelerate launch, accelerate-launch, -m accelerate.commands.launch
        pass
    asked, _ = launch_command_parser().parse_known_args(list(words))
    if (asked.num_processes or 1) > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(asked.num_processes)]
        command += ["--master_port", os.environ["MASTER_PORT"], *(["-m", "--"] if asked.module else [])]
        os.execv(sys.executable, [*command, asked.training_script, *asked.training_script_args])
