"""Tudor, Queen Anne, Dutch gable: one steep house of one to three bays."""

from domains.facades.painter.scene import Points, Scene, box, mix, peak, tone

TIMBER, PLASTER = (58, 42, 34), (250, 244, 230)
# Half the outline of a curved gable, from its foot to its peak: shares of the way in and of the
# way up.
CURVED_GABLE: Points = [
    (0, 0), (0.02, 0.16), (0.2, 0.2), (0.3, 0.32), (0.34, 0.5), (0.5, 0.6), (0.6, 0.78),
    (0.78, 0.9), (1, 1),
]  # fmt: skip


def _half_timbering(s: Scene, x: float, y: float, w: float, h: float) -> None:
    beams = mix(TIMBER, s.wall, 0.12)
    s.lay(box(x, y, w, h), mix(s.wall, PLASTER, 0.55), "stucco")
    posts = max(3, round(w / 4))
    step = w / posts
    for at in [x + step * i for i in range(posts + 1)]:
        s.line([(at, y), (at, y + h)], beams, 0.9)
    for start, end in ((x, x + step), (x + w, x + w - step)):
        s.line([(start, y), (end, y + h)], beams, 0.8)
    for at in (y, y + h * 0.5, y + h):
        s.line([(x - 0.4, at), (x + w + 0.4, at)], beams, 1.0)


def _gable(s: Scene, x: float, y: float, w: float, rise: float, kind: str,
           timbered: bool, hoist: bool, texture: str, steps: int) -> None:  # fmt: skip
    """A straight, stepped or curved gable on (x, y) … (x + w, y)."""
    top, inner = y - rise, x + w / 2
    if kind == "straight":
        edge = s.roof if s.weather == "snow" else s.trim
        s.fill(peak(x - 1.6, y + 1, w + 3.2, rise + 2.8), edge)
        outline = peak(x + 0.4, y + 0.2, w - 0.8, rise - 0.6)
    else:
        half = CURVED_GABLE
        if kind == "stepped":
            half = [(i / steps, (i + k) / steps) for i in range(steps) for k in (0, 1)]
        right = [(x + w - fx * w / 2 * 0.92, y - fy * rise) for fx, fy in half]
        outline = [(2 * inner - px, py) for px, py in right] + right[::-1]
        edge_points = [(inner + (px - inner) * 1.06, py - 1) for px, py in outline]
        s.fill([*edge_points, (x + w, y), (x, y)], s.trim)
    if timbered:
        beams = mix(TIMBER, s.wall, 0.12)
        s.lay(outline, mix(s.wall, PLASTER, 0.55), "stucco")
        for px in [x + w * i / 6 for i in range(1, 6)]:
            s.line([(px, y), (px, y - rise * (1 - abs(px - inner) / (w / 2)) * 0.9)], beams, 0.8)
        s.line([(x, y), (x + w, y)], beams, 1.0)
        s.line([(x + w * 0.25, y - rise * 0.42), (x + w * 0.75, y - rise * 0.42)], beams, 0.9)
    else:
        s.lay(outline, s.wall, texture)
    s.window(inner - 1.8, y - rise * 0.42, 3.6, rise * 0.3)
    if hoist:
        s.line([(inner, top + 3), (inner, top + 6.5)], (60, 48, 40), 0.5)
        s.rect(inner - 0.8, top + 2.4, 1.6, 1.4, (60, 48, 40))


def _turret(s: Scene, x: float, w: float, high: float, floor: float) -> None:
    top = s.ground - high
    s.lay(box(x, top, w, high), s.wall)
    s.round_off(box(x, top, w, high), x, w, 1.08, 1, 0.86, 0.7)
    for y in [top + floor * storey for storey in range(s.storeys)]:
        for at in (0.14, 0.57):
            s.window(x + w * at, y + 3, w * 0.28, floor * 0.48, panes=(1, 2), frame=0.4)
        s.rect(x, y + floor * 0.85, w, 0.8, s.trim)
    s.cone(x, top, w, w * s.u(1.2, 1.7))


def _porch(s: Scene, x: float, w: float, high: float) -> None:
    y, posts = s.ground - high, max(3, round(w / 7))
    s.shade(box(x, y, w, high), 0.7)
    s.hip(x, y, w, 3, 1.5, 1.5)
    for i in range(posts + 1):
        s.rect(x + (w - 1) * i / posts, y, 1, high, s.trim)
    s.rect(x, s.ground - 3.2, w, 0.7, s.trim)
    for i in range(int(w / 1.6)):
        s.rect(x + 1.6 * i, s.ground - 3, 0.5, 3, s.trim)


def gables(s: Scene) -> None:
    """A steep house of one to three bays, at least one of them under a gable."""
    bays, s.storeys = s.n(1, 3), s.n(2, 3)
    w, floor = s.u(19, 24) if bays > 1 else s.u(26, 36), s.u(9.5, 12)
    width, height, rise = w * bays, floor * s.storeys, w * s.u(0.6, 0.85)
    left, top = s.middle - width / 2, s.ground - height
    timber, shutters = s.has("timber"), s.has("shutters")
    courses, jetty = s.has("string courses"), s.has("jetty")
    curved, stepped = s.has("curved"), s.has("stepped")
    panes = (3, 4) if s.has("lattice") else (2, 3)
    kind = "stepped" if stepped else "curved" if curved else "straight"
    timbered = s.has("gable timber") or timber
    hoist = s.has("hoist")
    texture = "shingle" if s.has("shingles") else s.material
    steps = s.n(4, 6)
    if s.has("chimneys", "chimney"):
        s.chimney(left + width * s.u(0.08, 0.75), top - rise * 0.5, rise * s.u(0.5, 0.75))
    fronts = [s.has("gabled") for _ in range(bays)]
    fronts[s.n(0, bays - 1)] = True
    s.hip(left, top + 0.8, width, rise * 0.82 + 0.8, w * 0.22, 1.5)
    s.lay(box(left, top, width, height), s.wall)
    s.shade(box(left, top, width, 1.6), 0.72)
    if timber:
        out = 0.8 if jetty else 0
        for y in [top + floor * i for i in range(s.storeys - 1)]:
            _half_timbering(s, left - out, y, width + 2 * out, floor)
            if jetty:
                s.shade(box(left, y + floor, width, 1.2), 0.65)
    s.features += ["timber beams"] * timber + ["shutters"] * shutters
    if courses:
        for i in range(s.storeys * 2):
            s.rect(left, top + floor * i / 2 + 1, width, 0.9, s.trim)
    entrance = s.n(0, bays - 1)
    for bay in range(bays):
        x = left + w * bay
        for storey in range(s.storeys):
            y, count = top + floor * storey + floor * 0.24, s.n(1, 2) + (bays == 1)
            if storey == s.storeys - 1 and bay == entrance:
                s.door(x + w * 0.14, 4.6, floor * 0.72, s.pick(("flat", "flat", "round")))
                s.window(x + w * 0.58, y, w * 0.26, floor * 0.5, panes=panes)
                continue
            for at in [x + w * (i + 0.5) / count - w * 0.11 for i in range(count)]:
                if shutters:
                    green = mix(s.trim, (60, 90, 80), 0.6)
                    s.rect(at - w * 0.1, y - 0.3, w * 0.42, floor * 0.54, green)
                s.window(at, y, w * 0.22, floor * 0.5, panes=panes)
        if fronts[bay]:
            _gable(s, x, top, w, rise, kind, timbered, hoist, texture, steps)
    s.features += [f"{kind} gable" if sum(fronts) == 1 else f"{kind} gables"] * 2
    to_left = s.pick((True, False))
    if s.has("bay", "bay window"):
        x, y = left + w * (bays - 1 if to_left else 0) + w * 0.25, top + floor * (s.storeys - 1) - 1
        across = w * 0.5
        s.lay(box(x, y, across, floor * 0.86), tone(s.wall, 1.05))
        s.hip(x, y, across, 2.6, 1.5, 1)
        for at in [x + across * (0.06 + 0.32 * i) for i in range(3)]:
            s.window(at, y + 2, across * 0.22, floor * 0.42, panes=(1, 2), frame=0.4)
    if s.has("turret", "turret"):
        r, high = s.u(9, 12), height + s.u(1, 6)
        _turret(s, left - r * 0.35 if to_left else left + width - r * 0.65, r, high, floor)
    if s.has("porch", "porch"):
        length = width * s.u(0.5, 1.0)
        _porch(s, left + width - length if to_left else left, length, floor * 0.95)
