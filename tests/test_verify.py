"""What can be read rightly is; what can't is set aside with the reason."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_prep.verify import verify_image
from domains.facades.painter import draw
from tests.conftest import encoded, png, png_chunk


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return draw("tudor", np.random.default_rng(0), 96)


def verify(content: bytes, **options: Any) -> dict[str, Any]:
    return verify_image({"bytes": content, "path": None}, **({"stored_short_side": 96} | options))


def stored(verified: dict[str, Any]) -> Image.Image:
    assert verified["error_kind"] is None
    return Image.open(io.BytesIO(verified["image"]["bytes"]))


def difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).mean())


@pytest.mark.parametrize(
    ("mode", "format", "mended"),
    [
        ("RGB", "PNG", None),
        ("RGB", "WEBP", None),
        ("RGB", "BMP", None),
        ("L", "JPEG", None),
        ("CMYK", "JPEG", "CMYK to RGB"),
        ("P", "GIF", "P to RGB"),
        ("P", "PNG", "P to RGB"),
        ("1", "PNG", "1 to RGB"),
        ("LAB", "TIFF", "LAB to RGB"),
    ],
)
def test_every_colour_model_is_stored_as_rgb(picture, mode, format, mended):
    source = picture.convert("RGB").convert(mode) if mode != "LAB" else to_lab(picture)
    verified = verify(encoded(source, format))
    assert verified["mended"] == mended
    image = stored(verified)
    assert (image.mode, image.format, image.size) == ("RGB", "JPEG", (96, 96))
    if mode not in ("1", "L"):
        assert difference(image, picture) < 12


def to_lab(picture: Image.Image) -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")


def test_a_small_jpeg_is_kept_as_it_is(picture):
    content = encoded(picture, "JPEG", quality=90)
    assert verify(content)["image"]["bytes"] == content


def test_what_a_camera_notes_is_not_passed_on(picture):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    verified = verify(encoded(picture, "JPEG", exif=exif))
    assert verified["mended"] is None
    assert not stored(verified).getexif()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_put_on_white(picture, mode):
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    half = clear.copy()
    half.paste(picture, (0, 0, 96, 96), Image.new("L", (96, 96), 0))
    half.paste(picture.crop((0, 0, 48, 96)).convert("RGBA"), (0, 0))
    # PNG has no PA: its palettes have transparency of their own
    half = half.quantize() if mode == "PA" else half.convert(mode)
    verified = verify(encoded(half, "PNG"))
    assert verified["mended"] == "transparency on white"
    pixels = np.asarray(stored(verified))
    assert pixels[:, 60:].min() > 245
    assert pixels[:, :40].mean() < 235


def test_an_opaque_alpha_channel_is_nothing_to_mend(picture):
    assert verify(encoded(picture.convert("RGBA"), "PNG"))["mended"] is None


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(picture, format):
    others = [Image.new("RGB", picture.size, colour) for colour in ("red", "blue")]
    verified = verify(encoded(picture, format, save_all=True, append_images=others))
    assert "first frame of an animation" in verified["mended"]
    assert difference(stored(verified), picture) < 15


def test_rotated_photos_are_stored_upright(picture):
    """How each orientation is turned is tested where pictures are opened."""
    upright, exif = picture.crop((0, 0, 96, 64)), Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    verified = verify(encoded(turned, "JPEG", quality=95, exif=exif))
    assert verified["mended"] == "EXIF orientation"
    assert difference(stored(verified), upright) < 4


def test_sixteen_bits_keep_their_tones():
    tones = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    verified = verify(encoded(Image.fromarray(tones), "PNG"))
    assert verified["mended"] == "16 bits to 8"
    expected = Image.fromarray((tones >> 8).astype(np.uint8))
    assert difference(stored(verified).convert("L"), expected) < 2


def test_large_images_are_shrunk_and_small_ones_are_not_enlarged(picture):
    large = picture.resize((1600, 1200), Image.Resampling.BICUBIC)
    assert stored(verify(encoded(large, "JPEG"), stored_short_side=288)).size == (384, 288)
    same = verify(encoded(picture, "PNG"), stored_short_side=288, smallest_side=96)
    assert stored(same).size == (96, 96)
    exact = large.resize((384, 288), Image.Resampling.LANCZOS)
    shrunk = stored(verify(encoded(large, "JPEG", quality=95), stored_short_side=288))
    assert difference(shrunk, exact) < 2


def test_the_content_counts_and_not_the_name(picture, tmp_path):
    for name in ("image.txt", "image.png", "image"):
        (tmp_path / name).write_bytes(encoded(picture, "JPEG"))
        verified = verify_image({"path": str(tmp_path / name), "bytes": None}, stored_short_side=96)
        assert stored(verified).size == (96, 96)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims to be that large and holds next to nothing."""
    return png(width, height, png_chunk(b"IDAT", zlib.compress(bytes(1000))))


def broken(picture: Image.Image) -> dict[str, tuple[bytes, str]]:
    jpeg, png, gif, webp = (encoded(picture, format) for format in ("JPEG", "PNG", "GIF", "WEBP"))
    tiff = encoded(picture.convert("F"), "TIFF")
    thin = encoded(picture.resize((80, 12)), "PNG")
    grey = encoded(Image.new("RGB", (96, 96), "grey"), "JPEG")
    too_many = "unreadable: Image size (3600000000 pixels) exceeds limit"
    return {
        "empty": (b"", "unreadable: empty file"),
        "text": (b"no image at all", "unreadable: not an image"),
        "html": (b"<html><body>404</body></html>", "unreadable: not an image"),
        "jpeg head only": (jpeg[:200], "unreadable:"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "unreadable: image file is truncated"),
        "half a png": (png[: len(png) // 2], "unreadable:"),
        "half a gif": (gif[: len(gif) // 2], "unreadable:"),
        "half a webp": (webp[: len(webp) // 2], "unreadable:"),
        "garbled png": (png[:100] + bytes(60) + png[160:], "unreadable:"),
        "bomb": (png_of_size(60_000, 60_000), too_many),
        "floats": (tiff, "unreadable: floating-point pixels"),
        "tiny": (thin, "too small: 80 x 12 px, expected at least 32"),
        "blank": (grey, "blank: every pixel has the same colour"),
    }


@pytest.mark.parametrize("name", broken(Image.new("RGB", (96, 96))))
def test_what_is_of_no_use_is_set_aside_with_the_reason(picture, name):
    content, reason = broken(picture)[name]
    verified = verify(content, smallest_side=32)
    assert verified["image"] is None
    assert f"{verified['error_kind']}: {verified['error_detail']}".startswith(reason)


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    gone = {"path": str(tmp_path / "gone.jpg"), "bytes": None}
    verified = verify_image(gone, stored_short_side=96)
    assert "No such file" in verified["error_detail"]


def test_a_large_photo_is_no_bomb(picture):
    """120 megapixels are much, and still a photo."""
    content = encoded(Image.new("L", (12_000, 10_000), 200), "JPEG")
    assert verify(content)["error_kind"] == "blank"


def test_equal_files_have_equal_hashes_wherever_they_lie(picture, tmp_path: Path):
    content = encoded(picture, "JPEG")
    (tmp_path / "a.jpg").write_bytes(content)
    from_path = verify_image({"path": str(tmp_path / "a.jpg"), "bytes": None}, stored_short_side=96)
    assert from_path == verify(content)


@pytest.mark.parametrize("length", [40, 10**6])
def test_a_comment_is_not_passed_on_however_long(picture, length):
    """One of a megabyte fits into no JPEG."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * length)
    assert "comment" not in stored(verify(encoded(picture, "PNG", pnginfo=text))).info
