"""Files and folders that take their place once they are whole: a reader never sees half of one."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import yaml


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A place to write to, which becomes the file `path` once all is written; a link stays one."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path, "unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` once all is written; a link stays one.

    Its files get the usual permissions: safetensors makes them readable by their owner only.
    """
    folder = Path(folder).resolve()
    unfinished, former = _beside(folder, "unfinished"), _beside(folder, "former")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    for file in unfinished.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)  # deleting takes longer than renaming, and may be interrupted
    unfinished.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _beside(path: Path, state: str) -> Path:
    """A hidden name that no user gives a file: what a killed command leaves may be removed."""
    return path.with_name(f".{path.name}.nicheclip-{state}")


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON in one piece."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with replaced_file(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


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
        raise ValueError(f"'{path}' has no '{missing[0]}', as of another version; {remedy}")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that a user wrote.

    Raises:
        ValueError: if it is not valid, has a key twice, or holds something else than keys.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    # PyYAML lets through what its constructors raise, as for a 13th month or a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected `key: value` lines")
    return content


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key}'; remove or rename one",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """`datasets` shows no progress bars, and leaves no intermediate files in the user's data."""
    shown, cached = datasets.is_progress_bar_enabled(), datasets.is_caching_enabled()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if cached:
            datasets.enable_caching()
