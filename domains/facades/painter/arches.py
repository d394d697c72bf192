"""Gothic, Romanesque, Moorish: a hall or church front, or an arcade."""

import math

import numpy as np

from domains.facades.painter.scene import Scene, box, peak, tone

# Shape of a style's arches, and their width over their height.
ARCHES = {
    "gothic": ("pointed", 0.33),
    "romanesque": ("round", 0.44),
    "moorish": ("horseshoe", 0.46),
}


def _windows(s: Scene, x: float, y: float, w: float, h: float, count: int) -> None:
    step = w / count
    each = min(h * s.slender, step * 0.62)
    for at in [x + step * (i + 0.5) - each / 2 for i in range(count)]:
        s.ring(at, y, each, h, s.arch, 0.8)
        s.window(at, y, each, h, s.arch, (2 if s.tracery else 1, 1), 0)
        if s.tracery and each > 2.4:
            for r, colour in ((each * 0.22, s.trim), (each * 0.12, s.glass)):
                s.oval(at + each / 2, y + each * 0.75, r, r, colour)


def _arcade(s: Scene, left: float, width: float, height: float) -> None:
    top, count, high = s.ground - height, s.n(4, 6), height * s.u(0.5, 0.6)
    step, foot = width / count, s.ground - high
    s.lay(box(left, top, width, height), s.wall)
    _windows(s, left + 2, top + 5, width - 4, (height - high) * 0.5, count + s.n(0, 2))
    for x in [left + step * (i + 0.14) for i in range(count)]:
        s.ring(x, foot, step * 0.72, high, s.arch, 1.3)
        s.fill(s.opening(x, foot, step * 0.72, high, s.arch), tone(s.wall, 0.3))
    for i in range(count + 1):
        s.column(left + step * i - 0.9, s.ground - high * 0.62, 1.8, high * 0.62)


def _church_front(s: Scene, left: float, width: float, height: float) -> tuple[float, float]:
    """A nave with a portal between two aisles; tells the nave's width and the aisles' height."""
    nave, aisle = width * s.u(0.4, 0.52), height * s.u(0.5, 0.75)
    side, top, eaves = (width - nave) / 2, s.ground - height, s.ground - aisle
    s.lay(box(left, eaves, width, aisle), tone(s.wall, 0.94))
    s.cornice(left, eaves, width, 1.2, 0.6)
    s.lay(box(left + side, top, nave, height), s.wall)
    for x in (left, left + side + nave):
        _windows(s, x + 1, eaves + 5, side - 2, aisle * 0.55, s.n(1, 2))
    portal, tall = nave * s.u(0.3, 0.4), height * s.u(0.34, 0.42)
    x = s.middle - portal / 2
    for thick in (2.4, 1.2):
        s.ring(x, s.ground - tall, portal, tall, s.arch, thick)
    s.door(x, portal, tall, s.arch)
    if s.has("rose", "rose window"):
        y, r = top + height * 0.3, nave * s.u(0.19, 0.26)
        s.oval(s.middle, y, r + 1, r + 1, s.trim)
        s.oval(s.middle, y, r, r, s.glass)
        for a in np.linspace(0, math.pi, 4, endpoint=False).tolist():
            dx, dy = r * math.cos(a), r * math.sin(a)
            s.line([(s.middle - dx, y - dy), (s.middle + dx, y + dy)], s.trim, 0.5)
    else:
        x, y, high = left + side + nave * 0.1, top + height * 0.12, height * s.u(0.28, 0.38)
        _windows(s, x, y, nave * 0.8, high, s.n(1, 4))
    return nave, aisle


def _towers(s: Scene, left: float, width: float, height: float) -> None:
    spire, w, tall = s.has("spire"), s.u(9, 13), height * s.u(1.1, 1.35)
    rise, y = w * (s.u(1.5, 2.2) if spire else s.u(0.5, 0.9)), s.ground - tall
    crenels = s.has("crenels")
    for side in s.pick(((0,), (1,), (0, 1))):
        x = left + (width - w) * side
        s.lay(box(x, y, w, tall), tone(s.wall, 1.03))
        s.shade(box(x + (w * 0.75 if s.sun < 0 else 0), y, w * 0.25, tall), 0.8)
        for level in (0.08, 0.4, 0.68):
            _windows(s, x + 1, y + tall * level, w - 2, tall * 0.17, s.n(1, 2))
        s.cornice(x, y, w, 1.2, 0.6)
        if crenels:
            s.crenels(x, y - 1, w)
        else:
            s.cone(x, y - 1, w, rise)
    s.features.append("spire" if spire and not crenels else "tower")


def arches(s: Scene) -> None:
    """A church or hall front with aisles, or an arcade."""
    shape, slender = ARCHES[s.style]
    if s.chance(0.08):  # builders borrowed from their neighbours
        shape = s.pick(("pointed", "round", "horseshoe"))
    s.acute, s.slender, s.banded = s.u(0.72, 1.25), slender * s.u(0.75, 1.25), s.has("bands")
    s.arch, s.tracery = shape, s.has("tracery")
    width, height, s.storeys = s.u(52, 72), s.u(34, 48), 2
    left, top = s.middle - width / 2, s.ground - height
    nave, aisle = width, height
    if s.has("arcade", "arcade"):
        _arcade(s, left, width, height)
    else:
        nave, aisle = _church_front(s, left, width, height)
    start, end, eaves = s.middle - nave / 2, s.middle + nave / 2, s.ground - aisle
    if s.has("dome", "dome"):
        s.dome(s.middle, top - 1, s.u(9, 14), 0.3 if shape == "horseshoe" else 0)
    if s.has("gable"):
        rise, foot = min(nave * s.u(0.4, 0.6), 17), top + 0.6
        s.fill(peak(start - 1.2, foot, nave + 2.4, rise + 2), s.roof)
        s.lay(peak(start + 0.6, foot, nave - 1.2, rise - 0.4), s.wall)
    elif s.has("crenels", "battlements"):
        s.crenels(start, top, nave)
    else:
        s.cornice(start, top, nave)
    if s.has("corbels"):
        for i in range(int(nave / 3)):
            s.oval(start + 1.5 + 3 * i, top + 2.6, 1.1, 1.1, tone(s.wall, 0.62))
    elif s.has("tiles"):
        for x in [start + 2 * i for i in range(int(nave / 2))]:
            lozenge = [(x, top + 2.6), (x + 1, top + 1.2), (x + 2, top + 2.6), (x + 1, top + 4)]
            s.fill(lozenge, s.trim)
    edges = ((left, eaves), (start, top), (end, top), (left + width, eaves))
    if s.has("buttresses", "buttresses"):
        for x, _ in edges:
            s.lay(box(x - 1.2, eaves + 1, 2.4, aisle - 1), tone(s.wall, 1.06))
            s.shade(box(x if s.sun < 0 else x - 2.4, eaves + 1, 2.4, aisle - 1), 0.82)
    if s.has("pinnacles", "pinnacles"):
        for x, y in edges:
            s.fill(peak(x - 1.1, y, 2.2, 7), s.trim)
    if s.has("towers"):
        _towers(s, left, width, height)
    s.features += [f"{shape} arches"] * 2 + ["striped arches"] * s.banded + ["tracery"] * s.tracery
