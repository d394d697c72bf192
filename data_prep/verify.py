"""Does each file decode? What does is stored upright, in RGB, shrunk to what training needs."""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import datasets
import imagehash
from PIL import Image, ImageOps, UnidentifiedImageError

from nicheclip.images import encode_jpeg, readable_formats, to_rgb

VERIFY_VERSION = 4  # to be raised when the same file would be stored or hashed in another way
JPEG_QUALITY = 95
# coefficients a side: 64 bits did not tell cropped copies from other drawings of one style, 144 did
HASH_SIDE = 12
TEXTS = ("sha256", "phash", "mirrored_phash", "mended", "error_kind", "error_detail")
VERIFIED_FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), **dict.fromkeys(TEXTS, datasets.Value("string"))}
)


def verify_rows(
    rows: datasets.Dataset, stored_short_side: int, smallest_side: int
) -> datasets.Dataset:
    """`verify_image` for each row of a source; the columns of `VERIFIED_FEATURES`."""
    verified = [verify_image(row["image"], stored_short_side, smallest_side) for row in rows]
    return datasets.Dataset.from_list(verified, features=VERIFIED_FEATURES)


def verify_image(
    source: dict[str, Any] | None, stored_short_side: int, smallest_side: int = 1
) -> dict[str, Any]:
    """Reads, checks and shrinks one image; its pixels are those of `nicheclip.images.to_rgb`.

    Args:
        source: `path` or `bytes`, as `datasets.Image(decode=False)` gives them.
        stored_short_side: in pixels; a larger image is shrunk to it.
        smallest_side: in pixels; a smaller image is an error.

    Returns:
        image (encoded bytes for `datasets.Image`), sha256 of the file, phash and mirrored_phash
        (144-bit perceptual hashes of the picture and of its mirror image, as hex), mended (what had
        to be done to read it, or None), and why the file can't be used: error_kind, "unreadable",
        "too small" or "blank", and error_detail, both None if it can.
    """
    try:
        found = _verified(source, stored_short_side, smallest_side)
    except UnidentifiedImageError:
        found = {"error_kind": "unreadable", "error_detail": "not an image"}
    except Exception as error:  # decoders raise nearly anything for a broken file
        told = (str(error) or type(error).__name__).splitlines()[0]
        found = {"error_kind": "unreadable", "error_detail": told}
    return dict.fromkeys(VERIFIED_FEATURES) | found


def _verified(
    source: dict[str, Any] | None, stored_short_side: int, smallest_side: int
) -> dict[str, Any]:
    if source is None:
        raise ValueError("the row has no image")
    content = source["bytes"] if source["bytes"] is not None else Path(source["path"]).read_bytes()
    if not content:
        raise ValueError("empty file")
    mended: list[str] = []
    # A picture of twice as many pixels is an error.
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        with Image.open(io.BytesIO(content), formats=readable_formats()) as opened:
            (width, height), short_side = opened.size, min(opened.size)
            if short_side < smallest_side:
                told = f"{width} x {height} px, expected at least {smallest_side} on the short side"
                return {"error_kind": "too small", "error_detail": told}
            # Of an MPO the others are previews.
            if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
                mended.append("first frame of an animation")
            plain = opened.format == "JPEG" and opened.mode == "RGB"
            enough = [side * stored_short_side // short_side + 1 for side in opened.size]
            opened.draft("RGB", (enough[0], enough[1]))
            image = to_rgb(opened, mended)
            # They may tell where and by whom it was taken.
            private = {"exif", "xmp", "comment", "photoshop"} & set(opened.info)
    as_is = plain and short_side <= stored_short_side and not mended and not private
    if min(image.size) > stored_short_side:
        scale = stored_short_side / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image.getcolors(maxcolors=1):
        return {"error_kind": "blank", "error_detail": "every pixel has the same colour"}
    side = 4 * HASH_SIDE  # to which imagehash shrinks
    small = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    stored = content if as_is else encode_jpeg(image, JPEG_QUALITY)
    return {
        "image": {"bytes": stored, "path": None},
        "sha256": hashlib.sha256(content).hexdigest(),
        "phash": str(imagehash.phash(small, hash_size=HASH_SIDE)),
        "mirrored_phash": str(imagehash.phash(ImageOps.mirror(small), hash_size=HASH_SIDE)),
        "mended": "; ".join(mended) or None,
    }
