"""The processes that work together, and what each of them does first."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from datetime import timedelta
from itertools import dropwhile

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep what a step frees for the next one, instead of asking the system for it again.

    The system clears each page that it gives out. On a CPU that is a third of a training step in
    bfloat16, and a fifth of an encoding (docs/scaling.md). Only glibc is known to need it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


def processes() -> PartialState:
    """This process among those of `accelerate launch` or torchrun; they may wait long for each other.

    `accelerate launch --cpu --num_processes 2` starts a single process (all of them only under MPI)
    and says nothing. That process becomes a torchrun of as many as were asked for, which talk
    through gloo.
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
            "`accelerate launch` starts a single process on a CPU; give --num_processes on the "
            "command line, or use torchrun, with --nnodes for several machines"
        )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(asked.num_processes),
    ]
    command += ["--master_port", os.environ["MASTER_PORT"], *(["-m"] if asked.module else [])]
    os.execv(sys.executable, [*command, "--", asked.training_script, *asked.training_script_args])
