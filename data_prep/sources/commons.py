"""Wikimedia Commons: freely licensed photos, with the author, licence and source of each.

Every file that was listed ends in `metadata.jsonl` or, with the reason, in `skipped.jsonl`. Commons
is asked politely: one API request at a time, few downloads at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from tqdm.auto import tqdm

from data_prep.sources.rows import check_classes, read_options
from data_prep.sources.wikimedia import Commons, CommonsFile
from nicheclip.files import read_json, replaced_file, write_json

Listed = tuple[str, CommonsFile]  # the name of a class, and a file of it
OUR_NAMES = re.compile(r"\d+_(.+_)?\d+px_[0-9a-f]{8}\.\w+")  # those of `CommonsFile.name`


@dataclass(frozen=True)
class CommonsOptions:
    """Which files of Commons, how many, how large, and how they are fetched."""

    categories: dict[str, list[str]] = field(default_factory=dict)  # of each class
    images_per_class: PositiveInt = 300
    per_category: PositiveInt = 25  # so that one building with 400 photos does not become a class
    depth: NonNegativeInt = 2  # levels of subcategories
    # pixels, of the thumbnail; those that Wikimedia serves, as far as they suit photos
    width: Literal[250, 330, 500, 960, 1280, 1920] = 500
    api: str = "https://commons.wikimedia.org/w/api.php"
    parallel: PositiveInt = 2  # downloads at a time; Wikimedia's robot policy allows no more
    first_wait: float = 1.0  # seconds before the second try, doubled before each further one


def download_commons(
    folder: Path, class_names: list[str], contact: str | None, **options: Any
) -> Path:
    """Downloads class folders of photos; goes on where an earlier run stopped.

    Writes `folder`/<class name>/<image>, `folder`/metadata.jsonl (a line an image, with its
    attribution) and `folder`/skipped.jsonl (every other file that was listed: title, class_name,
    category, reason). Removes images that other options had chosen. A file that was listed for two
    classes goes into neither.

    Args:
        contact: an e-mail address or a web page, for Wikimedia's operators; not needed once all is
            there.
        options: the fields of `CommonsOptions`.

    Raises:
        ValueError: for wrong options, without a contact where one is needed, or for categories that
            are missing or empty: all of them are named before anything is downloaded.
        OSError: if Commons can't be reached, refuses, or keeps asking to wait. What was downloaded
            by then stays.
    """
    chosen = read_options(CommonsOptions, options, "Commons")
    filled = {name: categories for name, categories in chosen.categories.items() if categories}
    of_class = check_classes(filled, class_names, "source.options.categories")
    categories = {of_class[name]: _canonical(given) for name, given in filled.items()}
    commons = Commons(contact, chosen.api, chosen.width, chosen.first_wait)
    with commons.client:
        ordered = {name: categories[name] for name in class_names}
        listed = _choose(_listings(commons, folder, ordered, chosen), chosen)
        _download(commons, folder, listed, chosen.parallel)
    return folder


def _canonical(categories: list[str]) -> list[str]:
    """Names as the API gives them: no prefix, no underscores, the first letter in upper case."""
    plain = (name.removeprefix("Category:").replace("_", " ").split() for name in categories)
    names = (unicodedata.normalize("NFC", " ".join(words)) for words in plain)
    return list(dict.fromkeys(name[:1].upper() + name[1:] for name in names))


def _listings(
    commons: Commons, folder: Path, categories: dict[str, list[str]], options: CommonsOptions
) -> dict[str, list[CommonsFile]]:
    """The files of each class; kept in `folder`/.listing for the next run with these options."""
    settings = [options.api, options.width, options.depth, options.per_category]
    paths = {}
    for name, own in categories.items():
        order = json.dumps([*settings, options.images_per_class, own])
        digest = hashlib.sha256(order.encode()).hexdigest()[:12]
        paths[name] = folder / ".listing" / f"{name} {digest}.json"
    todo = [name for name, path in paths.items() if not path.is_file()]
    homes = {category: name for name in todo for category in categories[name]}
    if empty := commons.empty(list(homes)):
        named = "; ".join(f"'{category}' (of {homes[category]})" for category in empty)
        raise ValueError(
            f"source.options.categories: missing or empty on Commons: {named}. Look up what they "
            "are called now, or take them out"
        )
    for name in tqdm(todo, desc="listing Commons", unit="class", disable=not todo):
        files = _list_class(commons, categories[name], options)
        write_json(paths[name], [asdict(file) for file in files])
    listings = {name: read_json(path, "remove it") for name, path in paths.items()}
    return {name: [CommonsFile(**file) for file in files] for name, files in listings.items()}


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
            found = commons.files(category, options.per_category)
            new = {file.title: file for file in found if file.title not in files}
            files |= new
            usable += min(options.per_category, sum(file.reason is None for file in new.values()))
    return list(files.values())


def _choose(listings: dict[str, list[CommonsFile]], options: CommonsOptions) -> list[Listed]:
    """What each class takes from its categories in turn; what it does not take gets a reason."""
    homes: dict[str, list[str]] = {}
    for class_name, files in listings.items():
        for file in files:
            homes.setdefault(file.title, []).append(class_name)
    listed: list[Listed] = []
    for class_name, files in listings.items():
        queues: dict[str, list[CommonsFile]] = {}
        for file in files:
            queue = queues.setdefault(file.category, [])
            reason = file.reason
            if reason is None and len(homes[file.title]) > 1:
                reason = f"listed for several classes: {', '.join(homes[file.title])}"
            if reason is None and len(queue) == options.per_category:
                reason = f"its category has {len(queue)} others already (per_category)"
            if reason is None:
                queue.append(file)
            else:
                listed.append((class_name, replace(file, reason=reason)))
        rounds = zip_longest(*queues.values())
        turns = [file for round_ in rounds for file in round_ if file is not None]
        for turn, file in enumerate(turns):
            if turn >= options.images_per_class:
                reason = (
                    f"its class has {options.images_per_class} others already (images_per_class)"
                )
                file = replace(file, reason=reason)
            listed.append((class_name, file))
    return listed


def _download(commons: Commons, folder: Path, listed: list[Listed], parallel: int) -> None:
    """Fetches what is missing, removes what is not chosen any more, and writes both lists."""
    places = [folder / class_name / file.name(commons.width) for class_name, file in listed]
    wanted = {
        path: file for path, (_, file) in zip(places, listed, strict=True) if file.reason is None
    }
    for path in folder.glob("*/*"):
        if path not in wanted and OUR_NAMES.fullmatch(path.name):
            path.unlink()
    todo = [path for path in wanted if not path.is_file()]
    for parent in {path.parent for path in todo}:
        parent.mkdir(parents=True, exist_ok=True)
    problems: dict[Path, str | None] = {}
    pool = ThreadPoolExecutor(parallel)
    try:
        futures = {pool.submit(commons.store, wanted[path].url, path): path for path in todo}
        done = as_completed(futures)
        for future in tqdm(done, "downloading from Commons", len(todo), unit="img"):
            problems[futures[future]] = future.result()
    finally:  # after an error or a Ctrl-C nothing more is begun
        commons.stopped.set()
        pool.shutdown(cancel_futures=True)
        kept, skipped = [], []
        for path, (class_name, file) in zip(places, listed, strict=True):
            if file.reason is None and path.is_file():
                kept.append(file.metadata(path.relative_to(folder).as_posix()))
                continue
            row = {"title": file.title, "class_name": class_name, "category": file.category}
            reason = file.reason or problems.get(path) or "not downloaded yet: the run was stopped"
            skipped.append({**row, "reason": reason})
        _write_lines(folder / "metadata.jsonl", kept, "file_name")
        _write_lines(folder / "skipped.jsonl", skipped, "class_name", "title")


def _write_lines(path: Path, rows: list[dict[str, Any]], *order: str) -> None:
    """JSON lines, in the order of some of their keys."""
    rows = sorted(rows, key=lambda row: [row[key] for key in order])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replaced_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
