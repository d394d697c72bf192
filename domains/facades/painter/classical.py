"""Greek revival, Georgian, Palladian: one symmetric front with an accent in the middle."""

from domains.facades.painter.scene import Scene, box, mix, tone


def _portico(s: Scene, x: float, w: float, height: float, order: int) -> None:
    """`order` columns under a pediment, on three steps."""
    top, thick, foot = s.ground - height, min(w / order * 0.36, 3.4), 2.6
    s.shade(box(x, top, w, height), 0.62)
    for i in range(order):
        s.column(x + (w - thick) * i / (order - 1), top + 2.5, thick, height - foot - 2.5)
    s.rect(x - 1, top - 1.5, w + 2, 4, mix(s.trim, (240, 236, 226), 0.3))
    s.pediment(x - 1, top - 1, w + 2, w * s.u(0.17, 0.24))
    tread = foot / 3
    for i in range(3):
        y = s.ground - foot + i * tread
        s.rect(x - 1 - i, y, w + 2 + 2 * i, tread + 0.1, tone(s.trim, 1 - 0.1 * i))
    s.features += ["columns", "portico"]


def classical(s: Scene) -> None:
    """A symmetric front with an accent in the middle."""
    temple, portico, serliana = s.has("temple"), s.has("portico"), s.has("serliana")
    width, height, s.storeys = s.u(46, 66), s.u(28, 40), s.n(2, 3)
    bays = s.pick((3, 5, 5, 7)) if width > 54 else s.pick((3, 5))
    left, top = s.middle - width / 2, s.ground - height
    floor, step = height / s.storeys, width / bays
    centre = width * 0.92 if temple else max(step * (1 if bays == 3 else 3), 18) * s.u(0.9, 1.05)

    if s.has("wings", "wings"):
        y = s.ground - height * 0.55
        for x in (left - 13, left + width):
            s.lay(box(x, y, 13, height * 0.55), tone(s.wall, 0.92))
            s.cornice(x, y, 13)
            s.window(x + 4.5, s.ground - height * 0.4, 4, height * 0.26, s.pick(("flat", "round")))
    if s.has("chimneys", "chimneys"):
        for x in (left + width * 0.1, left + width * 0.9 - 3.2):
            s.chimney(x, top - 2, s.u(6, 9))
    if s.has("dome", "dome"):
        s.dome(s.middle, top - 4, s.u(8, 11), 0)
    if s.has("parapet"):
        s.lay(box(left, top - 3.5, width, 4), s.wall)
        s.rect(left - 0.6, top - 4, width + 1.2, 0.9, s.trim)
    else:
        inset = s.u(4, 9)
        s.hip(left, top, width, inset, inset, 1)
    s.lay(box(left, top, width, height), s.wall)
    s.cornice(left, top, width)
    s.rect(left, s.ground - 2.2, width, 2.2, mix(s.wall, s.trim, 0.6))
    if s.has("quoins", "quoins"):
        for i in range(int(height / 2.6)):
            for x in (left, left + width - 2.6 + (i % 2)):
                s.rect(x, top + 2.6 * i, 2.6 - (i % 2), 1.6, s.trim)
    if s.has("pilasters", "pilasters"):
        for x in [left + step * i for i in range(bays + 1)]:
            s.rect(x - 0.9, top, 1.8, height, s.trim)
            s.shade(box(x + 0.9 if s.sun < 0 else x - 1.5, top, 0.6, height), 0.75)

    w, h, arched = min(step * 0.45, 6), floor * s.u(0.52, 0.64), s.chance(0.15)
    ground_floor = s.storeys - 1
    for storey in range(s.storeys):
        for bay in range(bays):
            if 2 * bay + 1 == bays and storey >= ground_floor - serliana:
                continue  # the place of the door, and of the venetian window above it
            x, y = left + step * (bay + 0.5) - w / 2, top + floor * storey + (floor - h) * 0.6
            short = h * (0.75 if s.storeys == 3 and storey == 0 else 1)
            shape = "round" if arched and storey == ground_floor else "flat"
            s.window(x, y, w, short, shape, (2, 3))
    if serliana:  # an arched light of radius `r` between two narrow flat ones
        y, high = top + floor * (s.storeys - 2) + floor * 0.18, floor * 0.72
        r = max(step * 0.21, 2.2)
        s.window(s.middle - r, y, 2 * r, high, "round", (2, 2), 1.0)
        for x in (s.middle - 2.35 * r, s.middle + 1.35 * r):
            s.window(x, y + r, r, high - r, "flat", (1, 2), 0.9)
        s.features.append("venetian window")
    w, tall = min(max(step * 0.42, 4), 6), floor * 0.66
    x, y = s.middle - w / 2, s.ground - tall
    if s.has("fanlight", "fanlight"):
        s.window(x, y - w / 2, w, w / 2 + 1, "round", (4, 1), 0.9)
    else:
        s.rect(s.middle - w * 0.75, y - 1.6, w * 1.5, 1.6, s.trim)
    s.door(x, w, tall)

    x = s.middle - centre / 2
    if temple or portico:
        order = s.n(4, 8 if temple else 5)
        drop = 1 if temple else s.u(0, 0.5) * floor * (s.storeys - 1)
        _portico(s, x, centre, height - drop, order)
    elif s.has("pediment", "pediment"):
        s.pediment(x, top - 0.5, centre, centre * s.u(0.2, 0.3))
    s.features.append("sash windows")
