"""The processes that work together, and what each of them does first."""

import ctypes
import gc
import os
import platform
from datetime import timedelta

import torch
from accelerate import PartialState

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep what a step frees for the next one.

    The system clears each page that it gives out. On a CPU that is a third of a training step in
    bfloat16, and a fifth of an encoding (docs/scaling.md). Only glibc is known to need it. And
    what is imported is no garbage: each run of a Trainer would look through it.
    """
    gc.freeze()
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


def check_launch() -> None:
    """Raises: ValueError if `accelerate launch` was asked for several processes on a CPU."""
    if _on_cpu() and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "on a CPU `accelerate launch` starts a single process, whatever --num_processes says; "
            "use `torchrun --nproc_per_node 2 -- train.py`"
        )


def processes() -> PartialState:
    """This process among those of `accelerate launch` or torchrun. They may wait long.

    Raises: as `check_launch`.
    """
    check_launch()
    return PartialState(cpu=_on_cpu() or not torch.cuda.is_available(), timeout=timedelta(days=1))


def _on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
