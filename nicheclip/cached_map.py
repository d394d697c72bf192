"""Long work in shards, each written once and in one piece: a killed run goes on where it was.

Under `accelerate launch` the shards are dealt out to the processes.
"""

import hashlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm

from nicheclip.files import quiet_datasets, replaced_folder
from nicheclip.processes import processes

SHARD_ROWS = 128
Step = Callable[[datasets.Dataset], datasets.Dataset]


def map_shards(
    rows: datasets.Dataset,
    step: Step,
    identity: Sequence[str],
    settings: str,
    cache: Path,
    description: str,
    parallel: bool = False,
    bytes_per_row: int = 0,
) -> datasets.Dataset:
    """`step` of all rows, a shard of `SHARD_ROWS` at a time; finished shards are read from `cache`.

    Args:
        step: gives a dataset of as many rows; with `parallel` it is pickled.
        identity: (N,) what a row's result depends on, beside `settings`.
        parallel: whether the shards of one process are spread over the CPU cores.
        bytes_per_row: of a result, if the disk could be too small for them.

    Returns:
        the results in the order of the rows, memory-mapped; the same in every process.

    Raises:
        OSError: if the disk has no room for what is missing, before anything is written.
    """
    state = processes()
    shards = []
    for start in range(0, len(rows), SHARD_ROWS):
        span = range(start, min(start + SHARD_ROWS, len(rows)))
        order = "\n".join([settings, *(identity[index] for index in span)])
        key = hashlib.sha256(order.encode()).hexdigest()
        shards.append((span, cache / key[:24]))
    todo = [(span, folder) for span, folder in shards if not folder.is_dir()]
    missing = sum(len(span) for span, _ in todo)
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = missing * bytes_per_row, shutil.disk_usage(cache).free
    if needed > free:
        raise OSError(
            f"{description} needs {needed / 1e9:.1f} GB in '{cache}', where {free / 1e9:.1f} GB "
            "are free; make room"
        )
    state.wait_for_everyone()  # so that all have looked before one of them writes
    mine = todo[state.process_index :: state.num_processes]
    workers = min((os.cpu_count() or 1) // state.num_processes, len(mine)) if parallel else 1
    hidden = not state.is_local_main_process
    with tqdm(total=len(rows), desc=description, unit="img", leave=False, disable=hidden) as bar:
        bar.update(len(rows) - missing)
        for done in _finished(rows, step, mine, workers):
            bar.update(state.num_processes * done)
    state.wait_for_everyone()
    if state.is_main_process:
        wanted = {folder.name for _, folder in shards}
        for folder in cache.iterdir():
            if folder.is_dir() and folder.name not in wanted:
                shutil.rmtree(folder)
    return datasets.concatenate_datasets([datasets.load_from_disk(folder) for _, folder in shards])


def stored_digests(rows: datasets.Dataset) -> list[str]:
    """sha256 of each image as it is stored, (N,)."""
    rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    return [hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows]


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _finished(
    rows: datasets.Dataset, step: Step, shards: list[tuple[range, Path]], workers: int
) -> Iterator[int]:
    """Works off the shards; the number of rows of each one that is done."""
    if workers <= 1:
        for span, folder in shards:
            yield _finish(rows.select(span), step, folder)
        return
    pool = ProcessPoolExecutor(workers, initializer=_end_with_parent)
    try:
        parts = ((_portable(rows.select(span)), step, folder) for span, folder in shards)
        for future in as_completed([pool.submit(_finish, *part) for part in parts]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _portable(rows: datasets.Dataset) -> datasets.Dataset:
    """A shard of a table in memory would carry the whole table along when it is pickled."""
    if rows.cache_files:
        return rows
    return datasets.Dataset.from_list(rows.to_list(), features=rows.features)


def _end_with_parent() -> None:
    """Makes a worker end when its parent is killed; else it would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]  # a worker has a parent
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(rows: datasets.Dataset, step: Step, folder: Path) -> int:
    with quiet_datasets(), replaced_folder(folder) as unfinished:
        step(rows).save_to_disk(unfinished)
    return len(rows)
