"""What stands behind and before a building, the weather, and the camera."""

import numpy as np
from PIL import Image, ImageFilter
from PIL.Image import Resampling, Transform

from domains.facades.painter.palette import FOLIAGE, LAMPLIGHT, WALLS
from domains.facades.painter.scene import MARGIN, UNITS, Scene, mix, peak, tone


def backdrop(s: Scene) -> None:
    """Paints what is farther away than the building: the sky, hills, other houses."""
    ramp = np.linspace(0, 1, s.side, dtype=np.float32)[:, None] ** 0.9
    sky = np.array(s.zenith) * (1 - ramp) + np.array(s.horizon) * ramp
    s.image.paste(Image.fromarray(np.repeat(sky[:, None].astype(np.uint8), s.side, axis=1)))
    if s.time == "night":
        for _ in range(14):
            s.oval(s.u(-8, 104), s.u(-8, 50), 0.3, 0.3, (230, 232, 240), glow=True)
    if s.time != "day" or s.weather == "clear":
        disc = {"night": (240, 238, 220), "day": (255, 246, 200)}.get(s.time, (255, 214, 160))
        s.oval(48 + s.sun * s.u(26, 46), s.u(2, 26), s.u(3, 5), s.u(3, 5), disc, glow=True)
    if s.weather in ("cloudy", "overcast", "rain") and s.time != "night":
        cloud = (255, 255, 255) if s.weather == "cloudy" else (120, 124, 132)
        for _ in range(s.n(2, 5)):
            x, y = s.u(-5, 100), s.u(-4, 36)
            for _ in range(5):
                colour = mix(s.horizon, cloud, s.u(0.3, 0.6))
                s.oval(x + s.u(-8, 8), y + s.u(-2, 2), s.u(4, 9), s.u(1.8, 3.4), colour, glow=True)
    if s.chance(0.4):
        far = mix(s.horizon, (96, 112, 120), 0.4)
        s.oval(s.u(0, 96), s.ground, s.u(40, 70), s.u(10, 26), far, glow=True)
    if s.chance(0.6):
        for side in (-1, 1):
            w, h = s.u(14, 26), s.u(20, 44)
            x, y = s.middle + side * s.u(30, 44) - w / 2, s.ground - h
            colour = mix(WALLS[s.pick(tuple(WALLS))], s.horizon, 0.35)
            s.rect(x, y, w, h, colour)
            if s.chance(0.5):
                s.fill(peak(x - 1, y, w + 2, 9), tone(colour, 0.7))
            for row in range(int(h / 8)):
                for column in range(int(w / 6)):
                    s.rect(x + 2 + 6 * column, y + 3 + 8 * row, 2.6, 4, tone(colour, 0.66))


def street(s: Scene) -> str:
    """Paints the ground before the building and says what it is."""
    kind, snow = s.pick(("street", "lawn", "square", "water")), s.weather == "snow"
    left, y, across = -MARGIN, s.ground, UNITS + 2 * MARGIN
    s.rect(left, y, across, 30, (236, 240, 246) if snow else (176, 172, 164))
    if kind == "street":
        s.rect(left, y + 4, across, 30, (186, 190, 198) if snow else (104, 104, 108))
        for i in range(7):
            s.rect(left + 18 * i, y + 9, 8, 0.9, (226, 222, 200))
    elif kind == "lawn":
        grass = (228, 234, 240) if snow else tone(FOLIAGE["summer"], 1.2)
        s.rect(left, y + 1, across, 30, grass)
        x = s.middle
        s.fill([(x - 3, y), (x + 3, y), (x + 10, 106), (x - 10, 106)], (204, 192, 166))
    elif kind == "water":
        s.rect(left, y + 5, across, 30, mix(s.zenith, (60, 84, 92), 0.6))
        for _ in range(12):
            x, y = s.u(-8, 96), s.u(s.ground + 6, 104)
            s.line([(x, y), (x + s.u(4, 12), y)], mix(s.zenith, s.horizon, 0.6), 0.6)
    else:
        joint = (146, 142, 136)
        for aside in [i - 3.5 for i in range(8)]:
            ends = [(s.middle + aside * 14, y), (s.middle + aside * 34, 106)]
            s.line(ends, joint, 0.5)
        s.line([(left, y + 4), (106, y + 4)], joint, 0.5)
    return kind


def tree(s: Scene, x: float, tall: float) -> None:
    """Paints a tree at `x`, as its season has it."""
    foot = s.ground + s.u(2, 6)
    top = foot - tall
    s.fill([(x - 0.9, foot), (x - 0.5, top), (x + 0.5, top), (x + 0.9, foot)], (84, 66, 52))
    if s.season == "winter":
        for _ in range(11):
            y, reach = foot - tall * s.u(0.45, 1.0), s.u(-7, 7)
            s.line([(x, y), (x + reach, y - abs(reach) * s.u(0.6, 1.2))], (92, 76, 64), 0.6)
        return
    for i in range(13):
        at = x + s.u(-7, 7) - s.sun * i * 0.2, top - s.u(-5, 6) - i * 0.2
        s.oval(*at, s.u(2.5, 4.8), s.u(2.2, 4.2), tone(FOLIAGE[s.season], 0.72 + 0.045 * i))


def occluder(s: Scene) -> str:
    """Puts something between the building and the camera and says what."""
    kind = s.pick(("tree", "trees", "lamp post", "people", "car", "nothing", "nothing", "nothing"))
    foot = s.ground + 6
    if kind == "tree":
        tree(s, s.u(12, 84), s.u(14, 30))
    elif kind == "trees":
        for x in (s.u(4, 24), s.u(40, 60), s.u(72, 92))[:: s.pick((1, 2))]:
            tree(s, x, s.u(10, 22))
    elif kind == "lamp post":
        x = s.u(16, 80)
        s.rect(x, foot - 30, 0.9, 30, (46, 48, 52))
        lamp = LAMPLIGHT if s.lit_share else (226, 224, 210)
        s.oval(x + 0.45, foot - 31, 1.7, 2, lamp, glow=bool(s.lit_share))
    elif kind == "people":
        coats = ((60, 70, 110), (150, 60, 60), (70, 90, 70), (50, 48, 54), (196, 160, 80))
        for _ in range(s.n(2, 6)):
            x, tall = s.u(8, 88), s.u(6.5, 8)
            coat = s.pick(coats)
            for leg in (x - 0.9, x + 0.1):
                s.rect(leg, foot - tall * 0.5, 0.8, tall * 0.5, (52, 50, 56))
            s.rect(x - 1.1, foot - tall * 0.85, 2.2, tall * 0.45, coat)
            s.oval(x, foot - tall, 0.9, 1, (214, 172, 146))
    elif kind == "car":
        x, paint = s.u(8, 66), WALLS[s.pick(tuple(WALLS))]
        cabin = ((4, 5), (6.5, 9), (15, 9), (18, 5))
        panes = ((5.6, 5), (7.2, 8.2), (14.4, 8.2), (16.4, 5))
        for outline, colour in ((cabin, tone(paint, 0.9)), (panes, (70, 84, 98))):
            s.fill([(x + right, foot - up) for right, up in outline], colour)
        s.rect(x, foot - 5.2, 22, 4.2, paint)
        for at in (x + 4.5, x + 17.5):
            s.oval(at, foot - 1, 2, 2, (38, 38, 42))
    return kind


def camera(s: Scene) -> tuple[Image.Image, str]:
    """The scene through a tilted camera at the final size, and the viewpoint in words."""
    low, high = np.min(s.outline, axis=0), np.max(s.outline, axis=0)
    width, height = high - low
    half = min(max(width, height + 4, 46) * s.u(0.54, 0.72), 54)
    centre = np.clip((high + low) / 2, half - MARGIN, UNITS + MARGIN - half)
    centre += s.rng.normal(0, 0.05 * half, 2)
    yaw, pitch, roll = s.u(-0.11, 0.11), s.u(-0.02, 0.1), s.rng.normal(0, 0.02)
    cx, cy = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]).T
    x, y = half * cx * (1 - pitch * cy), half * cy * (1 + yaw * cx)
    seen = np.stack([centre[0] + x - roll * y, centre[1] + y + roll * x], axis=1)
    corners = (seen.clip(-MARGIN, UNITS + MARGIN) + MARGIN) * s.scale
    size = (2 * s.size, 2 * s.size)
    view = s.image.transform(size, Transform.QUAD, corners.ravel().tolist(), Resampling.BILINEAR)
    side = "from below" if pitch > 0.07 else "straight on"
    if abs(yaw) > 0.05:
        side = "from the left" if yaw < 0 else "from the right"
    return view.reduce(2), side


def develop(s: Scene, picture: Image.Image) -> Image.Image:
    """Haze, soft light across the picture, and a little blur and noise of the sensor."""
    if s.chance(0.25):
        picture = picture.filter(ImageFilter.GaussianBlur(s.u(0.2, 0.5) * s.size / UNITS))
    pixels: np.ndarray = np.asarray(picture, np.float32)  # (size, size, 3)
    across = np.linspace(-1, 1, s.size, dtype=np.float32)
    if s.weather == "fog":
        haze = (s.u(0.28, 0.5) + 0.15 * across)[::-1, None, None]
        grey = np.array(s.ink(mix(s.horizon, (206, 208, 212), 0.6)), np.float32)
        pixels = pixels * (1 - haze) + grey * haze
    pixels = pixels * (1 + 0.06 * s.sun * across[None, :, None]) * s.u(0.92, 1.08)
    pixels = (pixels - 128) * s.u(0.9, 1.1) + 128 + s.rng.normal(0, s.u(1, 4), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def weather(s: Scene) -> None:
    """Paints rain or snow in front of everything else."""
    if s.weather == "rain":
        for _ in range(45):
            x, y = s.u(-8, 104), s.u(-8, 100)
            s.line([(x, y), (x - 1.2, y + s.u(3, 6))], mix(s.horizon, (255, 255, 255), 0.2), 0.3)
    elif s.weather == "snow":
        for _ in range(70):
            s.oval(s.u(-8, 104), s.u(-8, 104), 0.5, 0.5, (255, 255, 255))
