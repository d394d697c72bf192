"""The tab that looks for pictures, by words or by a photo; the pictures beside an answer."""

from __future__ import annotations

import hashlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from nicheclip.classifier import NicheClassifier
from nicheclip.publishing.image_index import INDEX_FILE, Found, ImageIndex
from space.photo import UNREADABLE, open_photo, photo_input

FOUND = 12
LONGEST_QUERY = 300  # characters; CLIP reads some 60 words
NOTHING_ASKED = "Describe in words what you look for, or add a photo."
Shown = list[tuple[Path, str]]


def open_index(folder: Path) -> ImageIndex | None:
    """The index of a published folder; None if it was published without one."""
    return ImageIndex(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else None


def search_tab(classifier: NicheClassifier, index: ImageIndex) -> None:
    """Lays out the tab, inside of a `gr.Tab`."""

    def by_words(words: str) -> tuple[str, Shown]:
        words = words.strip()
        if not words:
            return NOTHING_ASKED, []
        return f"The {min(FOUND, len(index))} pictures most like “{words}”:", nearest(
            classifier.text_embeds([words])
        )

    def by_photo(photo: dict[str, Any] | None) -> tuple[str, Shown]:
        if photo is None:
            return NOTHING_ASKED, []
        image = open_photo(photo)
        if image is None:
            return UNREADABLE, []
        return f"The {min(FOUND, len(index))} pictures most like your photo:", nearest(
            classifier.image_embeds([image])
        )

    def nearest(embeds: Any) -> Shown:
        return captioned(index.nearest(embeds.cpu().numpy(), FOUND)[0])

    gr.Markdown(
        f"Looks through {len(index)} published pictures with the fine-tuned model. It orders them "
        "by likeness and always finds something, whether or not what you describe is there."
    )
    with gr.Row():
        with gr.Column(scale=2):
            first_prompt = classifier.settings["prompts"][classifier.class_names[0]][0]
            words = gr.Textbox(
                label="In words",
                placeholder=f"for example: {first_prompt}",
                max_length=LONGEST_QUERY,
                submit_btn="Search",
            )
        with gr.Column(scale=1):
            photo = photo_input("Or by a photo", height=180)
    told = gr.Markdown(NOTHING_ASKED, label="What was looked for")
    gallery = pictures("Found: class, split, cosine")
    words.submit(by_words, words, [told, gallery], api_name="search", show_progress="minimal")
    photo.change(
        by_photo,
        photo,
        [told, gallery],
        preprocess=False,
        api_name="search_by_photo",
        show_progress="minimal",
    )


def pictures(label: str, **options: Any) -> gr.Gallery:
    """Where `captioned` pictures are shown; nothing is seen of it while there are none."""
    return gr.Gallery(
        label=label, height="auto", elem_classes="found", interactive=False, buttons=[], **options
    )


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="nicheclip-"))


def captioned(found: list[Found]) -> Shown:
    """Each picture, as a file, with its class, its split, how alike it is, and whose it is.

    As files, written once: Gradio would write a PIL image anew for each visitor, under the feet of
    those who load it.
    """
    folder, shown = _folder(), []
    for each in found:
        path = folder / f"{hashlib.sha256(each.jpeg).hexdigest()[:24]}.jpg"
        if not path.is_file():
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as unfinished:
                unfinished.write(each.jpeg)
            Path(unfinished.name).rename(path)
        parts = (each.label, each.split, f"{each.cosine:.2f}", each.attribution)
        shown.append((path, " · ".join(part for part in parts if part)))
    return shown
