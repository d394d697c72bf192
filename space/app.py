"""The app: a photo in, calibrated probabilities or "not sure" out; search and scorecard beside.

build_app("runs/facades/hub").launch(**LAUNCH)
"""

from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from PIL.Image import Image

from nicheclip.classifier import SETTINGS_FILE, NicheClassifier, Prediction
from nicheclip.publishing.image_index import INDEX_FILE, ImageIndex
from space.scorecard import NBSP, percent, read_scorecard, scorecard_tab
from space.search import Shown, captioned, on_photo, photo_input, pictures, search_tab

TOP_CLASSES = 5
ALIKE = 6  # pictures shown beside an answer
MOST_WAITING = 100  # requests; more are told to come back
MOST_NAMED = 4  # classes that a sentence names
OUTSIDE = "**This looks like nothing that the model knows.** The bars below mean nothing for it."
EMPTY = "Add a photo to see what the model makes of it."
# How to ask the model, and this app, from a program.
USAGE = """
The model, on your own machine:

```python
from nicheclip import NicheClassifier

classifier = NicheClassifier.from_pretrained("{}")
print(classifier(["photo.jpg"])[0])
```

This app, with `pip install gradio_client` (the whole list is under “Use via API” below):

```python
from gradio_client import Client, handle_file

client = Client("ADDRESS OF THIS PAGE")
print(client.predict(handle_file("photo.jpg"), api_name="/classify")[0])
```
"""
FONT = ["system-ui", "sans-serif"]
# What `launch` takes instead of `gr.Blocks` since Gradio 6. System fonts: nothing is fetched.
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=FONT),
    "css": """
        .gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto !important; }
        .answer p { font-size: 1.35rem; line-height: 1.4; }
        .scores { overflow-x: auto; }
        .scores table { width: 100%; font-variant-numeric: tabular-nums; }
        .scores :is(table, tr) { border: 0 !important; }
        .scores :is(th, td) { border-width: 0 0 1px !important; overflow-wrap: normal;
            border-color: var(--border-color-primary) !important; word-break: normal; }
        @media (max-width: 640px) {
            .scores :is(th, td) { padding: 0.3rem 0.15rem !important; font-size: 0.7rem; } }
        :is(.examples, .found) .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
        :is(.examples, .found) .grid-container { --least: max(90px, 11%);
            grid-template-columns: repeat(auto-fill, minmax(var(--least), 1fr)) !important; }
        .found .grid-container { --least: max(120px, 15%) !important; }
        .found .grid-wrap { padding-top: 2.2rem; }
        .found:has(.empty) { display: none; }
        :is(.examples, .found) .caption-label { left: 0; max-width: 100%; white-space: normal;
            opacity: 1; }
    """,
    "footer_links": ["api", "gradio", "settings"],
    "run_history": False,
    "max_file_size": "30mb",
}


def build_app(source: str | Path) -> gr.Blocks:
    """The app of a run, a published folder or a repository; it is served by `launch(**LAUNCH)`.

    Raises:
        FileNotFoundError: if there is none such, or it was not published by NicheCLIP.
        ValueError: if another version has published it.
    """
    folder = published(source)
    classifier = NicheClassifier.from_pretrained(folder)
    settings = classifier.settings
    index = ImageIndex(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else None
    measures, gates, told = read_scorecard(folder)
    unnoticed = measures["ood_accepted"]
    hour = (600, 3600)  # visitors' photos are deleted after one
    with gr.Blocks(title=settings["title"], analytics_enabled=False, delete_cache=hour) as app:
        gr.Markdown(
            f"# {settings['title']}\nThis model knows {len(classifier.class_names)} classes and "
            f"nothing else. It says when it is not sure; of {unnoticed.n} other pictures it "
            f"noticed {percent(1 - unnoticed.value)}."
        )
        with gr.Tab("Classify"):
            _classify_tab(
                classifier, index, folder, trained_on=measures["accuracy"].split != "test"
            )
        if index is not None:
            with gr.Tab("Search"):
                search_tab(classifier, index)
        with gr.Tab("Scorecard"):
            scorecard_tab(folder, measures, gates, told)
        with gr.Tab("API"):
            gr.Markdown(USAGE.format(folder if Path(source).is_dir() else source))
    return app.queue(max_size=MOST_WAITING)


def published(source: str | Path) -> Path:
    """The folder of a published model: of a run directory its `hub`, of a repository a download.

    Raises:
        FileNotFoundError: if there is none such.
    """
    if not Path(source).is_dir():
        try:
            patterns = ["*.json", "*.safetensors", "*.txt", "figures/*", "examples/*", "index/*"]
            return Path(snapshot_download(str(source), allow_patterns=patterns))
        except (OSError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            if isinstance(error, RepositoryNotFoundError):
                reason = "no such repository, or none that you may read"
            raise FileNotFoundError(
                f"'{source}' is no folder here and can't be fetched from the Hub ({reason}); "
                "expected a run directory, a published folder or a repo id such as you/your-model"
            ) from error
    for folder in (Path(source), Path(source) / "hub"):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    raise FileNotFoundError(
        f"'{source}' holds no published model; run `python -m model_card {source}` first"
    )


def _classify_tab(
    classifier: NicheClassifier, index: ImageIndex | None, folder: Path, trained_on: bool
) -> None:
    def classify(image: Image) -> tuple[str, dict[str, float], Shown]:
        image_embeds = classifier.image_embeds([image]).numpy()
        prediction = classifier.predict(image_embeds)[0]
        alike = captioned(index.nearest(image_embeds[0], ALIKE)) if index else []
        return answer(prediction), prediction.probabilities, alike

    with gr.Row():
        with gr.Column():
            photo = photo_input("Photo", height=340)
        with gr.Column():
            sentence = gr.Markdown(EMPTY, elem_classes="answer", label="Answer")
            shown = min(TOP_CLASSES, len(classifier.class_names))
            label = f"Calibrated probabilities, {shown} most likely classes"
            bars = gr.Label(num_top_classes=shown, show_heading=False, label=label)
    most_alike = "The published pictures most like yours: class, split, cosine"
    alike = pictures(None, "found", label=most_alike, visible=index is not None)
    on_photo(photo, classify, EMPTY, [sentence, bars, alike], "classify")
    named = [(path, path.stem) for path in sorted((folder / "examples").glob("*.jpg"))]
    if named:
        which = "one of these, trained on" if trained_on else "a test picture, not trained on"
        gr.Markdown(f"Or try {which}; its true class stands below it.")
        gallery = pictures(named, "examples", show_label=False, allow_preview=False)

        # By its place in our own list: the event's path is the visitor's, who could name any file.
        def choose(event: gr.SelectData) -> str:
            return gallery.value[event.index]["image"]["path"]

        gallery.select(choose, None, photo, api_visibility="private")


def answer(prediction: Prediction) -> str:
    """The prediction in words; never "100 %", and two percentages that differ look different."""
    confidence, threshold = prediction.confidence, prediction.threshold
    share = percent(confidence) if confidence < 0.995 else f"over 99{NBSP}%"
    if prediction.outside:
        return OUTSIDE
    if prediction.label is not None:
        others = prediction.prediction_set[1:]
        perhaps = f" It could also be {_either(others)}." if others else ""
        return f"**{prediction.label[0].upper()}{prediction.label[1:]}**, {share}.{perhaps}"
    if 1 < len(prediction.prediction_set) <= MOST_NAMED:
        named = _either(prediction.prediction_set)
        return f"**{named[0].upper()}{named[1:]}.** Not sure which: the best guess has {share}."
    digits = int(percent(confidence) == percent(threshold) or threshold > 0.99)
    return (
        f"**Not sure.** The best guess is {prediction.best} ({percent(confidence, digits)}), "
        f"below the {percent(threshold, digits)} under which this model does not answer."
    )


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
