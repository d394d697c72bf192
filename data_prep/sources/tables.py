"""A `datasets` dataset with image and label: a Hub id, a Parquet or Arrow file, a saved folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from data_prep.sources.rows import SOURCE_FEATURES, Listing, check_classes, read_options, unusable
from nicheclip.domain import SPLITS

SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), "validation")
Split = Literal["train", "validation", "calibration", "test"]
SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TableOptions:
    """Which columns to read, and what the splits of the dataset are here."""

    image_column: str = "image"
    label_column: str = "label"
    attribution_column: str | None = None
    group_column: str | None = None  # whose images stay in one split or fold
    config: str | None = None  # of a Hub dataset
    revision: str | None = None
    # e.g. {valid: validation, full: null}; others by name
    splits: dict[str, Split | None] = field(default_factory=dict)


def is_table(location: str | Path) -> bool:
    """Whether `location` is for `read_table`: everything but a folder of folders is."""
    path = Path(location)
    found = (any(path.rglob(f"*{suffix}")) for suffix in SUFFIXES)
    return not path.is_dir() or _is_saved(path) or any(found)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_table(location: str | Path, class_names: list[str], **options: Any) -> Listing:
    """Opens a dataset; images stay undecoded and on disk.

    A split that is not train, validation, calibration or test is dealt out.

    Args:
        location: a Hub id, a .parquet or .arrow file, a folder of them, or one written by
            `save_to_disk`.
        options: the fields of `TableOptions`; labels are ClassLabel or strings.

    Returns:
        rows as `data_prep.sources` describes them; and the rows without a label.

    Raises:
        ValueError: for an unknown option, column, split or label.
        FileNotFoundError: if there is no such dataset, or a class has no image.
    """
    chosen = read_options(TableOptions, options)
    tables = _load(location, chosen)
    split_of = SPLIT_NAMES | chosen.splits
    table = datasets.concatenate_datasets(list(tables.values()))
    labels = _labels(table, chosen, location)
    found = sorted({label for label in labels if label is not None})
    canonical = {None: None} | check_classes(found, class_names, f"'{location}'")
    column, credit, group = chosen.image_column, chosen.attribution_column, chosen.group_column
    nothing = [None] * len(table)
    images = table.select_columns(column).rename_columns({column: "image"})
    images = images.cast_column("image", datasets.Image(decode=False))
    columns = {
        "source_id": [f"{name}/{n:07d}" for name, part in tables.items() for n in range(len(part))],
        "version": _versions(table, images),
        "class_name": [canonical[label] for label in labels],
        "split": [split_of.get(name) for name, part in tables.items() for _ in range(len(part))],
        "group": [each and str(each) for each in table[group][:]] if group else nothing,
        "attribution": table[credit][:] if credit else nothing,
    }
    kinds = datasets.Features({name: SOURCE_FEATURES[name] for name in columns})
    texts = datasets.Dataset.from_dict(columns, features=kinds)
    rows = datasets.concatenate_datasets([images, texts], axis=1)
    labelled = [index for index, label in enumerate(labels) if label is not None]
    ids = zip(columns["source_id"], labels, strict=True)
    aside = [unusable(name, "no class", "no label") for name, label in ids if label is None]
    return rows.select(labelled), aside


def _versions(table: datasets.Dataset, images: datasets.Dataset) -> list[str]:
    """Change when the files of the table do, or those that its paths name."""
    files = [_status(file["filename"]) for file in table.cache_files]
    versions = []
    for chunk in images.data.column("image").chunks:
        # Beside bytes a path is but a name, from the machine of who made the table.
        outside = chunk.field("bytes").is_null().to_pylist()
        for path, named in zip(chunk.field("path").to_pylist(), outside, strict=True):
            status = _status(path) if path and named else None
            versions.append(f"{table._fingerprint} {files} {status}")
    return versions


def _status(path: str) -> tuple[int, int] | None:
    status = Path(path).stat() if Path(path).is_file() else None
    return status and (status.st_size, status.st_mtime_ns)


def _load(location: str | Path, options: TableOptions) -> dict[str, datasets.Dataset]:
    path = Path(location)
    if path.suffix in SUFFIXES and path.is_file():
        loaded = datasets.load_dataset(SUFFIXES[path.suffix], data_files={"table": str(path)})
    elif _is_saved(path):
        loaded = datasets.load_from_disk(path)
    else:
        try:
            loaded = datasets.load_dataset(str(location), options.config, revision=options.revision)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"no folder and no dataset '{location}': {error}; check the name and the network"
            ) from error
    return loaded if isinstance(loaded, dict) else {"table": loaded}


def _labels(
    table: datasets.Dataset, options: TableOptions, location: str | Path
) -> list[str | None]:
    for key in ("image_column", "label_column", "attribution_column", "group_column"):
        column = getattr(options, key)
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"'{location}' has no column '{column}'; set source.options.{key} to one of "
                f"{', '.join(table.column_names)}"
            )
    kind = table.features[options.label_column]
    labels = table[options.label_column][:]
    if isinstance(kind, datasets.ClassLabel):
        return [None if label in (None, -1) else kind.names[label] for label in labels]
    if any(not isinstance(label, str) for label in labels if label is not None):
        raise ValueError(
            f"the labels in column '{options.label_column}' of '{location}' are {kind.dtype}, and "
            "nothing says what they mean; expected a ClassLabel or strings"
        )
    return labels
