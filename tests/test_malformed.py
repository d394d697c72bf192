"""Hundreds of damaged and odd files: each is kept or set aside, and nothing crashes or hangs."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from gradio_client import Client, handle_file
from PIL import Image, PngImagePlugin

from domains.facades.painter import STYLES, draw
from nicheclip import NicheClassifier
from nicheclip.domain import Domain
from nicheclip.run import load_prepared
from space.app import LAUNCH, build_app
from space.search import UNREADABLE
from tests.conftest import ROOT, encoded, png, png_chunk

FORMATS = {
    "JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif",
    "JPEG2000": ".jp2", "PPM": ".ppm", "TGA": ".tga", "ICO": ".ico",
}  # fmt: skip
FLIPS, CUTS = 12, 10  # of each format
AT_LEAST = 300
SECONDS = 30  # for one file; a hundred times what the slowest takes
# What Pillow raises for a broken file depends on its format; the app turns these into a sentence.
REFUSALS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def damaged(rng: random.Random, content: bytes, bytes_changed: int) -> bytes:
    changed = bytearray(content)
    for _ in range(bytes_changed):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def corpus(seed: int = 0) -> dict[str, bytes]:
    """Content by file name; the same for the same seed."""
    rng = random.Random(seed)
    pictures = (
        draw(style, np.random.default_rng([seed, n]), 96) for n in range(10**6) for style in STYLES
    )
    files = {}
    for format, suffix in FORMATS.items():
        for n in range(CUTS):
            content = encoded(next(pictures), format)
            files[f"cut-{n}{suffix}"] = content[: rng.randrange(1, len(content))]
        for n in range(FLIPS):
            content = encoded(next(pictures), format)
            files[f"flipped-{n}{suffix}"] = damaged(rng, content, rng.choice([1, 3, 20, 200]))
        content = encoded(next(pictures), format)
        kind, wrong = suffix[1:], rng.choice(list(FORMATS.values()))
        files |= {
            f"head-{kind}{suffix}": damaged(rng, content[:64], 16) + content[64:],
            f"tail-{kind}{suffix}": content + rng.randbytes(5000),
            f"magic-{kind}{suffix}": content[:12],
            f"wrong-{kind}{wrong}": encoded(next(pictures), format),
            f"noname-{kind}": encoded(next(pictures), format),
        }
    return files | {name: content for name, content in odd(rng, pictures)}


def odd(rng: random.Random, pictures: Iterator[Image.Image]) -> Iterator[tuple[str, bytes]]:
    pixels = png_chunk(b"IDAT", zlib.compress(rng.randbytes(3 * 96 * 97)))
    # Bombs: by their header, just below the limit, and hidden in what is no pixel.
    for side in (65535, 2**31 - 1, 20000, 9000):
        yield f"bomb-{side}.png", png(side, side, pixels)
    sides = struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    yield "bomb.gif", b"GIF89a" + sides + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;"
    bmp = encoded(next(pictures), "BMP")
    for name, side in (("bomb.bmp", 60000), ("negative.bmp", -96)):
        yield name, bmp[:18] + struct.pack("<ii", side, side) + bmp[26:]
    yield "bomb.ppm", b"P6 60000 60000 255\n" + rng.randbytes(100)
    zeros = zlib.compress(bytes(64 * 2**20), 9)
    yield (
        "text-bomb.png",
        png(96, 96, png_chunk(b"zTXt", b"a\0\0" + zeros), pixels),
    )
    yield (
        "profile-bomb.png",
        png(96, 96, png_chunk(b"iCCP", b"a\0\0" + zeros), pixels),
    )
    # No sides, or hardly any.
    for width, height in ((0, 0), (0, 96), (96, 0)):
        yield f"side-{width}-{height}.png", png(width, height, pixels)
        yield f"side-{width}-{height}.ppm", f"P6 {width} {height} 255\n".encode()
    for size in ((1, 1), (1, 500), (500, 1), (2, 40000)):
        yield f"thin-{size[0]}-{size[1]}.png", encoded(next(pictures).resize(size), "PNG")
    # No pictures.
    texts = {
        "empty.jpg": b"", "one.png": b"\x89", "nul.jpg": bytes(1000), "text.jpg": b"I am a text.",
        "page.png": b"<html></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "data.json": b"{}",
        "paper.pdf": b"%PDF-1.4\n",
        "print.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n",
        "noise.webp": rng.randbytes(5000),
        "Thumbs.db": rng.randbytes(300), "film.mp4": b"\0\0\0\x18ftypmp42" + rng.randbytes(200),
        "photo.heic": b"\0\0\0\x18ftypheic" + rng.randbytes(200),
        "sound.webp": b"RIFF\x24\0\0\0WAVEfmt ",
    }  # fmt: skip
    yield from texts.items()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(zipfile.ZipInfo("a.jpg"), encoded(next(pictures), "JPEG"))
    yield "archive.jpg", archive.getvalue()
    # What cameras and programs write, rightly or wrongly.
    for orientation in (0, 3, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"orientation-{orientation}.jpg", encoded(next(pictures), "JPEG", exif=exif)
    jpeg = encoded(next(pictures), "JPEG")
    for name, length, content in (
        ("exif-huge.jpg", 65535, 50 * [rng.randbytes(65527)]),
        ("exif-noise.jpg", 108, [rng.randbytes(100)]),
        ("exif-endless.jpg", 65535, [b"MM\0*\0\0\0\x08\xff\xff"]),
    ):
        head = b"\xff\xe1" + struct.pack(">H", length) + b"Exif\0\0"
        yield name, jpeg[:2] + b"".join(head + each for each in content) + jpeg[2:]
    yield "profile-noise.jpg", encoded(next(pictures), "JPEG", icc_profile=rng.randbytes(3000))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 10**6)
    yield "comment.png", encoded(next(pictures), "PNG", pnginfo=text)
    for mode, format in (
        ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "GIF"), ("1", "PNG"),
        ("1", "TIFF"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
        ("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("YCbCr", "TIFF"),
    ):  # fmt: skip
        name = f"mode-{mode.replace(';', '-')}{FORMATS[format]}"
        image = next(pictures)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        yield name, encoded(image if mode == "I;16" else image.convert(mode), format)
    palette = next(pictures).convert("P")
    yield "palette-alpha.png", encoded(palette, "PNG", transparency=bytes(range(256)))
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        frames = [next(pictures) for _ in range(3)]
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        yield f"animated{FORMATS[format]}", content
        yield f"animated-cut{FORMATS[format]}", content[: len(content) // 2]
    yield "blank.png", encoded(Image.new("RGB", (96, 96), "white"), "PNG")
    yield "clear.png", encoded(Image.new("RGBA", (96, 96), (9, 9, 9, 0)), "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of sound photos, and among them the malformed files."""
    folder = tmp_path_factory.mktemp("malformed")
    for number, style in enumerate(STYLES[:2]):
        (folder / style).mkdir()
        for index in range(16):
            picture = draw(style, np.random.default_rng([7, number, index]), 96)
            picture.save(folder / style / f"sound-{index}.png")
    for number, (name, content) in enumerate(corpus().items()):
        (folder / STYLES[number % 2] / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def malformed(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob("*/*")) if not path.name.startswith("sound-")]
    assert len(files) >= AT_LEAST
    return files


def test_data_prep_keeps_each_file_or_says_why_not(folder, malformed, domain: Domain, tmp_path):
    raw = domain.model_dump(mode="json") | {
        "classes": {style: domain.classes[style] for style in STYLES[:2]},
        "clusters": {"arches": list(STYLES[:2])},
        "source": {"kind": "folder", "path": str(folder)},
        "retention": None,
    }
    odd, run = tmp_path / "odd.yaml", tmp_path / "run"
    odd.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [sys.executable, "-m", "data_prep", str(odd), "--run", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10 * SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]

    report = json.loads((run / "data" / "report.json").read_text())
    reasons = {entry["source_id"]: entry["detail"] for entry in report["quarantined"]}
    kept = {name for split in load_prepared(run).values() for name in split["source_id"]}
    dropped = {entry["source_id"] for entry in report["suspects"] if entry["outcome"] == "dropped"}
    files = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    assert report["counts"]["read"] == len(files) == len(reasons) + len(kept) + len(dropped)
    assert set(reasons) | kept | dropped == files
    assert all(reasons.values()), "a reason says what is wrong"
    for split in load_prepared(run).values():
        for row in split:
            assert row["image"].mode == "RGB" and min(row["image"].size) >= domain.smallest_side


def test_the_classifier_refuses_a_file_or_gives_probabilities(malformed, run: Path):
    classifier = NicheClassifier.from_pretrained(run / "hub")
    refused, surprises = [], {}
    with ThreadPoolExecutor(1) as pool:
        for path in malformed:
            try:
                answer = pool.submit(classifier.probabilities, [path]).result(timeout=SECONDS)
                assert np.isfinite(answer).all()
                assert answer.sum() == pytest.approx(1, abs=1e-4)
            except REFUSALS:
                refused.append(path)
            except Exception as error:
                surprises[path.name] = repr(error)
    assert not surprises
    assert len(malformed) / 4 < len(refused) < len(malformed)


@pytest.mark.slow
def test_the_app_has_an_answer_to_every_file(malformed, run: Path):
    app = build_app(run / "hub")
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    client = Client(url, verbose=False, analytics_enabled=False)
    surprises, unread = {}, 0
    for path in malformed:
        try:
            job = client.submit(handle_file(path), api_name="/classify")
            sentence, bars, _ = job.result(timeout=SECONDS)
        except Exception as error:
            surprises[path.name] = repr(error)
            continue
        confidences = [bar["confidence"] for bar in bars.get("confidences") or []]
        unread += sentence == UNREADABLE
        if bool(confidences) == (sentence == UNREADABLE) or not np.isfinite(confidences).all():
            surprises[path.name] = sentence
    app.close()
    assert not surprises
    assert 0 < unread < len(malformed)
