"""Wikimedia Commons: freely licensed photos, with the author, licence and source of each.

Every file that was listed ends in `metadata.jsonl` or, with the reason, in `skipped.jsonl`. Commons
is asked politely: one API request at a time, few downloads at a time, a way of contact in each, and
waiting when it says so.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from data_prep.sources.rows import read_options
from data_prep.sources.wikimedia import EXTENSIONS, Commons, CommonsFile
from nicheclip.files import read_json, replaced_file, write_json

Choice = tuple[str, CommonsFile]  # the name of a class, and a file of it
# the thumbnails that Wikimedia serves, as far as they suit photos
WIDTHS = (250, 330, 500, 960, 1280, 1920)


@dataclass(frozen=True)
class CommonsOptions:
    """Which files of Commons, how many, how large, and how they are fetched."""

    categories: dict[str, list[str]] = field(
        default_factory=dict
    )  # class name: names without "Category:"
    images_per_class: int = 300
    per_category: int = 25  # so that one building with 400 photos does not become a class
    depth: int = 2  # levels of subcategories
    width: int = 500  # pixels, of the thumbnail
    api: str = "https://commons.wikimedia.org/w/api.php"
    parallel: int = 2  # downloads at a time; Wikimedia's robot policy allows no more
    first_wait: float = 1.0  # seconds before the second try, doubled before each further one

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise ValueError(
                f"source.options.width: {self.width} is not served; choose one of {_join(WIDTHS)}"
            )
        for name, least in {
            "images_per_class": 1,
            "per_category": 1,
            "depth": 0,
            "parallel": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"source.options.{name}: expected at least {least}, got {getattr(self, name)}"
                )


def download_commons(
    folder: Path, class_names: list[str], contact: str | None, **options: Any
) -> Path:
    """Downloads class folders of photos; goes on where an earlier run stopped.

    Writes `folder`/<class name>/<image>, `folder`/metadata.jsonl (a line an image, with its
    attribution) and `folder`/skipped.jsonl (every other file that was listed: title, class_name,
    category, reason). Removes images that other options had chosen. A file that was listed for two
    classes goes into neither.

    Args:
        class_names: the classes of the domain; each needs its categories in the options.
        contact: an e-mail address or a web page, for Wikimedia's operators; not needed once all is
            there.
        options: the fields of `CommonsOptions`.

    Returns:
        folder.

    Raises:
        ValueError: for wrong options, without a contact where one is needed, or for categories that
            are missing or empty: all of them are named before anything is downloaded.
        OSError: if Commons can't be reached, refuses, or keeps asking to wait. What was downloaded
            by then stays.
    """
    chosen_options = _options(options, class_names)
    commons = Commons(contact, chosen_options.api, chosen_options.width, chosen_options.first_wait)
    with commons.client:
        listings = _listings(commons, Path(folder), class_names, chosen_options)
        chosen, skipped = _choose(listings, chosen_options)
        _download(commons, Path(folder), chosen, skipped, chosen_options.parallel)
    return Path(folder)


def _options(options: dict[str, Any], class_names: list[str]) -> CommonsOptions:
    chosen = read_options(CommonsOptions, options, "Commons")
    for name in chosen.categories:
        if name not in class_names:
            close = difflib.get_close_matches(name, class_names, n=1)
            remedy = (
                f"did you mean '{close[0]}'?" if close else f"expected one of {_join(class_names)}"
            )
            raise ValueError(
                f"source.options.categories: '{name}' is no class of the domain; {remedy}"
            )
    for name in class_names:
        if not isinstance(chosen.categories.get(name), list) or not chosen.categories[name]:
            raise ValueError(
                f"source.options.categories: '{name}' has no list of categories; add one such as "
                f"'{name}: [{name}]', names as on commons.wikimedia.org"
            )
    return chosen


def _listings(
    commons: Commons, folder: Path, class_names: list[str], options: CommonsOptions
) -> dict[str, list[CommonsFile]]:
    """The files of each class.

    From `folder`/.listing where they were listed before, with the same options.
    """
    order = {
        name: getattr(options, name)
        for name in ("api", "width", "depth", "per_category", "images_per_class")
    }
    orders = {
        name: order | {"categories": _canonical(options.categories[name])} for name in class_names
    }
    paths = {name: folder / ".listing" / f"{name}.json" for name in class_names}
    stored = {name: read_json(path, "") for name, path in paths.items() if path.is_file()}
    todo = [
        name for name in class_names if name not in stored or stored[name]["order"] != orders[name]
    ]
    homes = {category: name for name in todo for category in orders[name]["categories"]}
    if empty := commons.empty(list(homes)):
        raise ValueError(
            "source.options.categories: missing or empty on Commons: "
            + "; ".join(f"'{category}' (of {homes[category]})" for category in empty)
            + ". Look up what they are called now, or take them out"
        )
    for name in tqdm(todo, desc="listing Commons", unit="class", disable=not todo):
        files = _list_class(commons, orders[name]["categories"], options)
        stored[name] = {"order": orders[name], "files": [asdict(file) for file in files]}
        write_json(paths[name], stored[name])
    return {name: [CommonsFile(**file) for file in stored[name]["files"]] for name in class_names}


def _canonical(categories: list[str]) -> list[str]:
    """Names as the API gives them: no prefix, no underscores, the first letter in upper case."""
    names = (
        " ".join(name.removeprefix("Category:").replace("_", " ").split()) for name in categories
    )
    return list(
        dict.fromkeys(unicodedata.normalize("NFC", name[:1].upper() + name[1:]) for name in names)
    )


def _list_class(
    commons: Commons, categories: list[str], options: CommonsOptions
) -> list[CommonsFile]:
    """Walks the categories breadth-first; stops when there is twice what is wanted.

    A level is walked in an order that is fixed but not that of the alphabet: cut short, that would
    give one country.
    """
    files: dict[str, CommonsFile] = {}
    level, seen, usable, enough = categories, set(categories), 0, 2 * options.images_per_class
    for depth in range(options.depth + 1):
        if depth and usable < enough:
            children = {child for parent in level for child in commons.subcategories(parent)} - seen
            level = sorted(children, key=lambda child: hashlib.sha256(child.encode()).digest())
            seen |= children
        for category in level:
            if depth and usable >= enough:
                break
            found = [
                file
                for file in commons.files(category, options.per_category)
                if file.title not in files
            ]
            files |= {file.title: file for file in found}
            usable += min(options.per_category, sum(file.reason is None for file in found))
    return list(files.values())


def _choose(
    listings: dict[str, list[CommonsFile]], options: CommonsOptions
) -> tuple[list[Choice], list[dict[str, str]]]:
    """What each class takes from its categories in turn, and the rows of skipped.jsonl."""
    homes: dict[str, list[str]] = {}
    for class_name, files in listings.items():
        for file in files:
            homes.setdefault(file.title, []).append(class_name)
    chosen, skipped = [], []
    for class_name, files in listings.items():
        queues: dict[str, list[CommonsFile]] = {}
        for file in files:
            if file.reason is None and len(homes[file.title]) == 1:
                queues.setdefault(file.category, []).append(file)
        rounds = zip_longest(*(queue[: options.per_category] for queue in queues.values()))
        turns = [file for round_ in rounds for file in round_ if file is not None]
        taken, surplus = turns[: options.images_per_class], set(turns[options.images_per_class :])
        chosen += [(class_name, file) for file in taken]
        for file in sorted(set(files) - set(taken), key=lambda file: file.title):
            reason = f"its category has {options.per_category} others already (per_category)"
            if file in surplus:
                reason = (
                    f"its class has {options.images_per_class} others already (images_per_class)"
                )
            if len(homes[file.title]) > 1:
                reason = f"listed for several classes: {_join(homes[file.title])}"
            skipped.append(_skipped(class_name, file, file.reason or reason))
    return chosen, skipped


def _skipped(class_name: str, file: CommonsFile, reason: str) -> dict[str, str]:
    return {
        "title": file.title,
        "class_name": class_name,
        "category": file.category,
        "reason": reason,
    }


def _download(
    commons: Commons,
    folder: Path,
    chosen: list[Choice],
    skipped: list[dict[str, str]],
    parallel: int,
) -> None:
    """Fetches what is missing, removes what is not chosen any more, and writes both lists."""
    places = {
        folder / class_name / file.stem(commons.width): (class_name, file)
        for class_name, file in chosen
    }
    for path in folder.glob("*/*"):
        if path.with_suffix("") not in places and re.fullmatch(
            r"\d+_(.+_)?\d+px_[0-9a-f]{8}\.\w+", path.name
        ):
            path.unlink()
    todo = [stem for stem in places if _stored(stem) is None]
    for parent in {stem.parent for stem in todo}:
        parent.mkdir(parents=True, exist_ok=True)
    problems: dict[Path, str | None] = {}
    bar = tqdm(
        total=len(places),
        initial=len(places) - len(todo),
        desc="downloading from Commons",
        unit="img",
    )
    try:
        with bar, ThreadPoolExecutor(parallel) as pool:
            try:
                futures = {
                    pool.submit(commons.store, places[stem][1].url, stem): stem for stem in todo
                }
                for future in as_completed(futures):
                    problems[futures[future]] = future.result()
                    bar.update()
            finally:  # after an error or a Ctrl-C nothing more is begun
                commons.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        kept = []
        for stem, (class_name, file) in places.items():
            if stored := _stored(stem):
                kept.append(file.metadata(stored.relative_to(folder).as_posix()))
            else:
                reason = problems.get(stem) or "not downloaded yet: the run was stopped"
                skipped.append(_skipped(class_name, file, reason))
        _write_lines(folder / "metadata.jsonl", sorted(kept, key=lambda row: row["file_name"]))
        _write_lines(
            folder / "skipped.jsonl",
            sorted(skipped, key=lambda row: (row["class_name"], row["title"])),
        )


def _stored(stem: Path) -> Path | None:
    paths = (
        stem.with_name(f"{stem.name}.{extension}")
        for extension in dict.fromkeys(EXTENSIONS.values())
    )
    return next((path for path in paths if path.is_file()), None)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, renamed into place once they are whole."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replaced_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _join(words: Any) -> str:
    return ", ".join(str(word) for word in words)
