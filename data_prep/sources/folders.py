"""Class folders: FOLDER/<class>/<image>, or FOLDER/<split>/<class>/<image> where the split is already decided."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from nicheclip.data import SPLITS


def read_folders(folder: str | Path, class_names: list[str]) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """Lists the images of class folders with `datasets`' imagefolder; decodes none of them.

    Args:
        folder: holds one folder a class, or folders named train, validation, calibration, test that do.
        class_names: the classes of the domain; upper and lower case are alike.

    Returns:
        rows with columns path, source_id (the path inside the folder), class_name, split (None: to be decided),
        attribution; and the files that are no images, as source_id and reason.

    Raises:
        FileNotFoundError: if the folder or a class has no images.
        ValueError: if a folder is no class of the domain.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at '{folder}'; expected one folder a class, e.g. {folder}/gothic")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    names = {name.casefold(): name for name in class_names}
    split_of_folder = {path.name: path.name for path in folder.iterdir() if path.is_dir() and path.name in SPLITS}

    found = _imagefolder(folder)
    rows = {"path": [], "source_id": [], "class_name": [], "split": [], "attribution": []}
    for row in found:
        path = Path(row["image"]["path"])
        inside = path.relative_to(folder)
        split = split_of_folder.get(inside.parts[0])
        class_folder = inside.parts[0 if split is None else 1]
        class_name = names.get(class_folder.casefold())
        if class_name is None:
            close = difflib.get_close_matches(class_folder.casefold(), list(names), n=1)
            raise ValueError(
                f"'{class_folder}' in '{folder}' is no class of the domain"
                + (f"; did you mean '{names[close[0]]}'?" if close else "; add it to classes, or move it away")
            )
        rows["path"].append(str(path))
        rows["source_id"].append(inside.as_posix())
        rows["class_name"].append(class_name)
        rows["split"].append(split)
        rows["attribution"].append(row.get("attribution"))
    empty = sorted(set(class_names) - set(rows["class_name"]))
    if empty:
        raise FileNotFoundError(
            f"no images in '{folder}' for: {', '.join(empty)}; add them, or take the classes out of the domain file"
        )
    listed = set(rows["path"])
    others = [
        {"source_id": path.relative_to(folder).as_posix(), "reason": "not an image file"}
        for path in files
        if str(path) not in listed and path.name not in ("metadata.jsonl", "metadata.csv", "truth.json")
    ]
    return datasets.Dataset.from_dict(rows, features=_FEATURES), others


_FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("path", "source_id", "class_name", "split", "attribution")}
)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` for steps that are quick."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _imagefolder(folder: Path) -> datasets.Dataset:
    files = {"train": [glob.escape(str(folder)) + "/**"]}
    try:
        with quiet_datasets():
            found = datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, split="train")
    except datasets.exceptions.DataFilesNotFoundError as error:
        raise FileNotFoundError(f"'{folder}' holds no image files") from error
    return found.cast_column("image", datasets.Image(decode=False))
