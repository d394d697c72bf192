"""The canvas of one picture: chance, light, and the parts that all buildings share."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from domains.facades.painter import palette
from domains.facades.painter.palette import LAMPLIGHT, Colour

Points = list[tuple[float, float]]
Box = tuple[int, int, int, int]
T = TypeVar("T")

UNITS, MARGIN, SUPERSAMPLING = 96, 10, 3


def _rgb(channels: Iterable[float]) -> Colour:
    red, green, blue = (min(255, int(channel)) for channel in channels)
    return red, green, blue


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` where `share` is 0, `b` where it is 1."""
    return _rgb(x + (y - x) * share for x, y in zip(a, b, strict=True))


def tone(colour: Colour, factor: float) -> Colour:
    """A colour made lighter (factor > 1) or darker."""
    return _rgb(channel * factor for channel in colour)


def box(x: float, y: float, w: float, h: float) -> Points:
    """The corners of an upright rectangle; (x, y) is the top left."""
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def peak(x: float, y: float, w: float, rise: float) -> Points:
    """The corners of a triangle on (x, y) … (x + w, y)."""
    return [(x, y), (x + w / 2, y - rise), (x + w, y)]


class Scene:
    """One picture in the making: canvas, light, palette, and what has been painted so far."""

    def __init__(self, style: str, rng: np.random.Generator, size: int) -> None:
        self.style, self.rng, self.size, self.cues = style, rng, size, palette.CUES[style]
        self.scale = SUPERSAMPLING * size / UNITS
        self.side = round((UNITS + 2 * MARGIN) * self.scale)
        self.image = Image.new("RGB", (self.side, self.side))
        self.pen = ImageDraw.Draw(self.image)

        facts = self.facts = {"wall": self.pick(tuple(palette.WALLS))}  # in words, style aside
        facts["roof"] = self.pick(tuple(palette.ROOFS))
        self.material = facts["material"] = self.pick(("brick", "stone", "stucco"))
        self.weather = facts["weather"] = self.pick(palette.WEATHERS)
        self.time = facts["time"] = self.pick(("day",) * 7 + ("dawn", "dusk", "night"))
        snow, seasons = self.weather == "snow", tuple(palette.FOLIAGE)
        self.season = facts["season"] = "winter" if snow else self.pick(seasons)
        sky = self.weather if self.time == "day" else self.time
        self.zenith, self.horizon, self.light = palette.SKIES[sky]
        jitter = rng.normal(0, 6, 3)
        self.wall = _rgb(np.clip(np.array(palette.WALLS[facts["wall"]]) + jitter, 30, 245))
        dark_trim = tone(self.wall, self.u(0.45, 0.7))
        light_trim = mix(self.wall, (248, 244, 234), self.u(0.5, 0.9))
        self.trim = dark_trim if self.chance(0.35) else light_trim
        self.roof = palette.ROOFS[facts["roof"]]
        if snow:
            self.roof = mix(self.roof, (244, 246, 250), 0.75)
        self.glass = mix((52, 62, 78), self.horizon, self.u(0.0, 0.45))
        self.lit_share = {"night": 0.6, "dusk": 0.4, "dawn": 0.12}.get(self.time, 0.0)
        self.sun = self.pick((-1, 1))  # which side the light comes from
        self.sunny = self.weather in ("clear", "cloudy") and self.time == "day"
        self.ground = self.u(80, 87)
        self.textures = {
            "brick": self._masonry(2.2, 5, 0.5, 0.05),
            "stone": self._masonry(self.u(3.5, 5), self.u(7, 10), 0.45, 0.06),
            "shingle": self._masonry(1.8, 2.4, 0.45, 0.06),
            "stucco": self._masonry(1.7, 1.7, 0, 0.02),
        }
        self.middle = 48 + self.u(-4, 4)
        self.storeys = 1
        self.arch, self.tracery = "flat", False  # of arched windows, as the next two
        self.slender = 1.0  # their width over their height
        self.acute = 1.0  # radius of a pointed arch's sides over its width
        self.banded = False  # whether arches have stones of two colours
        self.features: list[str] = []
        self.outline: Points = []  # of all that has been built, for the camera to frame

    def _masonry(self, course: float, length: float, joint: float, spread: float) -> np.ndarray:
        """Brightness factors (side, side) of courses of blocks."""
        course, length, joint = course * self.scale, length * self.scale, joint * self.scale
        pixel = np.arange(self.side)
        row = (pixel // course).astype(int)
        courses = np.empty((row[-1] + 1, self.side), np.float32)
        for start in (0, 1):  # every second course is offset by half a block
            along = pixel + start * length / 2
            block = (along // length).astype(int)
            tones = 1 + self.rng.normal(0, spread, (len(courses[start::2]), block[-1] + 1))
            courses[start::2] = tones[:, block] * np.where(along % length < joint, 0.84, 1.0)
        joints = np.where(pixel % course < joint, 0.84, 1.0).astype(np.float32)
        return courses[row] * joints[:, None]

    # Chance

    def u(self, low: float, high: float) -> float:
        """A number between the two, all as likely."""
        return low + (high - low) * self.rng.random()

    def n(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.rng.random() < probability

    def has(self, cue: str, feature: str | None = None) -> bool:
        """Whether this building shows a cue of `CUES`, then noted as `feature`; drawn each time."""
        shown = self.chance(self.cues.get(cue, 0.0))
        if shown and feature:
            self.features.append(feature)
        return shown

    def pick(self, options: Sequence[T]) -> T:
        """One of them, all as likely."""
        return options[int(self.rng.integers(len(options)))]

    # Marks on the canvas, in units

    def _pixels(self, points: Points) -> Points:
        return [((x + MARGIN) * self.scale, (y + MARGIN) * self.scale) for x, y in points]

    def ink(self, colour: Colour) -> Colour:
        """A colour in the light of the scene."""
        return _rgb(channel * light for channel, light in zip(colour, self.light, strict=True))

    def fill(self, points: Points, colour: Colour, glow: bool = False) -> None:
        """A polygon; what glows does not depend on the light."""
        self.pen.polygon(self._pixels(points), colour if glow else self.ink(colour))

    def rect(self, x: float, y: float, w: float, h: float, colour: Colour) -> None:
        """A filled `box`."""
        self.fill(box(x, y, w, h), colour)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, glow: bool = False
    ) -> None:
        """An ellipse round (x, y) with the half axes rx and ry."""
        corners = self._pixels([(x - rx, y - ry), (x + rx, y + ry)])
        self.pen.ellipse(corners, colour if glow else self.ink(colour))

    def line(self, points: Points, colour: Colour, width: float) -> None:
        """A line through the points, at least one pixel wide."""
        self.pen.line(self._pixels(points), self.ink(colour), max(1, round(width * self.scale)))

    def _stencil(self, points: Points, strength: int = 255) -> tuple[Box, Image.Image]:
        """The box of pixels around a polygon, and the polygon in it as a mask."""
        pixels = np.array(self._pixels(points))
        start = pixels.min(axis=0).astype(int).clip(0)
        end = np.clip(pixels.max(axis=0).astype(int) + 1, start + 1, self.side)
        mask = Image.new("L", (end - start).tolist())
        ImageDraw.Draw(mask).polygon((pixels - start).ravel().tolist(), strength)
        return (*start.tolist(), *end.tolist()), mask

    def lay(self, points: Points, colour: Colour, texture: str | None = None) -> None:
        """Fills a polygon with textured material, the building's own unless `texture` says."""
        (left, top, right, bottom), mask = self._stencil(points)
        factors = self.textures[texture or self.material][top:bottom, left:right, None]
        pixels = np.minimum(factors * np.array(self.ink(colour), np.float32), 255).astype(np.uint8)
        self.image.paste(Image.fromarray(pixels), (left, top), mask)
        self.outline += points

    def shade(self, points: Points, factor: float) -> None:
        """Darkens (factor < 1) or lightens a polygon: shadows, and light on round things."""
        corners, mask = self._stencil(points, int(abs(factor - 1) * 255))
        self.image.paste((0, 0, 0) if factor < 1 else (255, 255, 255), corners, mask)

    def round_off(self, points: Points, x: float, w: float, *factors: float) -> None:
        """Shades a polygon from `x` to `x` + `w` in upright strips, as round and lit by the sun."""
        strips = len(factors)
        for i, factor in enumerate(factors):
            left = x + w * (i if self.sun < 0 else strips - 1 - i) / strips
            right = left + w / strips
            self.shade([(min(max(px, left), right), py) for px, py in points], factor)

    # Parts of buildings

    def opening(self, x: float, y: float, w: float, h: float, shape: str) -> Points:
        """Outline of a window, door or arch in a box, from its left foot over the top to the right.

        `shape` is flat, pointed, round or horseshoe.
        """
        r, foot = w / 2, y + h
        if shape == "flat":
            return [(x, foot), (x, y), (x + w, y), (x + w, foot)]
        if shape == "pointed":  # two arcs that meet at the apex
            reach = w * self.acute
            rise = math.sqrt(reach**2 - (reach - r) ** 2)
            angles = np.linspace(0, math.asin(rise / reach), 7).tolist()
            left = [(x + reach * (1 - math.cos(a)), y + rise - reach * math.sin(a)) for a in angles]
            right = [(2 * x + w - px, py) for px, py in left[-2::-1]]
            return [(x, foot), *left, *right, (x + w, foot)]
        below = 0.8 if shape == "horseshoe" else 0.0  # its circle runs on below its centre
        angles = np.linspace(-below, math.pi + below, 15).tolist()
        arc = [(x + r - r * math.cos(a), y + r - r * math.sin(a)) for a in angles]
        return [(arc[0][0], foot), *arc, (arc[-1][0], foot)]

    def window(self, x: float, y: float, w: float, h: float, shape: str = "flat",
               panes: tuple[int, int] = (2, 2), frame: float = 0.6) -> None:  # fmt: skip
        """A framed window with glazing bars; `panes` counts columns and rows."""
        if frame:
            around = self.opening(x - frame, y - frame, w + 2 * frame, h + frame, shape)
            self.fill(around, self.trim)
            self.rect(x - frame - 0.4, y + h, w + 2 * frame + 0.8, 0.8, self.trim)
        lit = self.chance(self.lit_share)
        outline = self.opening(x, y, w, h, shape)
        self.fill(outline, LAMPLIGHT if lit else tone(self.glass, self.u(0.8, 1.2)), glow=lit)
        if not lit:
            self.line([(px + 0.2, py + 0.3) for px, py in outline[:-1]], tone(self.glass, 0.5), 0.5)
        bars = mix(self.trim, self.glass, 0.25)
        columns, rows = panes
        top = y + (w * 0.3 if shape != "flat" else 0)
        for at in [x + w * i / columns for i in range(1, columns)]:
            self.line([(at, top), (at, y + h)], bars, 0.4)
        for at in [y + h * i / rows for i in range(1, rows)]:
            self.line([(x, at), (x + w, at)], bars, 0.4)

    def ring(self, x: float, y: float, w: float, h: float, shape: str, thick: float) -> None:
        """The voussoirs of an arch: one band of trim, or stones of two colours in turn."""
        outer = self.opening(x - thick, y - thick, w + 2 * thick, h + thick, shape)
        inner = self.opening(x, y, w, h, shape)
        self.fill(outer, self.trim)
        if self.banded:
            other = (176, 76, 58) if self.facts["wall"] != "red" else (240, 226, 200)
            for i in range(0, len(outer) - 1, 2):
                self.fill([outer[i], outer[i + 1], inner[i + 1], inner[i]], other)

    def door(self, x: float, w: float, h: float, shape: str = "flat") -> None:
        """A double door on the ground, `x` at its left."""
        colour = self.pick(((74, 50, 38), (42, 64, 56), (110, 40, 36), (40, 50, 78), (60, 56, 54)))
        self.fill(self.opening(x, self.ground - h, w, h, shape), colour)
        middle = x + w / 2
        self.line([(middle, self.ground - h * 0.8), (middle, self.ground)], tone(colour, 0.6), 0.4)

    def column(self, x: float, y: float, w: float, h: float) -> None:
        """A round column with its base and capital; (x, y) is the top left of the shaft."""
        stone = mix(self.trim, (240, 236, 226), 0.4)
        self.rect(x, y, w, h, stone)
        self.round_off(box(x, y, w, h), x, w, 1.08, 1, 0.86, 0.7)
        self.rect(x - w * 0.25, y, w * 1.5, w * 0.5, stone)
        self.rect(x - w * 0.25, y + h - w * 0.4, w * 1.5, w * 0.4, stone)

    def pediment(self, x: float, y: float, w: float, rise: float) -> None:
        """A low triangle above (x, y) … (x + w, y), framed by mouldings."""
        self.fill(peak(x - 1.5, y, w + 3, rise), mix(self.trim, self.wall, 0.2))
        field = tone(mix(self.wall, self.trim, 0.5), 0.82)
        self.fill(peak(x + 2.5, y - 1, w - 5, rise - 2.7), field)
        self.rect(x - 1.5, y - 0.6, w + 3, 1.8, self.trim)
        self.shade(box(x, y + 1.2, w, 1.2), 0.75)

    def cornice(self, x: float, y: float, w: float, thick: float = 1.6, out: float = 1.2) -> None:
        """A moulding above (x, y) … (x + w, y), and its shadow below."""
        self.rect(x - out, y - thick, w + 2 * out, thick, self.trim)
        self.shade(box(x, y, w, 1.4), 0.74)

    def chimney(self, x: float, y: float, h: float) -> None:
        """A stack with two pots that rises from (x, y)."""
        self.lay(box(x, y - h, 3.2, h + 4), tone(self.wall, 0.85), "brick")
        self.rect(x - 0.4, y - h, 4, 1, tone(self.wall, 0.6))
        for pot in (x + 0.3, x + 1.8):
            self.rect(pot, y - h - 1.4, 1, 1.4, (150, 92, 70))

    def dome(self, x: float, y: float, r: float, bulge: float) -> None:
        """A dome on a drum centred on (x, y); its circle runs on by `bulge` (radians) below."""
        self.rect(x - r * 0.85, y - r * 0.4, r * 1.7, r * 0.4 + 1, self.trim)
        angles = np.linspace(-bulge, math.pi + bulge, 21).tolist()
        foot = y - r * 0.35 - r * math.sin(bulge)
        points = [(x - r * math.cos(a), foot - r * math.sin(a)) for a in angles]
        self.fill(points, self.roof)
        self.round_off(points, x - r, 2 * r, 1.14, 1, 0.8)
        self.line([(x, foot - r), (x, foot - r - 3.5)], self.trim, 0.6)

    def cone(self, x: float, y: float, w: float, rise: float) -> None:
        """A pointed roof on (x, y) … (x + w, y)."""
        left, top, right = peak(x - 0.8, y, w + 1.6, rise)
        self.lay([left, top, right], self.roof, "shingle")
        self.shade([(x + w / 2, y), top, right if self.sun < 0 else left], 0.76)
        self.line([top, (top[0], top[1] - 2.5)], self.trim, 0.5)

    def hip(self, x: float, y: float, w: float, rise: float, inset: float, out: float) -> None:
        """A roof on (x, y) … (x + w, y) whose ends lean in by `inset` and whose eaves hang out."""
        ridge, right = y - rise, x + w
        corners = [(x - out, y), (x + inset, ridge), (right - inset, ridge), (right + out, y)]
        self.lay(corners, self.roof, "shingle")

    def crenels(self, x: float, y: float, w: float) -> None:
        """Battlements on (x, y) … (x + w, y)."""
        count = max(3, round(w / 4))
        step = w / (count - 0.4)
        for i in range(count):
            self.lay(box(x + i * step, y - 2.4, step * 0.6, 2.6), self.wall)
