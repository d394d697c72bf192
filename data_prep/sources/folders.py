"""Class folders: FOLDER/<class>/<image>, or FOLDER/<split>/<class>/<image>.

A `metadata.jsonl` or `metadata.csv` beside the images, as `datasets`' imagefolder knows it, may
give each file_name an attribution, or its author, license and source_url.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from data_prep.sources.rows import SOURCE_FEATURES, check_classes, no_class
from nicheclip.run import SPLITS

SIDECARS = frozenset({"metadata.jsonl", "metadata.csv", "skipped.jsonl", "truth.json"})


def read_folders(
    folder: str | Path, class_names: list[str]
) -> tuple[datasets.Dataset, list[dict[str, Any]]]:
    """Lists the files of class folders, in the order of their names; opens none of them.

    Args:
        folder: holds one folder a class, or folders named train, validation, calibration, test that
            do.
        class_names: the classes of the domain; upper and lower case, "_", "-" and a space are
            alike.

    Returns:
        rows as `data_prep.sources` describes them; and the files outside of a class, as source_id
        and reason.

    Raises:
        FileNotFoundError: if the folder or a class has no files.
        ValueError: if a folder is no class of the domain.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no image folder at '{folder}'; expected one folder a class, e.g. {folder}/gothic"
        )
    names = {name.casefold() for name in class_names}
    attributions = dict(_attributions(folder))
    rows: list[dict[str, Any]] = []
    outside = []
    for path in sorted(list_files(folder)):
        inside = path.relative_to(folder)
        if path.name in SIDECARS:
            continue
        if not path.is_file():
            told = "not a file: a broken link, or a device"
            outside.append(no_class(inside.as_posix(), told))
            continue
        split = split_of(inside.parts, names)
        within = inside.parts[1 if split else 0 : -1]
        if not within:
            outside.append(no_class(inside.as_posix(), "not in a class folder"))
            continue
        status = path.stat()
        rows.append(
            {
                "image": {"path": str(path), "bytes": None},
                "source_id": inside.as_posix(),
                "version": f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}",
                "class_name": within[0],
                "split": split,
                "attribution": attributions.get(path),
            }
        )
    canonical = check_classes({row["class_name"] for row in rows}, class_names, f"'{folder}'")
    for row in rows:
        row["class_name"] = canonical[row["class_name"]]
    return datasets.Dataset.from_list(rows, features=SOURCE_FEATURES), outside


def split_of(parts: Sequence[str], class_names: Collection[str]) -> str | None:
    """The split that the outermost folder of a path gives, unless a class is called so."""
    return parts[0] if parts[0] in SPLITS and parts[0] not in class_names else None


def list_files(folder: Path) -> Iterator[Path]:
    """What is in the folder and below, through links to other folders as well.

    Hidden files are no images.
    """
    entered = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        resolved = Path(name).resolve()
        folders[:] = (
            [] if resolved in entered else [inner for inner in folders if not inner.startswith(".")]
        )
        if resolved not in entered:
            yield from (Path(name) / file for file in files if not file.startswith("."))
        entered.add(resolved)


def _attributions(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("metadata.*"):
        if path.name == "metadata.jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            entries = [json.loads(line) for line in lines if line.strip()]
        elif path.name == "metadata.csv":
            with path.open(encoding="utf-8", newline="") as file:
                entries = list(csv.DictReader(file))
        else:
            continue
        for entry in entries:
            parts = [entry.get(key) for key in ("author", "license", "source_url")]
            text = entry.get("attribution") or ", ".join(part for part in parts if part)
            if "file_name" not in entry:
                raise ValueError(f"'{path}': an entry has no file_name; expected one in each")
            if text:
                yield path.parent / entry["file_name"], text
