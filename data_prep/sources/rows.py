"""What the rows of every source have in common."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

import datasets
from pydantic import TypeAdapter, ValidationError

from nicheclip.domain import class_key

TEXTS = ("source_id", "version", "class_name", "split", "group", "attribution")
SOURCE_FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), **dict.fromkeys(TEXTS, datasets.Value("string"))}
)
Entry = dict[str, Any]  # an image of report.json: source_id, label, sha256 and more
Listing = tuple[datasets.Dataset, list[Entry]]  # the rows, and what could not be taken
T = TypeVar("T")


def unusable(source_id: str, kind: str, detail: str, label: str | None = None) -> Entry:
    """The entry of report.json for what has no class, or can't be read."""
    named = {"source_id": source_id, "label": label, "sha256": None}
    return {**named, "kind": kind, "other": None, "detail": detail}


def read_options(kind: type[T], options: dict[str, Any]) -> T:
    """`source.options` of a domain file as the dataclass of its source.

    Raises:
        ValueError: for an option that it does not know, or a value that does not suit its field.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"source.options: '{unknown[0]}'; known options are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(map(str, problem["loc"]))
        raise ValueError(
            f"source.options.{option}: {problem['msg']}, got {problem['input']!r}"
        ) from error


def check_classes(found: Iterable[str], class_names: list[str], where: str) -> dict[str, str]:
    """The class of the domain for each label that was found; matched by `class_key`.

    Raises:
        ValueError: if a label is no class of the domain.
        FileNotFoundError: if a class has no image.
    """
    names = {class_key(name): name for name in class_names}
    canonical = {}
    for label in found:
        key = class_key(label)
        if key not in names:
            close = difflib.get_close_matches(key, list(names), n=1)
            remedy = f"did you mean '{names[close[0]]}'?" if close else "add it, or take it out"
            raise ValueError(f"'{label}' in {where} is no class of the domain; {remedy}")
        canonical[label] = names[key]
    if empty := sorted(set(class_names) - set(canonical.values())):
        raise FileNotFoundError(f"no images in {where} for: {', '.join(empty)}; add or drop them")
    return canonical
