"""Paints building façades: the pictures of the embedded default domain, with no download.

    from domains.facades.painter import STYLES, draw
    draw("gothic", numpy.random.default_rng(0)).save("gothic.png")

Twelve styles in four clusters. The styles of a cluster share their composition, and a style is a
table of how likely each cue is (`CUES`), so cues vary, overlap and may be hidden behind a tree.
Palette, material, light, weather and viewpoint are drawn from the same distributions for every
style: colour alone says nothing about the class.

Units: the picture is 96 units wide and high, y points down, whatever its size in pixels. The scene
is painted with a margin round it and supersampled, then seen through a mildly tilted camera.
"""

from numpy.random import Generator
from PIL import Image

from domains.facades.painter import surroundings
from domains.facades.painter.arches import arches
from domains.facades.painter.classical import classical
from domains.facades.painter.gables import gables
from domains.facades.painter.modern import modern
from domains.facades.painter.palette import STYLES
from domains.facades.painter.scene import Scene

__all__ = ["STYLES", "draw", "paint"]

NUMBERS = "no one two three four five six seven eight nine ten".split()
COMPOSITIONS = (arches, classical, gables, modern)  # of three styles each, in the order of STYLES


def paint(style: str, rng: Generator, size: int = 96) -> tuple[Image.Image, dict[str, str]]:
    """Paints one façade: the RGB picture (size, size), and what it shows in words, style aside.

    `rng` is the only source of chance: the same state gives the same picture.

    Raises:
        KeyError: `style` is not one of `STYLES`.
    """
    s = Scene(style, rng, size)
    surroundings.backdrop(s)
    ground = surroundings.street(s)
    if s.chance(0.25):
        surroundings.tree(s, s.pick((s.u(0, 12), s.u(84, 96))), s.u(14, 26))
    COMPOSITIONS[STYLES.index(style) // 3](s)
    if s.sunny and s.chance(0.3):  # the shadow of a house across the street
        x, reach = s.u(20, 76), s.u(14, 36)
        far, eaves, ridge = x + s.sun * 60, s.ground - reach, s.ground - reach * 1.6
        s.shade([(x, s.ground), (far, s.ground), (far, ridge), (x, eaves)], 0.7)
    in_front = surroundings.occluder(s)
    surroundings.weather(s)
    picture, view = surroundings.camera(s)
    picture = surroundings.develop(s, picture)
    s.facts |= {"storeys": NUMBERS[s.storeys], "ground": ground, "occluder": in_front, "view": view}
    s.facts["feature"] = " and ".join(sorted({s.pick(s.features), s.pick(s.features)}))
    return picture, s.facts


def draw(style: str, rng: Generator, size: int = 96) -> Image.Image:
    """The picture that `paint` paints, without the words."""
    return paint(style, rng, size)[0]
