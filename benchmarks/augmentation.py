"""pip install kornia && python -m benchmarks.augmentation

Training views a second, from a stored JPEG of 288 pixels to a normalised batch at 224:
`nicheclip.data.augment`, one image at a time in Pillow, against the same operations batched in
kornia. The sides take turns, on one thread each, as a worker of a data loader runs.
"""

from __future__ import annotations

import argparse
import io
import time

import kornia.augmentation as K  # not a dependency of the project
import numpy as np
import torch
from PIL import Image

from data_prep.sources.painter import STYLES, draw
from nicheclip.domain import Augmentation
from nicheclip.training.data import augment

SIDE = 224


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    how = Augmentation()
    files = []
    for index in range(64):
        encoded = io.BytesIO()
        picture = draw(STYLES[index % len(STYLES)], np.random.default_rng(index), 288).resize(
            (384, 288)
        )
        picture.save(encoded, "JPEG", quality=95)
        files.append(encoded.getvalue())
    batched = torch.nn.Sequential(
        K.RandomResizedCrop((SIDE, SIDE), scale=how.crop_scale, ratio=(3 / 4, 4 / 3)),
        K.RandomHorizontalFlip(how.horizontal_flip),
        K.RandomRotation(how.rotation, p=1.0),
        K.RandomPerspective(2 * how.perspective, p=1.0),
        K.ColorJitter(how.brightness, how.contrast, how.saturation, how.hue, p=1.0),
        K.RandomGrayscale(rgb_weights=torch.tensor([0.299, 0.587, 0.114]), p=how.grayscale),
        K.RandomGaussianBlur((7, 7), (0.1, 2.0), p=how.blur),
    )

    def decode() -> list[Image.Image]:
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]

    def pillow() -> torch.Tensor:
        views = [
            augment(image, SIDE, how, np.random.default_rng(seed))
            for seed, image in enumerate(decode())
        ]
        return (
            torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2)
            / 255
        )

    def kornia() -> torch.Tensor:
        pixels = np.stack([np.asarray(image) for image in decode()])
        return batched(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)

    seconds: dict[str, list[float]] = {"pillow": [], "kornia": []}
    for _ in range(args.rounds + 1):
        for name, side in (("pillow", pillow), ("kornia", kornia)):
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    ratio = np.array(seconds["kornia"][1:]) / np.array(seconds["pillow"][1:])
    for name, values in seconds.items():
        print(f"{name}: {len(files) / np.median(values[1:]):.0f} views a second")
    print(
        f"Pillow is faster by {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}), "
        f"{args.rounds} rounds"
    )


if __name__ == "__main__":
    main()
