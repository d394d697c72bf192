"""The Commons source against a server that pages, lags, refuses and forgets as the real one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from data_prep.sources.commons import download_commons
from data_prep.sources.commons_api import Commons, plain_text
from nicheclip.domain import Domain
from tests.commons_server import MAXLAG, TRUNCATED, UNKNOWN, CommonsServer, Fault, Photo

ROOT = Path(__file__).parents[1]
CONTACT = "ada@example.org"
CLASSES = ["Baroque", "Gothic"]
PEERS = [f"Peer {number}.jpg" for number in range(8)]

ARCHIVE = "City\n<b>Archive</b>"
FILES = {
    "Chartres, façade (1).jpg": Photo(),
    "Scan.tif": Photo(mime="image/tiff", license="CC BY 3.0", more={"Attribution": "not used"}),
    "Собор.png": Photo(mime="image/png", license="GFDL"),
    "Small.webp": Photo(mime="image/webp", license="FAL", width=200),
    "Old plate.jpg": Photo(license="Public domain", artist=None),
    "Given away.jpg": Photo(license="CC0", artist=UNKNOWN),
    "Credited.jpg": Photo("image/jpeg", "CC BY 2.0", None, more={"Attribution": ARCHIVE}),
    "Nameless.jpg": Photo(license="CC BY 2.0", artist=UNKNOWN),
    "Not for sale.jpg": Photo(license="CC BY-NC-SA 2.0"),
    "Unchanged.jpg": Photo(license="CC BY-ND 2.0"),
    "Fair use.jpg": Photo(license="CC BY 2.0", more={"NonFree": "true"}),
    "Unlicensed.jpg": Photo(license=None, artist=None),
    "House rules.jpg": Photo(license="Attribution"),
    "Plan.svg": Photo(mime="image/svg+xml"),
    "Book.pdf": Photo(mime="application/pdf"),
    "Organ.ogg": Photo(mime="audio/ogg"),
    "Both.jpg": Photo(),
    "Deep.jpg": Photo(),
    "Too deep.jpg": Photo(),
    "Angel.jpg": Photo(),
    "Balcony.jpg": Photo(),
    **{title: Photo() for title in PEERS},
}
CATEGORIES = {
    "Gothic architecture": [*list(FILES)[:16], "Both.jpg"],
    "Gothic in France": ["Chartres, façade (1).jpg"],
    "Portals": ["Deep.jpg"],
    "Tympana": ["Too deep.jpg"],
    "Baroque architecture": ["Angel.jpg", "Balcony.jpg", "Both.jpg"],
    "Peer church": PEERS,
    "Renamed": [],
}
SUBCATEGORIES = {
    "Gothic architecture": ["Gothic in France"],
    "Gothic in France": ["Gothic architecture", "Portals"],
    "Portals": ["Tympana"],
}
ASKED = {"Gothic": ["gothic_architecture"], "Baroque": ["Baroque architecture", "Peer church"]}
OPTIONS = {"categories": ASKED}
KEPT = {"Gothic": [*list(FILES)[:7], "Deep.jpg"], "Baroque": ["Angel.jpg", "Balcony.jpg", *PEERS]}


@pytest.fixture
def commons():
    with CommonsServer(CATEGORIES, FILES, SUBCATEGORIES) as server:
        yield server


def download(commons: CommonsServer, folder: Path, **options) -> Path:
    defaults = {"api": commons.api, "first_wait": 0.01, **OPTIONS}
    return download_commons(folder, CLASSES, CONTACT, **(defaults | options))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(folder: Path) -> dict[str, list[str]]:
    titles: dict[str, list[str]] = {}
    for row in rows(folder / "metadata.jsonl"):
        titles.setdefault(row["file_name"].split("/")[0], []).append(row["title"])
    return {name: sorted(found) for name, found in titles.items()}


def reasons(folder: Path) -> dict[tuple[str, str], str]:
    skipped = rows(folder / "skipped.jsonl")
    return {(row["class_name"], row["title"]): row["reason"] for row in skipped}


def test_every_listed_file_is_kept_or_skipped_with_a_reason(commons, tmp_path):
    folder = download(commons, tmp_path / "images")
    assert kept(folder) == {name: sorted(titles) for name, titles in KEPT.items()}
    expected = {
        "Nameless.jpg": "CC BY 2.0 asks for the author's name",
        "Not for sale.jpg": "not freely licensed: CC BY-NC-SA 2.0",
        "Unchanged.jpg": "not freely licensed: CC BY-ND 2.0",
        "Fair use.jpg": "not freely licensed: CC BY 2.0",
        "Unlicensed.jpg": "not freely licensed: no licence named",
        "House rules.jpg": "not freely licensed: Attribution",
        "Plan.svg": "no photo: image/svg+xml",
        "Book.pdf": "no photo: application/pdf",
        "Organ.ogg": "no photo: audio/ogg",
        "Both.jpg": "listed for several classes: Baroque, Gothic",
    }
    found = reasons(folder)
    assert {title for _, title in found} == set(expected)
    assert {name for name, title in found if title == "Both.jpg"} == set(CLASSES)
    for (_, title), reason in found.items():
        assert reason.startswith(expected[title])
    for row in rows(folder / "metadata.jsonl"):
        with Image.open(folder / row["file_name"]) as image:
            assert image.width == (200 if row["title"] == "Small.webp" else 500)
    files = {path.relative_to(folder).as_posix() for path in folder.glob("[!.]*/*")}
    assert files == {row["file_name"] for row in rows(folder / "metadata.jsonl")}


def test_the_attribution_names_title_author_licence_and_source(commons, tmp_path):
    by_title = {row["title"]: row for row in rows(download(commons, tmp_path) / "metadata.jsonl")}
    sha1 = hashlib.sha1("Chartres, façade (1).jpg".encode()).hexdigest()
    source = "https://commons.wikimedia.org/wiki/File:Chartres%2C_fa%C3%A7ade_%281%29.jpg"
    assert by_title["Chartres, façade (1).jpg"] == {
        "file_name": f"Gothic/1000_chartres_facade_1_500px_{sha1[:8]}.jpg",
        "attribution": "Chartres, façade (1).jpg, Ada & Jo, CC BY-SA 4.0 "
        f"(https://creativecommons.org/licenses/by-sa/4.0), {source}",
        "title": "Chartres, façade (1).jpg",
        "author": "Ada & Jo",
        "license": "CC BY-SA 4.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/4.0",
        "source_url": source,
        "category": "Gothic architecture",
        "sha1": sha1,
        "page_id": 1000,
    }
    named = ("Old plate.jpg", "Given away.jpg", "Credited.jpg")
    authors = [by_title[title]["author"] for title in named]
    assert authors == ["unknown", "unknown", "City Archive"]
    told = "Old plate.jpg, unknown, Public domain, https://"
    assert by_title["Old plate.jpg"]["attribution"].startswith(told)
    assert by_title["Scan.tif"]["file_name"].endswith(".jpg")
    assert by_title["Small.webp"]["file_name"].endswith(".webp")
    assert by_title["Собор.png"]["file_name"].startswith("Gothic/1002_500px_")


def test_faults_that_pass_are_waited_out_and_others_are_named(commons, tmp_path):
    busy = {"Retry-After": "1"}
    commons.fail_next = [
        ("generator", MAXLAG),
        ("list=categorymembers", Fault(429, busy)),
        ("Angel.jpg", Fault(429, date_in=2)),
        ("Balcony.jpg", TRUNCATED),
        ("Peer 1.jpg", Fault(500)),
        ("Peer 2.jpg", Fault(503, busy)),
    ]
    commons.fail_always = [
        ("Deep.jpg", TRUNCATED),
        ("Peer 3.jpg", Fault(404)),
        ("Peer 4.jpg", Fault(body=b"<html>")),
    ]
    folder = download(commons, tmp_path)

    found = reasons(folder)
    assert found["Gothic", "Deep.jpg"].startswith("RemoteProtocolError: peer closed connection")
    assert found["Gothic", "Deep.jpg"].endswith("in each of 6 tries")
    assert found["Baroque", "Peer 3.jpg"] == "HTTP 404"
    assert found["Baroque", "Peer 4.jpg"].startswith("what came is no image: cannot identify")
    lost = {"Deep.jpg", "Peer 3.jpg", "Peer 4.jpg"}
    assert kept(folder) == {name: sorted({*titles} - lost) for name, titles in KEPT.items()}
    assert len(commons.to("Deep.jpg")) == 6

    def waited(part: str) -> float:
        first, second = commons.to(part)[:2]
        return second.began - first.began

    for part in ("generator", "list=categorymembers", "Peer 2.jpg", "Angel.jpg"):
        assert waited(part) >= 1  # a date, as Angel's, has whole seconds
    commons.fail_always.clear()
    served = commons.served.copy()
    found = kept(download(commons, tmp_path))
    assert found == {name: sorted(titles) for name, titles in KEPT.items()}
    assert set(commons.served - served) == lost


def test_what_one_thread_is_told_to_wait_all_wait(commons):
    client = Commons(CONTACT, commons.api, width=500, first_wait=0.01)
    commons.fail_next = [("Angel.jpg", Fault(429, {"Retry-After": "1"}))]
    other = threading.Thread(target=client.get, args=[f"{commons.url}/thumb/500/Angel.jpg"])
    other.start()
    deadline = time.monotonic() + 5
    while not client.resume_at and time.monotonic() < deadline:
        time.sleep(0.01)
    client.get(f"{commons.url}/thumb/500/Balcony.jpg")
    other.join()
    angel, again = commons.to("Angel.jpg")
    (balcony,) = commons.to("Balcony.jpg")
    assert 1 <= again.began - angel.began < 5 and 1 <= balcony.began - angel.began < 5


def test_commons_is_asked_politely(commons, tmp_path):
    download(commons, tmp_path)
    for agent in {request.agent for request in commons.requests}:
        assert agent.startswith("NicheCLIP/") and f"({CONTACT})" in agent
    assert all(request.parameters["maxlag"] == "5" for request in commons.to("api.php"))
    assert commons.most_at_once["api"] == 1
    assert commons.most_at_once["thumb"] == 2
    assert max(commons.served.values()) == 1
    first = [request for request in commons.to("generator") if "continue" not in request.path]
    visited = [request.parameters["gcmtitle"] for request in first]
    assert len(visited) == len(set(visited))
    assert "Category:Tympana" not in visited


def test_a_killed_run_and_an_interrupted_one_go_on_where_they_stopped(commons, tmp_path):
    whole = download(commons, tmp_path / "whole")
    commons.served.clear()
    folder = tmp_path / "images"

    commons.hold_after = 5
    process = multiprocessing.get_context("fork").Process(target=download, args=(commons, folder))
    process.start()
    commons.wait_until_held(2)
    process.kill()
    process.join()
    commons.release.set()
    assert sum(commons.served.values()) == 5
    assert not (folder / "metadata.jsonl").exists()

    commons.hold_after, commons.held = 9, 0
    commons.release.clear()
    asked = []

    def interrupt() -> None:
        commons.wait_until_held(2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        asked.append(len(commons.to("/thumb/")))
        commons.release.set()

    # A test run that was started in the background ignores Ctrl-C.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            download(commons, folder)
    finally:
        signal.signal(signal.SIGINT, former)
    # no further try for what the server broke off after the interrupt
    assert asked == [len(commons.to("/thumb/"))]
    assert sum(commons.served.values()) == len(rows(folder / "metadata.jsonl")) == 9
    assert list(reasons(folder).values()).count("not downloaded yet: the run was stopped") == 9

    commons.hold_after = None
    listed = len(commons.to("generator"))
    download(commons, folder)
    assert len(commons.to("generator")) == listed
    assert max(commons.served.values()) == 1
    for name in ("metadata.jsonl", "skipped.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_asks_nothing_again_and_other_options_replace_it(commons, tmp_path):
    first = (download(commons, tmp_path) / "metadata.jsonl").read_bytes()
    requests = len(commons.requests)
    (tmp_path / "Gothic" / "mine.jpg").write_bytes(b"")
    assert (download(commons, tmp_path) / "metadata.jsonl").read_bytes() == first
    assert len(commons.requests) == requests

    download(commons, tmp_path, width=330, images_per_class=3)
    names = {row["file_name"] for row in rows(tmp_path / "metadata.jsonl")}
    assert len(names) == 6
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("[!.]*/*")}
    assert found == {*names, "Gothic/mine.jpg"}
    widths = {request.parameters["iiurlwidth"] for request in commons.to("generator")}
    assert widths == {"500", "330"}


def test_a_class_takes_from_its_categories_in_turn(commons, tmp_path):
    categories = {"Gothic": ["Gothic architecture"], "Baroque": ["Peer church", "Portals"]}
    limits = {"depth": 0, "per_category": 4, "images_per_class": 4}
    folder = download(commons, tmp_path, categories=categories, **limits)
    assert kept(folder)["Baroque"] == ["Deep.jpg", "Peer 0.jpg", "Peer 1.jpg", "Peer 2.jpg"]
    found = reasons(folder)
    assert found["Baroque", "Peer 3.jpg"] == "its class has 4 others already (images_per_class)"
    assert found["Baroque", "Peer 4.jpg"] == "its category has 4 others already (per_category)"
    assert ("Baroque", "Peer 6.jpg") not in found  # nobody asked for the third batch


def test_a_class_that_has_enough_is_not_walked_further(commons, tmp_path):
    """One that asks for more than its own categories hold is."""

    def walked() -> set[str]:
        return {request.parameters["gcmtitle"] for request in commons.to("generator")}

    folder = download(commons, tmp_path / "few", images_per_class=3)
    assert {name: len(titles) for name, titles in kept(folder).items()} == dict.fromkeys(CLASSES, 3)
    assert "Category:Gothic architecture" in walked()
    assert "Category:Gothic in France" not in walked()
    folder = download(commons, tmp_path / "many", images_per_class=8)
    assert "Category:Gothic in France" in walked()
    assert "Category:Portals" in walked() and "Deep.jpg" in kept(folder)["Gothic"]


def test_a_file_that_cannot_be_scaled_spoils_its_category_only(commons, tmp_path):
    commons.fail_always = [("iicontinue=Both.jpg", Fault(api_error="urlparamnormal"))]
    folder = download(commons, tmp_path)
    assert kept(folder)["Baroque"] == PEERS
    told = "not listed to the end"
    found = {title for (_, title), why in reasons(folder).items() if why.startswith(told)}
    assert found == {"Angel.jpg", "Balcony.jpg", "Both.jpg", "Category:Baroque architecture"}


def test_missing_categories_are_all_named_before_anything_is_fetched(commons, tmp_path):
    categories = {"Gothic": ["Gothik", "Gothic architecture"], "Baroque": ["Renamed"]}
    with pytest.raises(ValueError, match="'Renamed' \\(of Baroque\\); 'Gothik' \\(of Gothic\\)"):
        download(commons, tmp_path, categories=categories)
    assert len(commons.requests) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("contact", [None, " "])
def test_a_contact_is_owed(commons, tmp_path, contact):
    with pytest.raises(ValueError, match="you@example.org"):
        download_commons(tmp_path, CLASSES, contact, api=commons.api, **OPTIONS)
    assert not commons.requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widht": 500}, "'widht'; known options are categories, images_per_class"),
        ({"width": 512}, "width: Input should be 250, 330, 500, 960, 1280 or 1920, got 512"),
        ({"parallel": 0}, "parallel: Input should be greater than 0, got 0"),
        (
            {"categories": {**ASKED, "Gotic": ["x"]}},
            "'Gotic' in source.options.categories is no class of the domain; did you mean 'G",
        ),
        ({"categories": {"Gothic": ["x"]}}, "in source.options.categories for: Baroque; add"),
        ({"categories": {"Gothic": [], "Baroque": ["x"]}}, "for: Gothic; add"),
        (
            {"categories": {"Gothic": ["x"], "Baroque": "x"}},
            "categories.Baroque: Input should be a valid list, got 'x'",
        ),
    ],
)
def test_wrong_options_name_the_remedy(commons, tmp_path, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        download(commons, tmp_path, **options)
    assert not commons.requests


def test_a_site_that_is_gone_or_refuses_stops_the_run(commons, tmp_path):
    with pytest.raises(OSError, match="in each of 6 tries; run the same command again later"):
        download(commons, tmp_path, api="http://127.0.0.1:9/w/api.php")
    commons.fail_always = [("/thumb/", Fault(403))]
    with pytest.raises(PermissionError, match="check that --contact really reaches you"):
        download(commons, tmp_path)
    assert len(commons.to("/thumb/")) <= 4
    commons.fail_always = [("/thumb/", Fault(429))]
    with pytest.raises(ConnectionError, match="HTTP 429 in each of 6 tries; run the same"):
        download(commons, tmp_path)
    assert not rows(tmp_path / "metadata.jsonl")
    assert set(reasons(tmp_path).values()) >= {"not downloaded yet: the run was stopped"}


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ('<div class="fn value">\n<a href="/x">Jörg &quot;J&quot; Ö</a></div>', 'Jörg "J" Ö'),
        ("First<br/>Second<p>Third</p>", "First Second Third"),
        (UNKNOWN, "Unknown author"),
        ("<b>J</b>o, 5 &lt; 6", "Jo, 5 < 6"),
    ],
)
def test_html_becomes_one_line_of_text(html, text):
    assert plain_text(html) == text


def test_the_architecture_domain_has_categories_for_every_class():
    domain = Domain.load(ROOT / "domains" / "architecture")
    assert domain.source.kind == "commons"
    with pytest.raises(ValueError, match="--contact"):
        download_commons(Path("nowhere"), domain.class_names, None, **domain.source.options)
