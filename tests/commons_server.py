"""A small server that answers as Wikimedia Commons does: MediaWiki API and thumbnails.

Categories and files live in memory; the thumbnails are real JPEG, PNG and WebP. What differs from
Commons: a batch of a category holds three files, and one answer describes at most two of them, so
that each way to continue is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from PIL import Image, ImageDraw

BATCH, DESCRIBED = 3, 2
ARTIST = '<a href="//commons.wikimedia.org/wiki/User:Ada" title="User:Ada">Ada &amp; Jo</a>'
UNKNOWN = 'Unknown author<span style="display: none;">Unknown author</span>'


@dataclass(frozen=True)
class Photo:
    """A file on the server; `artist` and the licence are as `extmetadata` gives them."""

    mime: str = "image/jpeg"
    license: str | None = "CC BY-SA 4.0"
    artist: str | None = ARTIST
    width: int = 1200
    more: dict[str, str] = field(default_factory=dict)  # further entries of extmetadata


@dataclass(frozen=True)
class Fault:
    """What happens instead of an answer: a status, another or shorter body, an error of the API."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    truncated: bool = False
    api_error: str | None = None
    body: bytes | None = None
    date_in: int | None = None  # Retry-After as a date, so many seconds from now


MAXLAG = Fault(headers={"Retry-After": "1"}, api_error="maxlag")
TRUNCATED = Fault(truncated=True)


@dataclass(frozen=True)
class Request:
    path: str
    parameters: dict[str, str]
    agent: str
    began: float  # on the monotonic clock


class CommonsServer(ThreadingHTTPServer):
    """`with CommonsServer(categories, files) as commons:` has its API at `commons.api`.

    Attributes:
        fail_next: faults as (part of the address, fault); each spoils the next request that it
            fits.
        fail_always: the same, but they stay.
        hold_after: after so many thumbnails, further requests for thumbnails wait for `release`,
            and get no answer.
        requests: all that came in. served: how often each thumbnail was sent whole.
        most_at_once: for "api" and "thumb", how many requests were answered at the same time.
    """

    daemon_threads = True

    def __init__(
        self,
        categories: dict[str, list[str]],
        files: dict[str, Photo],
        subcategories: dict[str, list[str]] | None = None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.api = f"{self.url}/w/api.php"
        self.categories, self.files, self.subcategories = categories, files, subcategories or {}
        self.fail_next: list[tuple[str, Fault]] = []
        self.fail_always: list[tuple[str, Fault]] = []
        self.hold_after: int | None = None
        self.held = 0
        self.release = threading.Event()
        self.requests: list[Request] = []
        self.served: Counter[str] = Counter()
        self.active: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __enter__(self) -> CommonsServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    def wait_until_held(self, number: int) -> None:
        deadline = time.monotonic() + 20
        while self.held < number and time.monotonic() < deadline:
            time.sleep(0.01)

    def page_id(self, title: str) -> int:
        return 1000 + list(self.files).index(title)

    def to(self, part: str) -> list[Request]:
        return [request for request in self.requests if part in request.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # header and body in one packet: apart, each answer would wait for the client's acknowledgement
    wbufsize = -1
    server: CommonsServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path, server = unquote(address.path), self.server
        parameters = {name: values[0] for name, values in parse_qs(address.query).items()}
        kind = "api" if path == "/w/api.php" else "thumb"
        with server.lock:
            agent = self.headers.get("User-Agent", "")
            server.requests.append(Request(unquote(self.path), parameters, agent, time.monotonic()))
            server.active[kind] += 1
            server.most_at_once[kind] = max(server.most_at_once[kind], server.active[kind])
            fault = self.fault()
        try:
            if kind == "api":
                self.answer(self.query(parameters), fault)
            else:
                self.thumbnail(path, fault)
        finally:
            with server.lock:
                server.active[kind] -= 1

    def log_message(self, *_) -> None:
        """Keeps the tests' output clean."""

    def fault(self) -> Fault | None:
        for faults in (self.server.fail_next, self.server.fail_always):
            for entry in faults:
                if entry[0] in unquote(self.path):
                    if faults is self.server.fail_next:
                        faults.remove(entry)
                    return entry[1]
        return None

    def answer(
        self,
        content: bytes | dict,
        fault: Fault | None,
        kind: str = "application/json; charset=utf-8",
    ) -> None:
        fault = fault or Fault()
        if fault.api_error:
            content = {"error": {"code": fault.api_error, "info": "Waiting for a database server"}}
        content = content if fault.body is None else fault.body
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(fault.status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **fault.headers}
        if fault.date_in is not None:
            headers["Retry-After"] = formatdate(time.time() + fault.date_in, usegmt=True)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault.truncated else content)
        self.close_connection = self.close_connection or fault.truncated

    def thumbnail(self, path: str, fault: Fault | None) -> None:
        server = self.server
        _, _, width, title = path.split("/")
        with server.lock:
            begun = sum(server.served.values()) + server.active["thumb"]
            hold = server.hold_after is not None and begun > server.hold_after
            server.held += hold
        if hold:
            server.release.wait()
            self.close_connection = True
            return
        time.sleep(0.02)  # long enough for two downloads to meet
        name = title.rsplit(".", 1)[0] if title.endswith(".tif.jpg") else title
        if name not in server.files:
            return self.answer(b"File not found", Fault(404), "text/html")
        self.answer(drawing(name, int(width), server.files[name].mime), fault, "image/jpeg")
        if fault is None:
            with server.lock:
                server.served[title] += 1

    def query(self, parameters: dict[str, str]) -> dict[str, Any]:
        if not {"action": "query", "format": "json", "formatversion": "2"}.items() <= (
            parameters.items()
        ):
            only = "this server only knows queries, as JSON, version 2"
            return {"error": {"code": "badvalue", "info": only}}
        if parameters.get("prop") == "categoryinfo":
            pages = [self.category(title) for title in parameters["titles"].split("|")]
            return {"batchcomplete": True, "query": {"pages": pages}}
        if parameters.get("list") == "categorymembers":
            return self.subcategories(parameters)
        return self.members(parameters)

    def category(self, title: str) -> dict[str, Any]:
        name = title.removeprefix("Category:")
        files = len(self.server.categories.get(name, []))
        subcategories = len(self.server.subcategories.get(name, []))
        if name not in self.server.categories:
            return {"ns": 14, "title": title, "missing": True}
        page: dict[str, Any] = {"pageid": 1, "ns": 14, "title": title}
        if files or subcategories:
            size = {"size": files + subcategories, "files": files, "subcats": subcategories}
            page["categoryinfo"] = {**size, "pages": 0, "hidden": False}
        return page

    def subcategories(self, parameters: dict[str, str]) -> dict[str, Any]:
        names = self.server.subcategories.get(parameters["cmtitle"].removeprefix("Category:"), [])
        start = int(parameters.get("cmcontinue", 0))
        members = [{"ns": 14, "title": f"Category:{name}"} for name in names[start : start + 1]]
        answer = {"batchcomplete": True, "query": {"categorymembers": members}}
        if start + 1 < len(names):
            answer["continue"] = {"cmcontinue": str(start + 1), "continue": "-||"}
        return answer

    def members(self, parameters: dict[str, str]) -> dict[str, Any]:
        """Every page of the batch in each answer, but `imageinfo` only of two, in turn."""
        titles = self.server.categories.get(parameters["gcmtitle"].removeprefix("Category:"), [])
        start = int(parameters.get("gcmcontinue", 0))
        batch = titles[start : start + BATCH]
        if not batch:
            return {"batchcomplete": True}
        at = sorted(batch)
        first = at.index(parameters["iicontinue"]) if "iicontinue" in parameters else 0
        pages = []
        for title in sorted(batch, key=self.server.page_id):
            page = {"pageid": self.server.page_id(title), "ns": 6, "title": f"File:{title}"}
            if title in at[first : first + DESCRIBED]:
                page["imageinfo"] = [self.image_info(title, int(parameters["iiurlwidth"]))]
            pages.append(page)
        answer: dict[str, Any] = {"query": {"pages": pages}}
        going_on = {}
        if first + DESCRIBED < len(at):
            going_on = {"gcmcontinue": str(start)} if start else {}
            going_on["iicontinue"] = at[first + DESCRIBED]
        else:
            answer["batchcomplete"] = True
            if start + BATCH < len(titles):
                going_on = {"gcmcontinue": str(start + BATCH)}
        return answer | (
            {"continue": {**going_on, "continue": "gcmcontinue||"}} if going_on else {}
        )

    def image_info(self, title: str, width: int) -> dict[str, Any]:
        photo = self.server.files[title]
        suffix = ".jpg" if photo.mime == "image/tiff" else ""
        texts = {"LicenseShortName": photo.license, "Artist": photo.artist, **photo.more}
        if photo.license and photo.license.startswith("CC BY"):
            texts["License"] = photo.license.lower().replace(" ", "-")
            kind = photo.license[3:].lower().replace(" ", "/")
            texts["LicenseUrl"] = f"https://creativecommons.org/licenses/{kind}"
        page = f"File:{quote(title.replace(' ', '_'))}"
        return {
            "size": 100_000,
            "width": photo.width,
            "height": photo.width * 3 // 4,
            "thumburl": f"{self.server.url}/thumb/{min(width, photo.width)}/{quote(title)}{suffix}",
            "url": f"{self.server.url}/{quote(title)}",
            "descriptionurl": f"https://commons.wikimedia.org/wiki/{page}",
            "sha1": hashlib.sha1(title.encode()).hexdigest(),
            "mime": photo.mime,
            "extmetadata": {n: {"value": t, "source": "x"} for n, t in texts.items() if t} or [],
        }


@cache
def drawing(title: str, width: int, mime: str) -> bytes:
    """A house whose colours and windows come from its title."""
    red, green, blue, windows = hashlib.sha1(title.encode()).digest()[:4]
    image = Image.new("RGB", (width, width * 3 // 4), (red, green, blue))
    draw = ImageDraw.Draw(image)
    for number in range(1 + windows % 6):
        draw.rectangle([20 + 40 * number, 40, 40 + 40 * number, 80], (blue, red, green))
    encoded = io.BytesIO()
    image.save(encoded, {"image/png": "PNG", "image/webp": "WEBP"}.get(mime, "JPEG"))
    return encoded.getvalue()
