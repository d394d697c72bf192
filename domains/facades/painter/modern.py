"""International style, Chicago school, Art Deco: one tall block."""

from domains.facades.painter.scene import Scene, box, mix, tone

# The share of a bay's width that a window takes.
WINDOW_SHARES = {"international style": 0.86, "chicago school": 0.78, "art deco": 0.5}


def modern(s: Scene) -> None:
    """A tall block of many floors."""
    width, height, s.storeys, bays = s.u(34, 54), s.u(48, 64), s.n(6, 10), s.n(4, 7)
    share = WINDOW_SHARES[s.style] * s.u(0.92, 1.08)
    left, top = s.middle - width / 2, s.ground - height
    floor = height / (s.storeys + 0.6)
    ribbons, piers = s.has("ribbons"), s.has("piers", "piers")
    depth = s.u(5, 9) * s.pick((-1, 0, 1))
    panes = (3 if share > 0.6 else 1, 1)

    def block(x: float, w: float, y: float) -> None:
        """One block from (x, y) down to the ground, floor by floor."""
        columns = max(2, round(bays * w / width))
        high, step = s.ground - y, w / columns
        wide = step * share
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

    tiers = [(left, width, top)]
    if s.has("setbacks", "setbacks"):
        count, tiers = s.n(2, 4), []
        for i in range(count):
            shrink = width * (0.5 if count < 4 else 0.62) * i / count
            rise = height * (0.58 + 0.42 * i / (count - 1))
            tiers.append((left + shrink / 2, width - shrink, s.ground - rise))
    for x, w, y in tiers[::-1]:
        if depth:  # the side wall, receding
            near = x + w if depth > 0 else x
            far, slope = near + depth, y + abs(depth) * 0.35
            wall = [(near, y), (far, slope), (far, s.ground - 0.8), (near, s.ground)]
            s.lay(wall, s.wall)
            s.shade(wall, 1.06 if s.sun * depth > 0 else 0.68)
    for tier in tiers[::-1]:  # the highest stands at the back
        block(*tier)
    x, w, y = tiers[-1]
    if s.has("blank wall", "blank wall"):
        at = left + (width * 0.76 if s.chance(0.5) else 0)
        s.lay(box(at, top - 2.5, width * 0.24, height + 2.5), tone(s.wall, 0.93))
    if s.has("cornice", "cornice"):
        s.cornice(x, y + 1, w, 3, 2)
    if s.has("arched top"):
        step = width / bays
        for at in [left + step * (column + 0.16) for column in range(bays)]:
            s.window(at, top + 2, step * 0.68, floor * 0.9, "round", (1, 1))
    if s.has("crown", "spire"):
        for i in range(3):
            at, across = x + w * (0.26 + 0.08 * i), w * (0.48 - 0.16 * i)
            s.lay(box(at, y - 2.5 * (i + 1), across, 2.6), s.wall)
        s.line([(s.middle, y - 7), (s.middle, y - s.u(11, 17))], s.trim, 0.9)
    if s.has("ornament", "zigzag ornament"):
        for px in [x + 2 * i for i in range(int(w / 2))]:
            s.line([(px, y + 2.6), (px + 1, y + 0.8), (px + 2, y + 2.6)], s.trim, 0.6)
        portal = s.opening(s.middle - 5, s.ground - floor * 2.2, 10, floor * 2.2, "round")
        s.fill(portal, s.trim)
    if s.has("penthouse"):
        s.lay(box(left + width * s.u(0.15, 0.5), top - 4, width * 0.3, 3.6), tone(s.wall, 0.85))
    foot = floor * s.u(1.2, 1.5)
    if s.has("stilts", "stilts"):
        s.rect(left, s.ground - foot, width, foot, tone(s.glass, 0.6))
        for at in [left + (width - 1.2) * i / bays for i in range(bays + 1)]:
            s.rect(at, s.ground - foot, 1.2, foot, mix(s.wall, s.trim, 0.3))
    elif s.has("shops", "shops"):
        s.lay(box(left, s.ground - foot - 1, width, foot + 1), mix(s.wall, s.trim, 0.4))
        for at in [left + width * (i + 0.12) / bays for i in range(bays)]:
            y = s.ground - foot + 0.8
            s.window(at, y, width * 0.76 / bays, foot - 2, panes=(2, 1), frame=0)
    s.door(s.middle - 2.4, 4.8, foot * 0.85)
    s.features.append("ribbon windows" if ribbons else "rows of windows")
