"""The processes that work together."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from itertools import dropwhile

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser


def processes() -> PartialState:
    """This process among those of `accelerate launch` or torchrun; they may wait long for each other.

    `accelerate launch --cpu --num_processes 2` starts a single process (all of them only under MPI) and says nothing.
    That process becomes a torchrun of as many as were asked for, which talk through gloo.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        _become_torchrun(psutil.Process(os.getppid()).cmdline())
    return PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=timedelta(days=1))


def _become_torchrun(launcher: list[str]) -> None:
    """Replaces this process by what `accelerate launch`, whose command line is given, was asked for.

    Raises:
        ValueError: if that line does not say how many processes, or names several machines.
    """
    words = list(dropwhile(lambda word: not word.endswith("launch"), launcher))
    if not words:
        return  # the parent is another one, such as MPI's, which starts all by itself
    asked, _ = launch_command_parser().parse_known_args(words[1:])
    if asked.num_processes is None or (asked.num_machines or 1) > 1:
        raise ValueError(
            "`accelerate launch` starts a single process on a CPU; give --num_processes on the command line, or use "
            "torchrun, with --nnodes for several machines"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(asked.num_processes)]
    command += ["--master_port", os.environ["MASTER_PORT"], *(["-m"] if asked.module else [])]
    os.execv(sys.executable, [*command, "--", asked.training_script, *asked.training_script_args])
