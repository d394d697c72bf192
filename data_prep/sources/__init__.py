"""Where images come from. Each source gives the same: rows, and what it could not take.

Rows are a `datasets.Dataset` of image (not decoded), source_id (its name inside the source),
version (changes when the content does), class_name, split (None: to be decided), group (images of
one building, specimen or patient, which stay together; None: of its own) and attribution
(None: not known). What it could not take are entries of report.json, see `rows.unusable`.
"""

import importlib
import logging
from pathlib import Path

import datasets
import numpy as np

from data_prep.sources.commons import download_commons
from data_prep.sources.folders import read_folders
from data_prep.sources.rows import Listing
from data_prep.sources.tables import is_table, read_table
from data_prep.verify import verify_image
from nicheclip.domain import Domain, Source

logger = logging.getLogger(__name__)


def source_of(domain: Domain, images: str | Path | None) -> Source:
    """The domain's own source, or the class folders or the dataset that take its place."""
    own = domain.source
    if images is None:
        return own
    if not is_table(images):
        return Source(path=str(images))
    options = own.options if own.kind == "dataset" else {}
    return Source(kind="dataset", path=str(images), options=options)


def fetch(
    source: Source, folder: Path, domain: Domain, seed: int, contact: str | None = None
) -> str | Path:
    """Draws or downloads what the source asks for; where the images lie then.

    A module draws by its `write_images(folder, domain, seed, **options)`; `contact` is for the
    operators of Wikimedia.

    Raises:
        ValueError: if the source names no images, or its module can't be imported.
    """
    if source.kind == "commons":
        return download_commons(folder, domain.class_names, contact, **source.options)
    if source.path is None:
        raise ValueError(f"'{domain.name}' names no images; pass --images FOLDER_OR_DATASET")
    if source.kind != "module":
        return source.path
    try:
        module = importlib.import_module(source.path)
    except ImportError as error:
        raise ValueError(
            f"source.path '{source.path}' can't be imported ({error}); give a module that Python "
            "finds from the folder where the command runs, with a function write_images"
        ) from error
    return module.write_images(folder, domain, seed, **source.options)


def read(source: Source, location: str | Path, class_names: list[str]) -> Listing:
    """Lists what lies at `location` and decodes none of it; the rows, and what has no class."""
    if source.kind == "dataset":
        return read_table(location, class_names, **source.options)
    return read_folders(location, class_names)


def retention_rows(domain: Domain, drawn: Path, seed: int = 0) -> datasets.Dataset:
    """The images of the retention task: of the test split, if they come in splits.

    Returns:
        image (shrunk as the domain's own) and label (the index of the class in the task).

    Raises:
        ValueError: if the domain has no such task, its labels don't fit, or no image of a class
            can be read.
        FileNotFoundError: if there are no images.
    """
    task = domain.retention
    if task is None:
        raise ValueError(f"domain '{domain.name}' has no retention task; add `retention` to it")
    names, source = list(task.classes), task.source
    rows, _ = read(source, fetch(source, drawn, domain, seed), names)
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
