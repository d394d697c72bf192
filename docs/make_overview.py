"""python docs/make_overview.py runs/facades

Draws docs/images/overview.png, the README's picture: one test drawing of each class, with what base
zero-shot and the fine-tuned, calibrated model say. The first of each class is taken, right or
wrong.
"""

import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

from nicheclip.domain import Domain
from nicheclip.files import read_json
from nicheclip.run import load_prepared

RIGHT, WRONG, UNSURE = "#0072B2", "#D55E00", "#777777"


def main(run: Path) -> None:
    """The command line."""
    domain, test = Domain.load(run), load_prepared(run)["test"]
    predictions = Dataset.from_parquet(str(run / "predictions.parquet"))
    threshold = read_json(run / "calibration.json", "run calibrate.py first")["abstention"][
        "threshold"
    ]
    labels = predictions["label"][:]
    figure = Figure(figsize=(14, 6.3), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.1, hspace=0.34, wspace=0.06)
    for axes, name in zip(figure.subplots(2, 6).flat, domain.class_names, strict=True):
        row = labels.index(name)
        axes.imshow(np.asarray(test[row]["image"]))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(name, fontsize=12, fontweight="bold")
        lines = [
            ("base", predictions[row]["base_probabilities"]),
            ("ours", predictions[row]["probabilities"]),
        ]
        for height, (who, probabilities) in zip((-0.1, -0.2), lines, strict=True):
            best = int(np.argmax(probabilities))
            unsure = who == "ours" and probabilities[best] < threshold
            answer = (
                f"not sure ({domain.class_names[best]}?)" if unsure else domain.class_names[best]
            )
            colour = UNSURE if unsure else RIGHT if domain.class_names[best] == name else WRONG
            text = f"{who}: {answer} {probabilities[best]:.0%}"
            axes.text(
                0.5, height, text, color=colour, ha="center", fontsize=9, transform=axes.transAxes
            )
    path = Path(__file__).parent / "images" / "overview.png"
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
