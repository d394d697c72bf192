"""Does each file decode? What does is stored upright, in RGB, shrunk to what training needs."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
from PIL import Image, ImageOps

JPEG_QUALITY = 95
HASH_SIDE = 12  # coefficients a side: 64 bits did not tell cropped copies from other drawings of one style, 144 did


def verify_image(row: dict[str, Any], stored_short_side: int) -> dict[str, Any]:
    """Reads, checks and shrinks one file.

    Returns:
        image (encoded bytes for `datasets.Image`), sha256 of the file, phash (144-bit perceptual hash as hex), and
        error: None, or why the file can't be used.
    """
    content = b""
    try:
        content = Path(row["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            as_is = opened.format == "JPEG" and opened.mode == "RGB" and not opened.getexif()
            eight_bits = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if "16" in opened.mode else opened
            image = ImageOps.exif_transpose(eight_bits).convert("RGB")
    # What Pillow raises for a broken file depends on its format.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        reason = "empty file" if not content and not isinstance(error, PermissionError) else first_line
        return {"image": None, "sha256": None, "phash": None, "error": reason}
    if min(image.size) > stored_short_side:
        scale = stored_short_side / min(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        as_is = False
    return {
        "image": {"bytes": content if as_is else _encode(image), "path": None},
        "sha256": hashlib.sha256(content).hexdigest(),
        "phash": str(imagehash.phash(image, hash_size=HASH_SIDE)),
        "error": None,
    }


def _encode(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()
