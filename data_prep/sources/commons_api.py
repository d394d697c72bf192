"""The client of Wikimedia Commons: what the API says of files and categories, and thumbnails.

Commons is asked politely: one API request at a time, few downloads at a time, each names a way of
contact, and all threads wait when the site says so.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from html import unescape
from importlib.metadata import version
from typing import Any

import httpx

logger = logging.getLogger(__name__)

TRIES = 6
PHOTOS = ("image/jpeg", "image/png", "image/webp", "image/tiff")
LATER = "run the same command again later, it goes on where it stopped"
STOPPED = "not downloaded yet: the run was stopped"
LONG_WAIT = 30  # seconds; a longer one is told
NO_CREDIT_OWED = r"(cc0|cc-zero|cc-pd|pd|public-domain)\b"
CREDIT_OWED = r"(cc-by(-sa)?|gfdl|fal|free-art(-license)?)\b"

# A file of a category: its title, category, and reason, which says why it is not used (None if it
# can be); the address of the thumbnail; and what metadata.jsonl tells of it.
Listed = dict[str, Any]


class BrokenError(ConnectionError):
    """One address does not give what it should, however often it is asked."""


class Commons:
    """The client of the API and of thumbnails of this width; `contact` is for its operators."""

    def __init__(self, contact: str | None, api: str, width: int, first_wait: float):
        self.contact, self.api = (contact or "").strip(), api
        self.width, self.first_wait = width, first_wait
        agent = f"NicheCLIP/{version('nicheclip')} ({self.contact}) python-httpx"
        self.client = httpx.Client(headers={"User-Agent": agent}, timeout=60, follow_redirects=True)
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.resume_at = 0.0  # on the monotonic clock; what one thread is told to wait, all wait

    def get(self, url: str, **params: Any) -> httpx.Response:
        """Asks again, after a while, where that may help.

        Raises:
            ValueError: without a contact.
            BrokenError: if the address is wrong, or every try fails.
            ConnectionError: if the site can't be reached, or asks to wait at every try.
            PermissionError: if it refuses.
        """
        if not self.contact:
            raise ValueError("Wikimedia asks for a way of contact; pass --contact you@example.org")
        next_try = 0.0
        for attempt in range(TRIES):
            if self.stopped.wait(max(next_try, self.resume_at) - time.monotonic()):
                raise BrokenError(STOPPED)
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
            next_try = time.monotonic() + self.first_wait * 2**attempt
            with self.lock:
                self.resume_at = max(self.resume_at, time.monotonic() + asked)
        problem = f"{problem} in each of {TRIES} tries"
        raise ConnectionError(f"{url}: {problem}; {LATER}") if whole_site else BrokenError(problem)

    def answers(self, **params: Any) -> Iterator[dict[str, Any]]:
        """The answers to one query, following `continue` to its end."""
        params |= {"action": "query", "format": "json", "formatversion": 2, "maxlag": 5}
        more: dict[str, Any] | None = {}
        while more is not None:
            try:
                answer = self.get(self.api, **params, **more).json()
            except (BrokenError, json.JSONDecodeError) as error:
                raise ConnectionError(f"{self.api}: {error}; {LATER}") from error
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
            "iiurlwidth": self.width,
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
        raise BrokenError(f"HTTP {response.status_code}")
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
