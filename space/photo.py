"""A visitor's photo."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from nicheclip.images import open_image

UNREADABLE = "**This file can't be read as a picture.** Try another one: a JPEG, PNG or WebP photo."


def photo_input(label: str, height: int) -> gr.Image:
    """An input for photos; its events take `preprocess=False` and `open_photo`.

    Gradio would decode the file itself, with an error message of its own, and re-encode it.
    """
    return gr.Image(
        label=label,
        sources=["upload", "webcam", "clipboard"],
        height=height,
        buttons=[],
        alt_text="Your photo",
    )


def open_photo(photo: dict[str, Any]) -> Image.Image | None:
    """The picture of what `photo_input` gives, as training saw it; None if it can't be read."""
    try:
        return open_image(photo["path"])
    except OSError:
        return None
