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
    abstention = read_json(run / "calibration.json", "run calibrate.py first")["abstention"]
    labels = predictions["label"][:]
    figure = Figure(figsize=(14, 6.3), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.1, hspace=0.34, wspace=0.06)
    for axes, name in zip(figure.subplots(2, 6).flat, domain.class_names, strict=True):
        row = predictions[labels.index(name)]
        axes.imshow(np.asarray(test[labels.index(name)]["image"]))
        axes.set_axis_off()
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
    path = Path(__file__).parent / "images" / "overview.png"
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
