"""Where images come from. Each source is one module, and gives the same: rows and what it could not take.

Rows are a `datasets.Dataset` of image (not decoded), source_id (its name inside the source), version (changes when the
content does), class_name, split (None: to be decided) and attribution (None: not known).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from data_prep.sources.commons import download_commons
from data_prep.sources.facades import paint_facades
from data_prep.sources.folders import read_folders
from data_prep.sources.tables import is_table, read_table
from nicheclip.domain import Domain
from nicheclip.results import read_json


def fetch_images(domain: Domain, run: Path, images: str | None, seed: int, contact: str | None) -> str | Path:
    """Paints or downloads what the domain's source asks for; where the images lie then.

    Args:
        images: class folders or a dataset that take the place of the domain's own source.
        contact: how the operators of Wikimedia can reach who runs this.

    Raises:
        ValueError: if neither the domain nor `images` names any.
    """
    source = domain.source
    if images is not None:
        return images
    if source.kind == "facades":
        return paint_facades(run / "images", list(domain.clusters.values()), seed, **source.options)
    if source.kind == "commons":
        return download_commons(run / "images", domain.class_names, contact, **source.options)
    if source.path is None:
        raise ValueError(
            f"domain '{domain.name}' names no images; pass --images FOLDER, one folder a class inside, or a dataset"
        )
    return source.path


def read_source(domain: Domain, location: str | Path, own: bool) -> tuple[datasets.Dataset, list[dict[str, str]]]:
    """Lists what lies at `location` and decodes none of it; the rows, and what has no label or no class.

    Args:
        own: whether this is the domain's own source, and not one that was named on the command line.
    """
    table = domain.source.kind == "dataset" if own else is_table(location)
    if table:
        options = domain.source.options if domain.source.kind == "dataset" else {}
        return read_table(location, domain.class_names, **options)
    return read_folders(location, domain.class_names)


def planted_faults(location: str | Path) -> dict[str, Any] | None:
    """The truth about the painter's faults, if the images are its own."""
    path = Path(location) / "truth.json"
    return read_json(path, "") if path.is_file() else None
