"""International style, Chicago school, Art Deco: one tall block."""

from domains.facades.painter.scene import Scene, box, mix, opening, tone


def _floors(
    s: Scene,
    x: float,
    y: float,
    w: float,
    floor: float,
    columns: int,
    share: float,
    ribbons: bool,
    piers: bool,
) -> None:
    """One block of a tower, floor by floor, from (x, y) down to the ground."""
    high, step = s.ground - y, w / columns
    wide, panes = step * share, (3 if share > 0.6 else 1, 1)
    s.lay(box(x, y, w, high), s.wall)
    for at in [y + floor * (row + 0.3) for row in range(int(high / floor - 0.6))]:
        if ribbons:
            s.window(x + 0.6, at, w - 1.2, floor * 0.5, panes=(columns * 2, 1), frame=0.3)
            continue
        for px in [x + step * (column + 0.5) - wide / 2 for column in range(columns)]:
            s.window(px, at, wide, floor * 0.58, panes=panes, frame=0)
            if piers:
                s.rect(px, at + floor * 0.58, wide, floor * 0.42, tone(s.wall, 0.68))
    if piers:
        for column in range(columns + 1):
            s.rect(x + step * column - 0.6, y - 1, 1.2, high + 1, mix(s.wall, s.trim, 0.5))
    s.rect(x - 0.3, y - 0.6, w + 0.6, 1.2, s.trim)


def _ground_floor(s: Scene, left: float, width: float, high: float, bays: int) -> None:
    if s.has("stilts"):
        s.rect(left, s.ground - high, width, high, tone(s.glass, 0.6))
        for i in range(bays + 1):
            s.rect(
                left + (width - 1.2) * i / bays,
                s.ground - high,
                1.2,
                high,
                mix(s.wall, s.trim, 0.3),
            )
        s.features.append("stilts")
    elif s.has("shops"):
        s.lay(box(left, s.ground - high - 1, width, high + 1), mix(s.wall, s.trim, 0.4))
        for px in [left + width * (i + 0.12) / bays for i in range(bays)]:
            s.window(
                px, s.ground - high + 0.8, width * 0.76 / bays, high - 2, panes=(2, 1), frame=0
            )
        s.features.append("shops")
    s.door(s.middle - 2.4, 4.8, high * 0.85)


def modern(s: Scene, share: float) -> None:
    """A tall block of many floors; a window takes `share` of its bay's width."""
    width, height, s.storeys, bays = s.u(34, 54), s.u(48, 64), s.n(6, 10), s.n(4, 7)
    share *= s.u(0.92, 1.08)
    left, top = s.middle - width / 2, s.ground - height
    floor = height / (s.storeys + 0.6)
    ribbons, piers, depth = s.has("ribbons"), s.has("piers"), s.u(5, 9) * s.pick((-1, 0, 1))
    tiers = [(left, width, top)]
    if piers:
        s.features.append("piers")
    if s.has("setbacks"):
        count, tiers = s.n(2, 4), []
        for i in range(count):
            shrink = width * (0.5 if count < 4 else 0.62) * i / count
            tiers.append(
                (
                    left + shrink / 2,
                    width - shrink,
                    s.ground - height * (0.58 + 0.42 * i / (count - 1)),
                )
            )
        s.features.append("setbacks")
    for x, w, y in tiers[::-1]:
        if depth:
            s.flank(x, y, w, s.ground - y, depth)
    for x, w, y in tiers[::-1]:  # the highest tier stands at the back
        columns = max(2, round(bays * w / width))
        _floors(s, x, y, w, floor, columns, share, ribbons, piers)
    x, w, y = tiers[-1]
    if s.has("blank wall"):
        s.features.append("blank wall")
        at = left + (width * 0.76 if s.chance(0.5) else 0)
        s.lay(box(at, top - 2.5, width * 0.24, height + 2.5), tone(s.wall, 0.93))
    if s.has("cornice"):
        s.cornice(x, y + 1, w, 3, 2)
        s.features.append("cornice")
    if s.has("arched top"):
        for column in range(bays):
            step = width / bays
            s.window(
                left + step * (column + 0.16), top + 2, step * 0.68, floor * 0.9, "round", (1, 1)
            )
    if s.has("crown"):
        for i in range(3):
            s.lay(
                box(x + w * (0.26 + 0.08 * i), y - 2.5 * (i + 1), w * (0.48 - 0.16 * i), 2.6),
                s.wall,
            )
        s.line([(s.middle, y - 7), (s.middle, y - s.u(11, 17))], s.trim, 0.9)
        s.features.append("spire")
    if s.has("ornament"):
        s.features.append("zigzag ornament")
        for px in [x + 2 * i for i in range(int(w / 2))]:
            s.line([(px, y + 2.6), (px + 1, y + 0.8), (px + 2, y + 2.6)], s.trim, 0.6)
        s.fill(opening(s.middle - 5, s.ground - floor * 2.2, 10, floor * 2.2, "round"), s.trim)
    if s.has("penthouse"):
        s.lay(box(left + width * s.u(0.15, 0.5), top - 4, width * 0.3, 3.6), tone(s.wall, 0.85))
    _ground_floor(s, left, width, floor * s.u(1.2, 1.5), bays)
    s.features.append("ribbon windows" if ribbons else "rows of windows")
