"""Files that are written beside their place and then renamed into it; a reader never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets


def write_json(path: str | Path, content: Any) -> None:
    """Writes under a temporary name and renames it into place, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def read_json(path: str | Path, remedy: str, keys: Sequence[str] = ()) -> Any:
    """Reads a file that an earlier stage wrote, with at least these `keys`.

    Raises:
        FileNotFoundError: if it is absent; `remedy` names the command that writes it.
        ValueError: if it is damaged, or a key is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged, not valid JSON ({error}); {remedy}") from error
    if missing := [key for key in keys if key not in content]:
        raise ValueError(
            f"'{path}' has no '{missing[0]}', so it is another version's or another program's; "
            f"{remedy}"
        )
    return content


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` once all is written."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    former = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)  # deleting takes longer than renaming, and may be interrupted
    unfinished.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`; the steps that take long have their own."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
