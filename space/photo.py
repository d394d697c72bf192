"""A visitor's photo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from nicheclip.images import open_image

UNREADABLE = "**This file can't be read as a picture.** Try another one: a JPEG, PNG or WebP photo."


def photo_input(label: str, height: int) -> gr.Image:
    """An input for photos, whose event is `on_photo`."""
    sources: list = ["upload", "webcam", "clipboard"]
    return gr.Image(label=label, sources=sources, height=height, buttons=[], alt_text="Your photo")


def on_photo(
    photo: gr.Image,
    told_of: Callable[[Image.Image], tuple],
    nothing: str,
    outputs: list,
    api_name: str,
) -> None:
    """Shows in `outputs`, of which the first is a text, what is told of each photo, or `nothing`.

    Gradio would decode the file itself, with an error message of its own, and re-encode it.
    """
    others = [None] * (len(outputs) - 1)

    def opened(file: dict[str, Any] | None) -> tuple:
        if file is None:
            return nothing, *others
        try:
            image = open_image(file["path"])
        except OSError:
            return UNREADABLE, *others
        return told_of(image)

    options: dict[str, Any] = {"api_name": api_name, "show_progress": "minimal"}
    photo.change(opened, photo, outputs, preprocess=False, **options)
