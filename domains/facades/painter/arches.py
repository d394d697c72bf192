"""Gothic, Romanesque, Moorish: a hall or church front, or an arcade."""

import math
from dataclasses import dataclass

import numpy as np

from domains.facades.painter.scene import Scene, box, opening, tone


@dataclass(frozen=True)
class Arch:
    """The arches of one building."""

    shape: str
    acute: float  # radius of a pointed arch's sides over its width
    slender: float  # width of a window over its height
    banded: bool
    tracery: bool


def _arched_windows(
    s: Scene, arch: Arch, x: float, y: float, w: float, h: float, count: int
) -> None:
    step = w / count
    each = min(h * arch.slender, step * 0.62)
    for at in [x + step * (i + 0.5) - each / 2 for i in range(count)]:
        s.ring(at, y, each, h, 0.8, arch.shape, arch.acute, arch.banded)
        s.window(at, y, each, h, arch.shape, (2 if arch.tracery else 1, 1), 0, arch.acute)
        if arch.tracery and each > 2.4:
            s.oval(at + each / 2, y + each * 0.75, each * 0.22, each * 0.22, s.trim)
            s.oval(at + each / 2, y + each * 0.75, each * 0.12, each * 0.12, s.glass)


def _arcade(s: Scene, arch: Arch, left: float, width: float, height: float) -> None:
    top, count, high = s.ground - height, s.n(4, 6), height * s.u(0.5, 0.6)
    step = width / count
    s.lay(box(left, top, width, height), s.wall)
    _arched_windows(s, arch, left + 2, top + 5, width - 4, (height - high) * 0.5, count + s.n(0, 2))
    for x in [left + step * (i + 0.14) for i in range(count)]:
        s.ring(x, s.ground - high, step * 0.72, high, 1.3, arch.shape, arch.acute, arch.banded)
        s.fill(
            opening(x, s.ground - high, step * 0.72, high, arch.shape, arch.acute),
            tone(s.wall, 0.3),
        )
    for i in range(count + 1):
        s.column(left + step * i - 0.9, s.ground - high * 0.62, 1.8, high * 0.62)
    s.features.append("arcade")


def _church_front(
    s: Scene, arch: Arch, left: float, width: float, height: float, nave: float, aisle: float
) -> None:
    """A nave of width `nave` between aisles of height `aisle`, a portal and a window above it."""
    side, top = (width - nave) / 2, s.ground - height
    s.lay(box(left, s.ground - aisle, width, aisle), tone(s.wall, 0.94))
    s.cornice(left, s.ground - aisle, width, 1.2, 0.6)
    s.lay(box(left + side, top, nave, height), s.wall)
    for x in (left, left + side + nave):
        _arched_windows(s, arch, x + 1, s.ground - aisle + 5, side - 2, aisle * 0.55, s.n(1, 2))
    portal, tall = nave * s.u(0.3, 0.4), height * s.u(0.34, 0.42)
    for thick in (2.4, 1.2):
        s.ring(
            s.middle - portal / 2,
            s.ground - tall,
            portal,
            tall,
            thick,
            arch.shape,
            arch.acute,
            arch.banded,
        )
    s.door(s.middle - portal / 2, portal, tall, arch.shape, arch.acute)
    if s.has("rose"):
        y, r = top + height * 0.3, nave * s.u(0.19, 0.26)
        s.oval(s.middle, y, r + 1, r + 1, s.trim)
        s.oval(s.middle, y, r, r, s.glass)
        for a in np.linspace(0, math.pi, 4, endpoint=False).tolist():
            dx, dy = r * math.cos(a), r * math.sin(a)
            s.line([(s.middle - dx, y - dy), (s.middle + dx, y + dy)], s.trim, 0.5)
        s.features.append("rose window")
    else:
        high = height * s.u(0.28, 0.38)
        _arched_windows(
            s, arch, left + side + nave * 0.1, top + height * 0.12, nave * 0.8, high, s.n(1, 4)
        )


def _towers(s: Scene, arch: Arch, left: float, width: float, height: float) -> None:
    spire, w, tall = s.has("spire"), s.u(9, 13), height * s.u(1.1, 1.35)
    rise, y, crenels = (
        w * (s.u(1.5, 2.2) if spire else s.u(0.5, 0.9)),
        s.ground - tall,
        s.has("crenels"),
    )
    for side in s.pick(((0,), (1,), (0, 1))):
        x = left + (width - w) * side
        s.lay(box(x, y, w, tall), tone(s.wall, 1.03))
        s.shade(box(x + (w * 0.75 if s.sun < 0 else 0), y, w * 0.25, tall), 0.8)
        for level in (0.08, 0.4, 0.68):
            _arched_windows(s, arch, x + 1, y + tall * level, w - 2, tall * 0.17, s.n(1, 2))
        s.cornice(x, y, w, 1.2, 0.6)
        if crenels:
            s.crenels(x, y - 1, w)
        else:
            s.cone(x, y - 1, w, rise)
    s.features.append("spire" if spire and not crenels else "tower")


def arches(s: Scene, shape: str, slender: float) -> None:
    """A church or hall front with aisles, or an arcade."""
    if s.chance(0.08):  # builders borrowed from their neighbours
        shape = s.pick(("pointed", "round", "horseshoe"))
    arch = Arch(shape, s.u(0.72, 1.25), slender * s.u(0.75, 1.25), s.has("bands"), s.has("tracery"))
    width, height, s.storeys = s.u(52, 72), s.u(34, 48), 2
    left, top = s.middle - width / 2, s.ground - height
    nave, aisle = width, height
    if s.has("arcade"):
        _arcade(s, arch, left, width, height)
    else:
        nave, aisle = width * s.u(0.4, 0.52), height * s.u(0.5, 0.75)
        _church_front(s, arch, left, width, height, nave, aisle)

    start, end = s.middle - nave / 2, s.middle + nave / 2
    if s.has("dome"):
        s.dome(s.middle, top - 1, s.u(9, 14), 0.3 if shape == "horseshoe" else 0)
        s.features.append("dome")
    if s.has("gable"):
        rise = min(nave * s.u(0.4, 0.6), 17)
        s.fill(
            [(start - 1.2, top + 0.6), (s.middle, top - rise - 1.4), (end + 1.2, top + 0.6)], s.roof
        )
        s.lay(
            [(start + 0.6, top + 0.6), (s.middle, top - rise + 1), (end - 0.6, top + 0.6)], s.wall
        )
    elif s.has("crenels"):
        s.crenels(start, top, nave)
        s.features.append("battlements")
    else:
        s.cornice(start, top, nave)
    if s.has("corbels"):
        for i in range(int(nave / 3)):
            s.oval(start + 1.5 + 3 * i, top + 2.6, 1.1, 1.1, tone(s.wall, 0.62))
    elif s.has("tiles"):
        for x in [start + 2 * i for i in range(int(nave / 2))]:
            s.fill(
                [(x, top + 2.6), (x + 1, top + 1.2), (x + 2, top + 2.6), (x + 1, top + 4)], s.trim
            )
    edges = (left, start, end, left + width)
    if s.has("buttresses"):
        for x in edges:
            s.lay(box(x - 1.2, s.ground - aisle + 1, 2.4, aisle - 1), tone(s.wall, 1.06))
            s.shade(box(x if s.sun < 0 else x - 2.4, s.ground - aisle + 1, 2.4, aisle - 1), 0.82)
        s.features.append("buttresses")
    if s.has("pinnacles"):
        for x, y in zip(edges, (s.ground - aisle, top, top, s.ground - aisle), strict=True):
            s.fill([(x - 1.1, y), (x, y - 7), (x + 1.1, y)], s.trim)
        s.features.append("pinnacles")
    if s.has("towers"):
        _towers(s, arch, left, width, height)
    s.features += (
        [f"{shape} arches"] * 2 + ["striped arches"] * arch.banded + ["tracery"] * arch.tracery
    )
