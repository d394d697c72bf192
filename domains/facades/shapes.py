"""A retention task beside the façades: which colour is the shape? The classes are colours.

Circles, triangles, squares and hexagons, in every colour alike, on grey ground. The base of the
façades knows the names of colours, from walls, and those of shapes it has never read; so colours
are what it can forget.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nicheclip.domain import Domain
from nicheclip.files import replaced_folder

COLOURS = {
    "red": (196, 56, 48), "pink": (236, 160, 176), "brown": (124, 82, 54), "yellow": (232, 198, 70),
    "green": (84, 150, 76), "blue": (66, 104, 184), "grey": (128, 128, 128),
    "white": (244, 244, 244),
}  # fmt: skip
CORNERS = (48, 3, 4, 6)  # of the shapes; 48 are a circle
COLOUR_SPREAD = 12.0  # standard deviation of the colour of a shape, of 255
SIZE = 96  # pixels
GRAIN = 5.0  # standard deviation of the noise in each pixel
SUPERSAMPLING = 3


def write_images(folder: Path, domain: Domain, seed: int) -> Path:
    """Draws `folder`/<colour>/*.png for the retention task; the same seed draws the same.

    Raises:
        ValueError: if a class of the task is no colour of `COLOURS`.
    """
    task = domain.retention
    assert task is not None  # it is what names this module
    if unknown := sorted(set(task.classes) - set(COLOURS)):
        colours = ", ".join(COLOURS)
        raise ValueError(f"no shape is '{unknown[0]}'; classes of retention may be {colours}")
    with replaced_folder(folder) as unfinished:
        for colour in task.classes:
            (unfinished / colour).mkdir()
            for index in range(task.images_per_class):
                rng = np.random.default_rng([seed, list(COLOURS).index(colour), index])
                picture = _draw(COLOURS[colour], CORNERS[index % len(CORNERS)], rng)
                picture.save(unfinished / colour / f"{index:04d}.png")
    return folder


def _draw(colour: tuple[int, int, int], corners: int, rng: np.random.Generator) -> Image.Image:
    """One shape near the middle, RGB (SIZE, SIZE)."""
    fill = np.clip(np.array(colour) + rng.normal(0, COLOUR_SPREAD, 3), 0, 255)
    ground = rng.integers(70, 220)
    while abs(fill.mean() - ground) < 35:  # else a grey shape could not be seen
        ground = rng.integers(70, 220)
    side = SUPERSAMPLING * SIZE
    image = Image.new("RGB", (side, side), (int(ground),) * 3)
    radius, (x, y) = side * rng.uniform(0.26, 0.42), side * rng.uniform(0.42, 0.58, 2)
    turn = rng.uniform(0, math.tau)
    angles = [turn + math.tau * corner / corners for corner in range(corners)]
    outline = [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
    ImageDraw.Draw(image).polygon(outline, tuple(int(value) for value in fill))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    grained = pixels + rng.normal(0, GRAIN, pixels.shape)
    return Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8))
