"""A picture has the same pixels in training and in use, whatever file it comes in."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data_prep.verify import verify_image
from nicheclip.images import UnusableImageError, open_image, to_rgb
from tests.conftest import encoded

SIDE = 64


def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def with_alpha() -> Image.Image:
    """Black where it is transparent: what must not be seen."""
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[16:48, 16:48] = 255
    return Image.fromarray(np.dstack([np.array(picture()) * (alpha[..., None] > 0), alpha]))


def grey(bits: int) -> Image.Image:
    """16-bit pixels of which a camera has used `bits`."""
    values = np.asarray(picture().convert("L")).astype(np.uint16)
    return Image.fromarray((values << (bits - 8)) + (values >> (16 - bits)))


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB")


TURNED = Image.Exif()
TURNED[0x0112] = 6
FILES = {
    "1": encoded(picture().convert("1"), "PNG"),
    "L": encoded(picture().convert("L"), "PNG"),
    "P": encoded(picture().convert("P"), "GIF"),
    "RGB": encoded(picture(), "PNG"),
    "RGBA": encoded(with_alpha(), "PNG"),
    "RGBA WebP": encoded(with_alpha(), "WEBP", lossless=True),
    "LA": encoded(with_alpha().convert("LA"), "PNG"),
    "PA": encoded(with_alpha().quantize(64), "PNG"),
    "CMYK": encoded(picture().convert("CMYK"), "TIFF"),
    "CMYK JPEG": encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "LAB": encoded(lab(), "TIFF"),
    "16 bits PNG": encoded(grey(16), "PNG"),
    "16 bits TIFF": encoded(grey(16), "TIFF"),
    "12 bits": encoded(grey(12), "PNG"),
    "10 bits": encoded(grey(10), "TIFF"),
    "turned": encoded(picture(), "JPEG", quality=95, exif=TURNED),
}


@pytest.mark.parametrize("name", FILES)
def test_training_and_use_see_the_same(name):
    stored = verify_image({"bytes": FILES[name], "path": None}, SIDE)
    assert stored["error_kind"] is None
    trained, used = (  # without what JPEG loses
        np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
        for image in (open_image(stored["image"]["bytes"]), open_image(FILES[name]))
    )
    assert np.abs(trained - used).mean() < 4


@pytest.mark.parametrize("name", ["RGBA", "RGBA WebP", "LA", "PA"])
def test_what_is_transparent_is_white(name):
    pixels = np.asarray(open_image(FILES[name]))
    assert (pixels[:16] == 255).all()
    assert pixels[16:48, 16:48].mean() < 200


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_pixels_keep_their_brightness(bits):
    expected = np.asarray(picture().convert("L"), float)
    found = np.asarray(open_image(encoded(grey(bits), "PNG")), float)[..., 0]
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "La",
                                  "PA", "RGBX", "RGBa", "LAB", "I;16"])  # fmt: skip
def test_every_mode_in_memory_becomes_rgb(mode):
    match mode:
        case "I;16":
            image = grey(16)
        case "LAB":
            image = lab()
        case "La":
            image = picture().convert("LA").convert("La")
        case "RGBa":
            image = picture().convert("RGBA").convert("RGBa")
        case "PA":
            image = picture().convert("P").convert("PA")
        case _:
            image = picture().convert(mode)
    assert image.mode == mode
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", (SIDE, SIDE))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_what_pillow_makes_of_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture().resize((30, 10)), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    upright = open_image(file)
    assert np.array_equal(upright, expected)
    assert np.array_equal(open_image(upright), expected)  # not turned a second time


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_that_nobody_can_read_is_passed_over(format):
    """Browsers show such a picture, and so does the app, which opens what was opened before."""
    file = encoded(picture(), format, exif=b"Exif\0\0" + bytes(range(50, 150)))
    once = open_image(file)
    assert np.array_equal(open_image(once), once)


@pytest.mark.parametrize(
    "pixels", [np.full((9, 9), 0.5, np.float32), np.full((9, 9), 1 << 20, np.int32)]
)
def test_pixels_of_unknown_range_are_refused(pixels):
    with pytest.raises(UnusableImageError, match="range is not known"):
        to_rgb(Image.fromarray(pixels))
