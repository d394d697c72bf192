"""Does each file decode? What does is stored upright, in RGB, shrunk to what training needs."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import datasets
import imagehash
from PIL import Image, ImageOps, UnidentifiedImageError

from nicheclip.images import encode_jpeg, readable_formats, to_rgb

VERIFY_VERSION = 4  # to be raised when the same file would be stored or hashed in another way
JPEG_QUALITY = 95
# coefficients a side: 64 bits did not tell cropped copies from other drawings of one style, 144 did
HASH_SIDE = 12
VERIFIED_FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        **{
            name: datasets.Value("string")
            for name in ("sha256", "phash", "mirrored_phash", "mended", "error")
        },
    }
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
    """Reads, checks and shrinks one image.

    The first frame of an animation is taken, EXIF orientation is applied, transparent pixels are
    put on white, 16 bits become 8, and any colour model becomes RGB.

    Args:
        source: `path` or `bytes`, as `datasets.Image(decode=False)` gives them.
        stored_short_side: in pixels; a larger image is shrunk to it.
        smallest_side: in pixels; a smaller image is an error.

    Returns:
        image (encoded bytes for `datasets.Image`), sha256 of the file, phash and mirrored_phash
        (144-bit perceptual hashes of the picture and of its mirror image, as hex), mended (what had
        to be done to read it, or None) and
        error: None, or why the file can't be used: "unreadable", "too small" or "blank", a colon,
            and the particulars.
    """
    if source is None:
        return _quarantined("unreadable: the row has no image")
    try:
        file = (
            io.BytesIO(source["bytes"])
            if source["bytes"] is not None
            else open(source["path"], "rb")
        )
        with file, warnings.catch_warnings():
            # twice as large is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if not file.read(1):
                return _quarantined("unreadable: empty file")
            file.seek(0)
            with Image.open(file, formats=readable_formats()) as opened:
                image, mended, as_is = _read(opened, stored_short_side, smallest_side)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            content = file.read() if as_is else None
    except UnidentifiedImageError:
        return _quarantined("unreadable: not an image")
    except _UnusableError as error:
        return _quarantined(str(error))
    # decoders raise nearly anything for a broken file; the reason is kept
    except Exception as error:
        return _quarantined(f"unreadable: {(str(error) or type(error).__name__).splitlines()[0]}")
    side = 4 * HASH_SIDE  # to which imagehash shrinks
    small = image.convert("L").resize((side, side), Image.Resampling.LANCZOS)
    return {
        "image": {"bytes": content or encode_jpeg(image, JPEG_QUALITY), "path": None},
        "sha256": digest,
        "phash": str(imagehash.phash(small, hash_size=HASH_SIDE)),
        "mirrored_phash": str(imagehash.phash(ImageOps.mirror(small), hash_size=HASH_SIDE)),
        "mended": "; ".join(mended) or None,
        "error": None,
    }


class _UnusableError(Exception):
    """The file decodes, and is still of no use; the message is the reason."""


def _quarantined(reason: str) -> dict[str, Any]:
    return {
        "image": None,
        "sha256": None,
        "phash": None,
        "mirrored_phash": None,
        "mended": None,
        "error": reason,
    }


def _read(
    opened: Image.Image, stored_short_side: int, smallest_side: int
) -> tuple[Image.Image, list[str], bool]:
    """The image as it is stored, what was mended, and whether the file can be stored as it is."""
    mended = []
    width, height = opened.size
    short_side = min(opened.size)
    if short_side < smallest_side:
        raise _UnusableError(
            f"too small: {width} x {height} px, expected at least {smallest_side} on the short side"
        )
    # of an MPO the others are previews
    if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
        mended.append("first frame of an animation")
    as_is = opened.format == "JPEG" and opened.mode == "RGB" and short_side <= stored_short_side
    opened.draft(
        "RGB",
        (width * stored_short_side // short_side + 1, height * stored_short_side // short_side + 1),
    )
    image = to_rgb(opened, mended)
    # may tell where and by whom it was taken
    private = {"exif", "xmp", "comment", "photoshop"} & set(opened.info)
    as_is = as_is and not mended and not private
    if min(image.size) > stored_short_side:
        scale = stored_short_side / min(image.size)
        image = image.resize(
            [max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC
        )
    if image.getcolors(maxcolors=1):
        raise _UnusableError("blank: every pixel has the same colour")
    return image, mended, as_is
