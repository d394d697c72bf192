"""Every way of opening a picture: training, classifier, index and app see the same pixels.

image = open_image("photo.jpg")  # upright, RGB
"""

import io
import struct
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

Photo = str | Path | Image.Image | bytes | np.ndarray
# No EPS: Pillow would start Ghostscript on it.
FORMATS = tuple("JPEG PNG GIF WEBP TIFF BMP MPO AVIF JPEG2000 PPM TGA ICO".split())
ORIENTATION = 0x0112  # the EXIF tag
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip  # by the value of that tag
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of what is stored in 16 bits


class UnusableImageError(OSError):
    """It does not decode, or there is still no saying what its pixels mean."""


@cache
def readable_formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(photo: Photo) -> Image.Image:
    """A picture as the model is shown it: upright, in RGB; see `to_rgb`.

    Args:
        photo: a path, a PIL image, the bytes of a file, or a uint8 array (H, W, 3) or (H, W).

    Raises:
        UnusableImageError: an OSError, naming the image that can't be read.
        ValueError: for an address.
        TypeError: for anything else.
    """
    expected = "a path, a PIL image, the bytes of a file, or a uint8 array (H, W, 3) or (H, W)"
    named = f"'{photo}'" if isinstance(photo, str | Path) else f"a {type(photo).__name__}"
    if named.startswith(("'http://", "'https://")):
        raise ValueError(f"{named} is an address; nothing is downloaded here, save it first")
    fits = isinstance(photo, Photo)
    if isinstance(photo, np.ndarray):
        named = f"an array of {photo.dtype}, {photo.shape}"
        fits = photo.dtype == np.uint8 and photo.shape[2:] in ((), (3,))
    if not fits:
        raise TypeError(f"got {named}; expected {expected}")
    try:
        # A picture of twice as many pixels is an error.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            if isinstance(photo, np.ndarray):
                return to_rgb(Image.fromarray(photo))
            if isinstance(photo, Image.Image):
                return to_rgb(photo)
            file = io.BytesIO(photo) if isinstance(photo, bytes) else photo
            with Image.open(file, formats=readable_formats()) as opened:
                return to_rgb(opened)
    # What Pillow raises for a broken file depends on its format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableImageError(f"{named} can't be read as an image: {error}") from error


def to_rgb(image: Image.Image, mended: list[str] | None = None) -> Image.Image:
    """The picture upright, in RGB, 8 bits a channel, what is transparent on white.

    It keeps nothing of what the file says beside the pixels, so that it is turned once only.

    Args:
        mended: is told what had to be done.

    Raises:
        UnusableImageError: for floating-point or 32-bit pixels, whose range is not known.
    """
    mended = [] if mended is None else mended
    image.load()
    if (turn := TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
        mended.append("EXIF orientation")
    if image.mode == "F":
        raise UnusableImageError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        image = _eight_bits(image, mended)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            mended.append("transparency on white")
    elif image.mode not in ("RGB", "L"):
        mended.append(f"{image.mode} to RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error):
        return 1  # EXIF that nobody can read says nothing of the pixels


def _eight_bits(image: Image.Image, mended: list[str]) -> Image.Image:
    """By the range that is used: a camera's 10 or 12 bits would be nearly black as 16."""
    values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 0xFFFF:
        raise UnusableImageError("32-bit pixels, whose range is not known")
    bits = next(depth for depth in BIT_DEPTHS if highest < 1 << depth)
    mended.append(f"{bits} bits to 8" if bits == 16 else f"{bits} bits in 16 to 8")
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """An RGB picture as a JPEG file that says nothing of where it comes from."""
    encoded = io.BytesIO()
    # Without these Pillow passes on what the source says.
    image.save(encoded, "JPEG", quality=quality, comment=b"", exif=b"", icc_profile=None)
    return encoded.getvalue()
