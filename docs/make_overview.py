"""python docs/make_overview.py runs/facades

Draws the README's pictures. docs/images/overview.png: the first test drawing of each class, right
or wrong, with what base zero-shot and the fine-tuned, calibrated model say. neighbours.png: the
test drawings that base and fine-tuned model find most like the first one of every third class.
"""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from nicheclip.clip import encode_images, load_clip
from nicheclip.domain import Domain
from nicheclip.files import read_json
from nicheclip.run import load_prepared

RIGHT, WRONG, UNSURE = "#0072B2", "#D55E00", "#777777"
NEAREST, EVERY = 5, 3


def overview(run: Path) -> Figure:
    """What base and fine-tuned model say of a drawing of each class."""
    domain, test = Domain.load(run), load_prepared(run)["test"]
    predictions = Dataset.from_parquet(str(run / "predictions.parquet"))
    abstention = read_json(run / "calibration.json", "run calibrate.py first")["abstention"]
    labels = predictions["label"][:]
    figure = Figure(figsize=(14, 6.3), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.1, hspace=0.34, wspace=0.06)
    for axes, name in zip(figure.subplots(2, 6).flat, domain.class_names, strict=True):
        row = predictions[labels.index(name)]
        show(axes, test[labels.index(name)]["image"])
        axes.set_title(name, fontsize=12, fontweight="bold")
        for height, who, column, threshold in (
            (-0.1, "base", "base_probabilities", 0.0),
            (-0.2, "ours", "probabilities", abstention["threshold"]),
        ):
            probability, best = max(zip(row[column], domain.class_names, strict=True))
            answer, colour = best, RIGHT if best == name else WRONG
            if probability < threshold:
                answer, colour = f"not sure ({best}?)", UNSURE
            text = f"{who}: {answer} {probability:.0%}"
            look = {"color": colour, "ha": "center", "fontsize": 9}
            axes.text(0.5, height, text, transform=axes.transAxes, **look)
    return figure


def neighbours(run: Path) -> Figure:
    """What each finds most like a drawing; framed by whether it is of the same class."""
    domain, test = Domain.load(run), load_prepared(run)["test"]
    labels = np.array(test["label"])
    queries = [int(np.argmax(labels == c)) for c in range(0, len(domain.classes), EVERY)]
    figure = Figure(figsize=(14, 1.27 * len(queries) + 0.5), dpi=100)
    parts = figure.subfigures(1, 3, width_ratios=[1.3, NEAREST, NEAREST])
    for part, left in zip(parts, (0.18, 0.03, 0.03), strict=True):
        part.subplots_adjust(left=left, right=0.99, top=0.91, bottom=0.02, hspace=0.07, wspace=0.07)
    for axes, query in zip(parts[0].subplots(len(queries)), queries, strict=True):
        show(axes, test[query]["image"])
        axes.set_ylabel(domain.class_names[labels[query]], fontsize=9, fontweight="bold")
    for part, who, base in ((parts[1], "base", domain.base), (parts[2], "ours", run / "model")):
        model, processor = load_clip(base)
        images = (row["image"] for row in test)
        embeds = encode_images(model, processor, images, len(test), progress=False)  # (N, D)
        cosines = embeds @ embeds.T
        np.fill_diagonal(cosines, -1)
        nearest = np.argsort(-cosines, axis=1)[:, :NEAREST]
        alike = (labels[nearest] == labels[:, None]).mean()
        part.suptitle(f"{who}: {alike:.0%} of the five nearest are of its class", y=0.99)
        grid = part.subplots(len(queries), NEAREST)
        for axes, query, place in zip(
            grid.flat, np.repeat(queries, NEAREST), nearest[queries].flat, strict=True
        ):
            show(axes, test[int(place)]["image"])
            colour = RIGHT if labels[place] == labels[query] else WRONG
            axes.spines[:].set(visible=True, color=colour, linewidth=3)
    return figure


def show(axes: Axes, image: Image.Image) -> None:
    """Draws an image without ticks."""
    axes.imshow(np.asarray(image))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def main(run: Path) -> None:
    """The command line."""
    for draw in (overview, neighbours):
        path = Path(__file__).parent / "images" / f"{draw.__name__}.png"
        draw(run).savefig(path)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
