"""Wikimedia Commons: freely licensed photos, with the author, licence and source of each.

Every file that was listed ends in `metadata.jsonl` or, with the reason, in `skipped.jsonl`.
"""

import hashlib
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pandas as pd
from pydantic import NonNegativeInt, PositiveInt
from tqdm.auto import tqdm

from data_prep.sources.commons_api import STOPPED, BrokenError, Commons, Listed
from data_prep.sources.rows import check_classes, read_options
from nicheclip.files import read_json, replaced_file, write_json
from nicheclip.images import UnusableImageError, open_image

TOLD = "title category page_id author license license_url source_url sha1".split()
OUR_NAMES = re.compile(r"\d+_(.+_)?\d+px_[0-9a-f]{8}\.\w+")  # those of `_place`


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

    Writes `folder`/<class name>/<image>, with both lists beside them, and removes images that other
    options had chosen. A file that was listed for two classes goes into neither.

    Args:
        contact: an e-mail address or a web page; not needed once all is there.
        options: the fields of `CommonsOptions`.

    Raises:
        ValueError: for wrong options, without a contact where one is needed, or for categories that
            are missing or empty: all of them are named before anything is downloaded.
        OSError: if Commons can't be reached, refuses, or keeps asking to wait.
    """
    chosen = read_options(CommonsOptions, options)
    filled = {name: categories for name, categories in chosen.categories.items() if categories}
    of_class = check_classes(filled, class_names, "source.options.categories")
    categories = {of_class[name]: _canonical(given) for name, given in filled.items()}
    commons = Commons(contact, chosen.api, chosen.width, chosen.first_wait)
    with commons.client:
        ordered = {name: categories[name] for name in class_names}
        files = _choose(_list(commons, chosen, folder, ordered), chosen)
        _download(commons, chosen, folder, files)
    return folder


def _canonical(categories: list[str]) -> list[str]:
    """Names as the API gives them: no prefix, no underscores, the first letter in upper case."""
    plain = (name.removeprefix("Category:").replace("_", " ").split() for name in categories)
    names = (unicodedata.normalize("NFC", " ".join(words)) for words in plain)
    return list(dict.fromkeys(name[:1].upper() + name[1:] for name in names))


def _list(
    commons: Commons, options: CommonsOptions, folder: Path, categories: dict[str, list[str]]
) -> pd.DataFrame:
    """The files of all classes; kept in `folder`/.listing for the next run with these options."""
    settings = asdict(options) | {"categories": None, "parallel": None, "first_wait": None}
    paths = {}
    for name, own in categories.items():
        order = json.dumps([settings, own])
        digest = hashlib.sha256(order.encode()).hexdigest()[:12]
        paths[name] = folder / ".listing" / f"{name} {digest}.json"
    todo = [name for name, path in paths.items() if not path.is_file()]
    homes = {category: name for name in todo for category in categories[name]}
    if empty := commons.empty(list(homes)):
        named = "; ".join(f"'{category}' (of {homes[category]})" for category in empty)
        raise ValueError(f"categories missing or empty on Commons, rename them: {named}")
    for name in tqdm(todo, desc="listing Commons", unit="class", disable=not todo):
        write_json(paths[name], _list_class(commons, options, categories[name]))
    listed = {name: read_json(path, "remove it") for name, path in paths.items()}
    files = [file | {"class_name": name} for name, found in listed.items() for file in found]
    return pd.DataFrame(files, columns=[*TOLD, "class_name", "url", "reason"], dtype=object)


def _list_class(commons: Commons, options: CommonsOptions, categories: list[str]) -> list[Listed]:
    """Walks the categories breadth-first; stops when there is twice what is wanted."""
    files: dict[str, Listed] = {}  # by title
    level, seen, usable, enough = categories, set(categories), 0, 2 * options.images_per_class
    for depth in range(options.depth + 1):
        if depth and usable < enough:
            children = {child for parent in level for child in commons.subcategories(parent)} - seen
            # Cut short, the order of the alphabet would give one country.
            level = sorted(children, key=lambda child: hashlib.sha256(child.encode()).digest())
            seen |= children
        for category in level:
            if depth and usable >= enough:
                break
            found = commons.files(category, options.per_category)
            new = [file for file in found if file["title"] not in files]
            files |= {file["title"]: file for file in new}
            usable += min(options.per_category, sum(file["reason"] is None for file in new))
    return list(files.values())


def _choose(files: pd.DataFrame, options: CommonsOptions) -> pd.DataFrame:
    """Lets each class take from its categories in turn; what it does not take gets a reason."""
    homes = files.groupby("title").class_name
    several = files.reason.isna() & (homes.transform("size") > 1)
    told = homes.transform(lambda names: f"listed for several classes: {', '.join(names)}")
    files = files.assign(reason=files.reason.mask(several, told))
    limits = {"per_category": ["class_name", "category"], "images_per_class": ["class_name"]}
    for option, own in limits.items():
        most, usable = getattr(options, option), files[files.reason.isna()]
        files["turn"] = usable.groupby(own).cumcount()
        told = f"its {own[-1].removesuffix('_name')} has {most} others already ({option})"
        files["reason"] = files.reason.mask(files.turn >= most, told)
        files = files.sort_values("turn", kind="stable")
    return files


def _place(file: Listed, width: int) -> str:
    """Of the image here: another width, or a new version on Commons, is another file."""
    plain = unicodedata.normalize("NFKD", Path(file["title"]).stem).encode("ascii", "ignore")
    slug = "_".join(re.findall("[a-z0-9]+", plain.decode().lower()))[:60].strip("_")
    stem = "_".join(filter(None, [str(file["page_id"]), slug, f"{width}px", file["sha1"][:8]]))
    suffix = Path(httpx.URL(file["url"]).path).suffix.lower().replace("jpeg", "jpg")
    return f"{file['class_name']}/{stem}{suffix}"


def _download(commons: Commons, options: CommonsOptions, folder: Path, files: pd.DataFrame) -> None:
    """Fetches what is missing, removes what is not chosen any more, and writes both lists."""
    chosen = files[files.reason.isna()].to_dict("records")
    wanted = {folder / _place(file, options.width): file for file in chosen}
    failed: dict[Path, str] = {}
    for path in folder.glob("*/*"):
        if path not in wanted and OUR_NAMES.fullmatch(path.name):
            path.unlink()
    todo = [path for path in wanted if not path.is_file()]

    def fetch(path: Path) -> None:
        try:
            content = commons.get(wanted[path]["url"]).content
            open_image(content)
        except BrokenError as error:
            failed[path] = str(error)
        except UnusableImageError as error:
            failed[path] = f"what came is no image: {error.__cause__}"
        else:
            with replaced_file(path) as unfinished:
                unfinished.write_bytes(content)

    pool = ThreadPoolExecutor(options.parallel)
    try:
        done = as_completed([pool.submit(fetch, path) for path in todo])
        for future in tqdm(done, "downloading from Commons", len(todo), unit="img"):
            future.result()
    finally:  # after an error or a Ctrl-C nothing more is begun
        commons.stopped.set()
        pool.shutdown(cancel_futures=True)
        skipped = files[files.reason.notna()].to_dict("records")
        kept = []
        for path, file in wanted.items():
            if path.is_file():
                terms = f" ({file['license_url']})" if file["license_url"] else ""
                whose = f"{file['title']}, {file['author']}, {file['license']}{terms}"
                named = {"file_name": path.relative_to(folder).as_posix()}
                kept.append(file | named | {"attribution": f"{whose}, {file['source_url']}"})
            else:
                skipped.append(file | {"reason": failed.get(path) or STOPPED})
        told = ["file_name", "attribution", *TOLD]
        _write_lines(folder / "metadata.jsonl", kept, told, ["file_name"])
        told = ["title", "class_name", "category", "reason"]
        _write_lines(folder / "skipped.jsonl", skipped, told, ["class_name", "title"])


def _write_lines(path: Path, rows: list[Listed], keys: list[str], order: list[str]) -> None:
    """JSON lines of some keys, in the order of some of them."""
    rows = sorted(rows, key=lambda row: [row[key] for key in order])
    lines = (json.dumps({key: row[key] for key in keys}, ensure_ascii=False) for row in rows)
    with replaced_file(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
