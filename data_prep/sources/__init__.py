"""Where images come from. Each source gives the same: rows, and what it could not take.

Rows are a `datasets.Dataset` of image (not decoded), source_id (its name inside the source),
version (changes when the content does), class_name, split (None: to be decided) and attribution
(None: not known). What it could not take are entries of report.json, see `rows.unusable`.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_prep.sources.commons import download_commons
from data_prep.sources.folders import read_folders
from data_prep.sources.tables import is_table, read_table
from data_prep.verify import verify_image
from nicheclip.domain import Domain, RetentionSource, Source

logger = logging.getLogger(__name__)


def fetch_images(
    domain: Domain, run: Path, images: str | Path | None, seed: int, contact: str | None
) -> str | Path:
    """Draws or downloads what the domain's source asks for; where the images lie then.

    Args:
        images: class folders or a dataset that take the place of the domain's own source.
        contact: how the operators of Wikimedia can reach who runs this.

    Raises:
        ValueError: if neither the domain nor `images` names any.
    """
    source = domain.source
    if images is not None:
        return images
    if source.kind == "commons":
        return download_commons(run / "images", domain.class_names, contact, **source.options)
    if source.kind == "module":
        return _draw(source, run / "images", domain, seed)
    if source.path is None:
        raise ValueError(
            f"domain '{domain.name}' names no images; pass --images FOLDER, one folder a class "
            "inside, or a dataset"
        )
    return source.path


def _draw(source: Source | RetentionSource, folder: Path, domain: Domain, seed: int) -> Path:
    """What `write_images(folder, domain, seed, **options)` of the source's module has written."""
    try:
        module = importlib.import_module(str(source.path))
    except ImportError as error:
        raise ValueError(
            f"source.path '{source.path}' can't be imported ({error}); give a module that Python "
            "finds from the folder where the command runs, with a function write_images"
        ) from error
    return module.write_images(folder, domain, seed, **source.options)


def read_source(
    domain: Domain, location: str | Path, own: bool
) -> tuple[datasets.Dataset, list[dict[str, Any]]]:
    """Lists what lies at `location` and decodes none of it; the rows, and what has no class.

    Args:
        own: whether this is the domain's own source, not one named on the command line.
    """
    table = domain.source.kind == "dataset"
    options = domain.source.options if table else {}
    if table if own else is_table(location):
        return read_table(location, domain.class_names, **options)
    return read_folders(location, domain.class_names)


def retention_rows(domain: Domain, drawn: Path, seed: int = 0) -> datasets.Dataset:
    """The images of the retention task, at most `retention.images_per_class` a class.

    Where the images come in splits, those of the test split are taken. What does not decode is left
    out, with a warning.

    Args:
        drawn: where a module draws, if that is the source.
        seed: of the draw; the same for models that are compared.

    Returns:
        image (shrunk as the domain's own, decoded on access) and label (the index of the class in
        `retention.classes`).

    Raises:
        ValueError: if the domain has no such task, its labels don't fit, or no image of a class
            can be read.
        FileNotFoundError: if there are no images.
    """
    task = domain.retention
    if task is None:
        raise ValueError(f"domain '{domain.name}' has no retention task; add `retention` to it")
    names, source = list(task.classes), task.source
    if source.kind == "dataset":
        rows, _ = read_table(source.path, names, **source.options)
    else:
        folder = source.path if source.kind == "folder" else _draw(source, drawn, domain, seed)
        rows, _ = read_folders(folder, names)
    of_class, splits = np.array(rows["class_name"]), np.array(rows["split"])
    taken = splits == "test" if "test" in splits else np.ones(len(rows), bool)
    rng = np.random.default_rng(seed)
    entries = []
    for label, name in enumerate(names):
        drawn_rows = rng.permutation(np.flatnonzero(taken & (of_class == name)))
        chosen = rows.select(np.sort(drawn_rows[: task.images_per_class]))
        verified = [verify_image(row["image"], domain.stored_short_side) for row in chosen]
        images = [entry["image"] for entry in verified if entry["error_kind"] is None]
        if not images:
            raise ValueError(
                f"no image of the retention class '{name}' can be read; check retention.source"
            )
        if unreadable := len(verified) - len(images):
            logger.warning("retention: left out %d unreadable images of '%s'", unreadable, name)
        entries += [{"image": image, "label": label} for image in images]
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_list(entries, features=datasets.Features(columns))
