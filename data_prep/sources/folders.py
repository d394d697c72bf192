"""Class folders: FOLDER/<class>/<image>, or FOLDER/<split>/<class>/<image>.

A `metadata.jsonl` or `metadata.csv` beside the images, as `datasets`' imagefolder knows it, may
give each file_name an attribution, or its author, license and source_url; and a group.
"""

import csv
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets

from data_prep.sources.rows import SOURCE_FEATURES, Listing, check_classes, unusable
from nicheclip.domain import SPLITS

METADATA = frozenset({"metadata.jsonl", "metadata.csv"})
SIDECARS = METADATA | {"skipped.jsonl", "truth.json"}


def read_folders(folder: str | Path, class_names: list[str]) -> Listing:
    """Lists the files of class folders, in the order of their names; opens no image.

    Returns:
        rows as `data_prep.sources` describes them; and the files outside of a class.

    Raises:
        FileNotFoundError: if the folder or a class has no files.
        ValueError: if a folder is no class of the domain.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at '{folder}'; expected one folder a class in it")
    names = {name.casefold() for name in class_names}
    paths = list_files(folder)
    metadata = [path for path in paths if path.name in METADATA]
    known = {path: told for sidecar in metadata for path, told in _read_sidecar(sidecar)}
    rows: list[dict[str, Any]] = []
    aside = []
    for path in paths:
        if path.name in SIDECARS:
            continue
        inside = path.relative_to(folder)
        split, folders = split_and_folders(inside.parts, names)
        if not folders or not path.is_file():
            why = "not a file: a broken link, or a device" if folders else "not in a class folder"
            aside.append(unusable(inside.as_posix(), "no class", why))
            continue
        status = path.stat()
        rows.append(
            {
                "image": {"path": str(path), "bytes": None},
                "source_id": inside.as_posix(),
                "version": f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}",
                "class_name": folders[0],
                "split": split,
                **known.get(path, {"group": None, "attribution": None}),
            }
        )
    canonical = check_classes({row["class_name"] for row in rows}, class_names, f"'{folder}'")
    for row in rows:
        row["class_name"] = canonical[row["class_name"]]
    return datasets.Dataset.from_list(rows, features=SOURCE_FEATURES), aside


def split_and_folders(
    parts: tuple[str, ...], class_names: Collection[str]
) -> tuple[str | None, tuple[str, ...]]:
    """The split, unless a class is called so, and the folders that a path names, class first."""
    if parts[0] in SPLITS and parts[0] not in class_names:
        return parts[0], parts[1:-1]
    return None, parts[:-1]


def list_files(folder: Path) -> list[Path]:
    """What is in the folder and below, in order, through links as well; no hidden files."""
    files: list[Path] = []
    entered = set()
    for name, folders, inside in os.walk(folder, followlinks=True):
        if (resolved := Path(name).resolve()) in entered:
            folders.clear()
            continue
        entered.add(resolved)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        files += [Path(name) / file for file in inside if not file.startswith(".")]
    return sorted(files)


def _read_sidecar(sidecar: Path) -> Iterator[tuple[Path, dict[str, str | None]]]:
    """Group and attribution that a metadata file gives the images beside it."""
    with sidecar.open(encoding="utf-8", newline="") as file:
        if sidecar.suffix == ".csv":
            entries = list(csv.DictReader(file))
        else:
            entries = [json.loads(line) for line in file if line.strip()]
    for entry in entries:
        if "file_name" not in entry:
            raise ValueError(f"'{sidecar}': an entry has no file_name; expected one in each")
        parts = [entry.get(key) for key in ("author", "license", "source_url")]
        text = entry.get("attribution") or ", ".join(part for part in parts if part)
        group = entry.get("group")
        told = {
            "group": str(group) if group not in (None, "") else None,
            "attribution": text or None,
        }
        yield sidecar.parent / entry["file_name"], told
