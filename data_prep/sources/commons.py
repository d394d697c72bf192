"""Wikimedia Commons: freely licensed photos, with the author, licence and source of each.

Every file that was listed ends in `metadata.jsonl` or, with the reason, in `skipped.jsonl`. Commons
is asked politely: one API request at a time, few downloads at a time, each names a way of contact,
and all threads wait when the site says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from html import unescape
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import httpx
import pandas as pd
from pydantic import NonNegativeInt, PositiveInt
from tqdm.auto import tqdm

from data_prep.sources.rows import check_classes, read_options
from nicheclip.files import read_json, replaced_file, write_json
from nicheclip.images import UnusableImageError, open_image

logger = logging.getLogger(__name__)

TRIES = 6
PHOTOS = ("image/jpeg", "image/png", "image/webp", "image/tiff")
LATER = "run the same command again later, it goes on where it stopped"
STOPPED = "not downloaded yet: the run was stopped"
LONG_WAIT = 30  # seconds; a longer one is told
NO_CREDIT_OWED = r"(cc0|cc-zero|cc-pd|pd|public-domain)\b"
CREDIT_OWED = r"(cc-by(-sa)?|gfdl|fal|free-art(-license)?)\b"
TOLD = "title category page_id author license license_url source_url sha1".split()
OUR_NAMES = re.compile(r"\d+_(.+_)?\d+px_[0-9a-f]{8}\.\w+")  # those of `_place`

# A file of a category: its title, category, and reason, which says why it is not used (None if it
# can be); the address of the thumbnail; and what metadata.jsonl tells of it.
Listed = dict[str, Any]


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
    commons = Commons(contact, chosen)
    with commons.client:
        ordered = {name: categories[name] for name in class_names}
        _download(commons, folder, _choose(_list(commons, folder, ordered), chosen))
    return folder


def _canonical(categories: list[str]) -> list[str]:
    """Names as the API gives them: no prefix, no underscores, the first letter in upper case."""
    plain = (name.removeprefix("Category:").replace("_", " ").split() for name in categories)
    names = (unicodedata.normalize("NFC", " ".join(words)) for words in plain)
    return list(dict.fromkeys(name[:1].upper() + name[1:] for name in names))


def _list(commons: Commons, folder: Path, categories: dict[str, list[str]]) -> pd.DataFrame:
    """The files of all classes; kept in `folder`/.listing for the next run with these options."""
    settings = asdict(commons.options) | {"categories": None, "parallel": None, "first_wait": None}
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
        write_json(paths[name], _list_class(commons, categories[name]))
    listed = {name: read_json(path, "remove it") for name, path in paths.items()}
    files = [file | {"class_name": name} for name, found in listed.items() for file in found]
    return pd.DataFrame(files, columns=[*TOLD, "class_name", "url", "reason"], dtype=object)


def _list_class(commons: Commons, categories: list[str]) -> list[Listed]:
    """Walks the categories breadth-first; stops when there is twice what is wanted.

    A level is walked in an order that is fixed but not that of the alphabet: cut short, that would
    give one country.
    """
    options = commons.options
    files: dict[str, Listed] = {}  # by title
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


def _attribution(file: Listed) -> str:
    terms = f" ({file['license_url']})" if file["license_url"] else ""
    return f"{file['title']}, {file['author']}, {file['license']}{terms}, {file['source_url']}"


def _download(commons: Commons, folder: Path, files: pd.DataFrame) -> None:
    """Fetches what is missing, removes what is not chosen any more, and writes both lists."""
    chosen = files[files.reason.isna()].to_dict("records")
    wanted = {folder / _place(file, commons.options.width): file for file in chosen}
    failed: dict[Path, str] = {}
    for path in folder.glob("*/*"):
        if path not in wanted and OUR_NAMES.fullmatch(path.name):
            path.unlink()
    todo = [path for path in wanted if not path.is_file()]

    def fetch(path: Path) -> None:
        try:
            content = commons.get(wanted[path]["url"]).content
            open_image(content)
        except _BrokenError as error:
            failed[path] = str(error)
        except UnusableImageError as error:
            failed[path] = f"what came is no image: {error.__cause__}"
        else:
            with replaced_file(path) as unfinished:
                unfinished.write_bytes(content)

    pool = ThreadPoolExecutor(commons.options.parallel)
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
                name = path.relative_to(folder).as_posix()
                kept.append(file | {"file_name": name, "attribution": _attribution(file)})
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


class _BrokenError(ConnectionError):
    """One address does not give what it should, however often it is asked."""


class Commons:
    """The client of the API and of the thumbnails; `contact` is for Wikimedia's operators."""

    def __init__(self, contact: str | None, options: CommonsOptions):
        self.contact, self.options = (contact or "").strip(), options
        agent = f"NicheCLIP/{version('nicheclip')} ({self.contact}) python-httpx"
        self.client = httpx.Client(headers={"User-Agent": agent}, timeout=60, follow_redirects=True)
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.resume_at = 0.0  # on the monotonic clock; what one thread is told to wait, all wait

    def get(self, url: str, **params: Any) -> httpx.Response:
        """Asks again, after a while, where that may help.

        Raises:
            ValueError: without a contact.
            _BrokenError: if the address is wrong, or every try fails.
            ConnectionError: if the site can't be reached, or asks to wait at every try.
            PermissionError: if it refuses.
        """
        if not self.contact:
            raise ValueError("Wikimedia asks for a way of contact; pass --contact you@example.org")
        next_try = 0.0
        for attempt in range(TRIES):
            if self.stopped.wait(max(next_try, self.resume_at) - time.monotonic()):
                raise _BrokenError(STOPPED)
            asked = 0.0
            try:
                response = self.client.get(url, params=params or None)
                problem, whole_site = _passing_problem(response), response.status_code == 429
                if problem is None:
                    return response
                asked = _seconds_to_wait(response.headers.get("retry-after", "0"))
            except httpx.TransportError as error:  # also for a body that is shorter than announced
                problem = f"{type(error).__name__}: {error}"
                whole_site = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            if asked > LONG_WAIT:
                logger.warning("%s asks to wait %.0f seconds (%s)", url, asked, problem)
            next_try = time.monotonic() + self.options.first_wait * 2**attempt
            with self.lock:
                self.resume_at = max(self.resume_at, time.monotonic() + asked)
        problem = f"{problem} in each of {TRIES} tries"
        raise ConnectionError(f"{url}: {problem}; {LATER}") if whole_site else _BrokenError(problem)

    def answers(self, **params: Any) -> Iterator[dict[str, Any]]:
        """The answers to one query, following `continue` to its end."""
        params |= {"action": "query", "format": "json", "formatversion": 2, "maxlag": 5}
        more: dict[str, Any] | None = {}
        while more is not None:
            try:
                answer = self.get(self.options.api, **params, **more).json()
            except (_BrokenError, json.JSONDecodeError) as error:
                raise ConnectionError(f"{self.options.api}: {error}; {LATER}") from error
            if "error" in answer:
                code, info = answer["error"]["code"], answer["error"]["info"]
                raise ConnectionError(f"the API refuses ({code}): {info}")
            yield answer
            more = answer.get("continue")

    def empty(self, categories: list[str]) -> list[str]:
        """Those that don't exist, or are empty, as a renamed one is."""
        sizes = {}
        for start in range(0, len(categories), 50):
            titles = "|".join(f"Category:{name}" for name in categories[start : start + 50])
            for answer in self.answers(prop="categoryinfo", titles=titles):
                for page in answer["query"]["pages"]:
                    info = page.get("categoryinfo", {})
                    sizes[page["title"]] = info.get("files", 0) + info.get("subcats", 0)
        return [name for name in categories if not sizes.get(f"Category:{name}")]

    def subcategories(self, category: str) -> list[str]:
        """Their names without "Category:", one level down."""
        answers = self.answers(
            list="categorymembers", cmtitle=f"Category:{category}", cmtype="subcat", cmlimit=500
        )
        members = (member for answer in answers for member in answer["query"]["categorymembers"])
        return [member["title"].removeprefix("Category:") for member in members]

    def files(self, category: str, enough: int) -> list[Listed]:
        """Whole batches of the category's files, until `enough` of them can be used."""
        query = {
            "generator": "categorymembers",
            "gcmtitle": f"Category:{category}",
            "gcmtype": "file",
            "gcmlimit": 50,  # the API scales at most 50 images an answer
            "prop": "imageinfo",
            "iiprop": "url|mime|size|sha1|extmetadata",
            "iiurlwidth": self.options.width,
            "iiextmetadatafilter": "Artist|Attribution|License|LicenseShortName|LicenseUrl|NonFree",
        }
        files: list[Listed] = []
        batch: dict[str, dict[str, Any]] = {}
        try:
            for answer in self.answers(**query):
                # A page comes in several answers where its imageinfo did not fit into the first.
                for page in answer.get("query", {}).get("pages", []):
                    batch.setdefault(page["title"], {}).update(page)
                if "batchcomplete" in answer:
                    files += [_read_page(batch[title], category) for title in sorted(batch)]
                    batch = {}
                    if sum(file["reason"] is None for file in files) >= enough:
                        break
        except ConnectionError as error:
            if "(urlparamnormal)" not in str(error):
                raise
            # One file that can't be scaled spoils the answer for its whole batch, and hides what
            # comes after it.
            titles = [*(title.removeprefix("File:") for title in batch), f"Category:{category}"]
            reason = f"not listed to the end: {error}"
            files += [{"title": title, "category": category, "reason": reason} for title in titles]
        return files


def _passing_problem(response: httpx.Response) -> str | None:
    """What may be over when one asks again later; raises an error for what stays."""
    if response.status_code == 403:
        raise PermissionError(f"{response.url}: HTTP 403; check that --contact really reaches you")
    if response.status_code == 429 or response.status_code >= 500:
        return f"HTTP {response.status_code}"
    if not response.is_success:
        raise _BrokenError(f"HTTP {response.status_code}")
    if response.headers.get("content-type", "").startswith("application/json"):
        code = response.json().get("error", {}).get("code")
        return code if code in ("maxlag", "ratelimited") else None
    return None


def _seconds_to_wait(retry_after: str) -> float:
    """As the header says, which gives seconds or a date."""
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 0.0


def _read_page(page: dict[str, Any], category: str) -> Listed:
    """A file as the API describes it; its texts may be HTML."""
    info = page.get("imageinfo", [{}])[0]
    entries = info.get("extmetadata") or {}
    texts = {name: plain_text(str(entry["value"])) for name, entry in entries.items()}
    licence = texts.get("LicenseShortName", "")
    author = texts.get("Artist") or texts.get("Attribution") or ""
    if re.fullmatch(r"(unknown|unidentified)( (author|artist|photographer))?", author.casefold()):
        author = ""
    codes = [name.casefold().replace(" ", "-") for name in (texts.get("License", ""), licence)]
    limited = texts.get("NonFree") or any(re.search(r"-(nc|nd)\b", code) for code in codes)
    no_credit_owed = any(re.match(NO_CREDIT_OWED, code) for code in codes)
    free = no_credit_owed or any(re.match(CREDIT_OWED, code) for code in codes)
    obstacles = {
        "the page has no file": not info,
        f"no photo: {info.get('mime')}": info.get("mime") not in PHOTOS,
        f"not freely licensed: {licence or 'no licence named'}": limited or not free,
        f"{licence} asks for the author's name, and none is given": not (no_credit_owed or author),
        "no thumbnail": not info.get("thumburl"),
    }
    return {
        "title": page["title"].removeprefix("File:"),
        "category": category,
        "page_id": page["pageid"],
        "author": author or "unknown",
        "license": licence,
        "license_url": texts.get("LicenseUrl", ""),
        "source_url": info.get("descriptionurl", ""),
        "sha1": info.get("sha1", ""),
        "url": info.get("thumburl", ""),
        "reason": next((reason for reason, applies in obstacles.items() if applies), None),
    }


def plain_text(html: str) -> str:
    """The text that a reader of the HTML sees, on one line."""
    # What is hidden goes first, such as a second 'Unknown author'.
    html = re.sub(r"<(\w+)[^>]*display:\s*none.*?</\1>", "", html, flags=re.DOTALL)
    html = re.sub(r"<(br|p|div|li|td|tr)\b", r" <\1", html)
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())
