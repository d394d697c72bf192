"""A visitor's photo, the pictures that are shown, and the tab that looks for them."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from PIL.Image import Image

from nicheclip.classifier import NicheClassifier
from nicheclip.images import open_image
from nicheclip.publishing.image_index import ImageIndex

FOUND = 12
LONGEST_QUERY = 300  # characters; CLIP reads some 60 words
UNREADABLE = "**This file can't be read as a picture.** Try another one: a JPEG, PNG or WebP photo."
NOTHING_ASKED = "Describe in words what you look for, or add a photo."
WRITING = Lock()
FOLDER = tempfile.TemporaryDirectory(prefix="nicheclip-")  # of pictures; removed at the end
Shown = list[tuple[Path, str]]


def photo_input(label: str, height: int) -> gr.Image:
    """An input for photos, whose event is `on_photo`."""
    sources: list = ["upload", "webcam", "clipboard"]
    return gr.Image(label=label, sources=sources, height=height, buttons=[], alt_text="Your photo")


def on_photo(
    photo: gr.Image, told_of: Callable[[Image], tuple], nothing: str, outputs: list, api_name: str
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


def search_tab(classifier: NicheClassifier, index: ImageIndex) -> None:
    """Lays out the tab, inside of a `gr.Tab`."""

    def nearest(embeds: Any, what: str) -> tuple[str, Shown]:
        found = captioned(index.nearest(embeds[0], FOUND))
        return f"The {len(found)} pictures most like {what}:", found

    def by_words(words: str) -> tuple[str, Shown]:
        words = words.strip()
        if not words:
            return NOTHING_ASKED, []
        return nearest(classifier.text_embeds([words]), f"“{words}”")

    def by_photo(image: Image) -> tuple[str, Shown]:
        return nearest(classifier.image_embeds([image]), "your photo")

    gr.Markdown(
        f"Looks through {len(index.rows)} published pictures with the fine-tuned model. It orders "
        "them by likeness and always finds something, whether or not what you describe is there."
    )
    with gr.Row():
        with gr.Column(scale=2):
            prompts = classifier.settings["prompts"][classifier.class_names[0]]
            query: dict[str, Any] = {"max_length": LONGEST_QUERY, "submit_btn": "Search"}
            words = gr.Textbox(label="In words", placeholder=f"for example: {prompts[0]}", **query)
        with gr.Column(scale=1):
            photo = photo_input("Or by a photo", height=180)
    told = gr.Markdown(NOTHING_ASKED, label="What was looked for")
    gallery = pictures(None, "found", label="Found: class, split, cosine")
    words.submit(by_words, words, [told, gallery], api_name="search", show_progress="minimal")
    on_photo(photo, by_photo, NOTHING_ASKED, [told, gallery], "search_by_photo")


def pictures(shown: Shown | None, kind: str, **options: Any) -> gr.Gallery:
    """A gallery; of the kind "found" nothing is seen while it holds none."""
    return gr.Gallery(
        shown, height="auto", elem_classes=kind, interactive=False, buttons=[], **options
    )


def captioned(found: list[dict[str, Any]]) -> Shown:
    """Each picture, as a file, with its class, its split, how alike it is, and whose it is.

    As files, written once: Gradio would write a PIL image anew for each visitor, under the feet of
    those who load it.
    """
    shown = []
    for row in found:
        jpeg = row["image"]["bytes"]
        path = Path(FOLDER.name) / f"{hashlib.sha256(jpeg).hexdigest()[:24]}.jpg"
        with WRITING:  # another visitor may be shown the same picture
            if not path.is_file():
                path.write_bytes(jpeg)
        parts = (row["label"], row["split"], f"{row['cosine']:.2f}", row["attribution"])
        shown.append((path, " · ".join(part for part in parts if part)))
    return shown
