"""One tiny run through all stages, on the embedded façades and their base, shared by the tests."""

from __future__ import annotations

import copy
import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

# nothing here needs the network; the push tests start clients of their own
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import calibrate  # noqa: E402
import train  # noqa: E402
from data_prep.prepare import prepare  # noqa: E402
from model_card.build import build  # noqa: E402
from nicheclip.domain import Domain
from nicheclip.recipe import recipe

ROOT = Path(__file__).parents[1]
FACADES = ROOT / "domains" / "facades"


def tiny_facades(folder: Path) -> Path:
    """The façades domain with few drawings and the default recipe, short, as a file of its own."""
    raw = yaml.safe_load((FACADES / "domain.yaml").read_text(encoding="utf-8"))
    raw["base"] = str(FACADES / "base")
    raw["source"]["options"] |= {
        "smallest_class": 4, "largest_class": 16, "validation": 4, "calibration": 10, "test": 9,
        "unreadable": 0.04
    }  # fmt: skip
    raw["retention"]["images_per_class"] = 5
    raw["samples_per_class"] = 12
    raw["stages"] = short_recipe()
    raw["training"] = {"per_device_train_batch_size": 24, "disable_tqdm": True}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def short_recipe() -> list[dict[str, Any]]:
    """The default one with fewer epochs, runs and variants."""
    head, visual, text = copy.deepcopy(recipe("default")["stages"])
    head |= {"epochs": 4, "learning_rate": 1e-3, "sampling": "balanced", "batch_size": 48}
    visual |= {"epochs": 2, "learning_rate": 2e-3, "runs": 2, "batch_size": 48, "mix": [0.5, 1.0]}
    text["epochs"] = 3
    return [head, visual, text]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that holds prepared façades only."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    prepare(Domain.load(tiny_facades(tmp_path_factory.mktemp("domain"))), run)
    return run


@pytest.fixture(scope="session")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that went through all stages, up to `run / "hub"`. Don't change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, run)
    train.train([str(run)])
    calibrate.calibrate(run)
    build(run, examples=3, index=["test"])
    return run


@pytest.fixture(scope="session")
def domain(prepared: Path) -> Domain:
    return Domain.load(prepared)


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def shared(name: str) -> Path:
    """Real photographs or models beside the project; the test skips where they are absent."""
    path = ROOT.parent / "shared" / name
    if not path.is_dir():
        pytest.skip(f"needs {name}, which is not kept in the project")
    return path
