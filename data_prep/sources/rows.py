"""What the rows of every source have in common."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import datasets

from nicheclip.domain import class_key

SOURCE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        **{
            name: datasets.Value("string")
            for name in ("source_id", "version", "class_name", "split", "attribution")
        },
    }
)


T = TypeVar("T")


def no_class(source_id: str, detail: str) -> dict[str, str | None]:
    """The entry of report.json for what has no class."""
    nothing = dict.fromkeys(("label", "sha256", "other"))
    return {"source_id": source_id, "kind": "no class", "detail": detail, **nothing}


def read_options(kind: type[T], options: dict[str, Any], source: str) -> T:
    """`source.options` of a domain file as the dataclass of its source.

    Raises:
        ValueError: for an option that it does not know.
    """
    try:
        return kind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(kind).parameters)
        raise ValueError(
            f"source.options of {source}: {error}; known options are {known}"
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
        if class_key(label) not in names:
            close = difflib.get_close_matches(class_key(label), list(names), n=1)
            raise ValueError(
                f"'{label}' in {where} is no class of the domain"
                + (
                    f"; did you mean '{names[close[0]]}'?"
                    if close
                    else "; add it to classes, or take it out"
                )
            )
        canonical[label] = names[class_key(label)]
    empty = sorted(set(class_names) - set(canonical.values()))
    if empty:
        raise FileNotFoundError(
            f"no images in {where} for: {', '.join(empty)}; add them, or take the classes out of "
            "the domain file"
        )
    return canonical
