"""What the styles are made of, and the colours of walls, roofs, trees and skies."""

Colour = tuple[int, int, int]

# How likely each cue is, per style. A cue that a style does not list never appears in it.
CUES: dict[str, dict[str, float]] = {
    # arches: one hall or church front, or an arcade
    "gothic": {"gable": 0.7, "rose": 0.5, "spire": 0.7, "towers": 0.6, "pinnacles": 0.55,
        "buttresses": 0.55, "tracery": 0.75, "crenels": 0.2, "bands": 0.06, "arcade": 0.25},
    "romanesque": {"gable": 0.6, "rose": 0.25, "spire": 0.1, "towers": 0.6, "pinnacles": 0.05,
        "buttresses": 0.35, "corbels": 0.6, "crenels": 0.12, "bands": 0.2, "arcade": 0.3,
        "dome": 0.08},
    "moorish": {"gable": 0.15, "rose": 0.1, "towers": 0.45, "buttresses": 0.1, "corbels": 0.15,
        "crenels": 0.6, "bands": 0.75, "arcade": 0.4, "dome": 0.5, "tiles": 0.5},
    # classical: one symmetric front, an accent in the middle
    "greek revival": {"temple": 0.65, "portico": 0.9, "wings": 0.4, "pilasters": 0.4, "dome": 0.1,
        "chimneys": 0.15, "parapet": 0.3},
    "georgian": {"pediment": 0.3, "fanlight": 0.85, "quoins": 0.4, "pilasters": 0.15,
        "chimneys": 0.75, "wings": 0.12, "serliana": 0.08, "parapet": 0.5, "portico": 0.12},
    "palladian": {"pediment": 0.85, "serliana": 0.88, "fanlight": 0.3, "quoins": 0.25,
        "pilasters": 0.7, "wings": 0.7, "chimneys": 0.3, "dome": 0.15, "parapet": 0.4,
        "portico": 0.1},
    # gables: one steep house of one to three bays
    "tudor": {"gabled": 0.7, "timber": 0.9, "jetty": 0.6, "chimneys": 0.75, "turret": 0.06,
        "porch": 0.15, "lattice": 0.7, "bay": 0.3},
    "queen anne": {"gabled": 0.55, "timber": 0.08, "gable timber": 0.25, "chimneys": 0.5,
        "turret": 0.8, "porch": 0.7, "shingles": 0.7, "bay": 0.4, "lattice": 0.1},
    "dutch gable": {"gabled": 0.95, "stepped": 0.5, "curved": 0.9, "chimneys": 0.3, "hoist": 0.5,
        "shutters": 0.5, "string courses": 0.5, "lattice": 0.3, "turret": 0.04},
    # modern: one tall block
    "international style": {"ribbons": 0.8, "stilts": 0.5, "blank wall": 0.45, "penthouse": 0.5,
        "setbacks": 0.06},
    "chicago school": {"cornice": 0.8, "shops": 0.8, "piers": 0.3, "arched top": 0.25,
        "setbacks": 0.04},
    "art deco": {"setbacks": 0.75, "piers": 0.9, "crown": 0.55, "ornament": 0.6, "shops": 0.3,
        "cornice": 0.08},
}  # fmt: skip
STYLES: tuple[str, ...] = tuple(CUES)

WALLS: dict[str, Colour] = {
    "white": (234, 230, 222), "cream": (230, 212, 174), "yellow": (222, 188, 114),
    "sandy": (204, 176, 136), "grey": (166, 166, 164), "brown": (146, 112, 86),
    "red": (168, 86, 68), "pink": (216, 160, 146), "blue": (136, 158, 182),
    "green": (152, 170, 138),
}  # fmt: skip
ROOFS: dict[str, Colour] = {
    "slate": (88, 98, 112), "tiled": (170, 88, 64), "brown": (106, 80, 64),
    "copper": (100, 146, 126), "dark": (68, 64, 70),
}  # fmt: skip
FOLIAGE: dict[str, Colour] = {
    "spring": (138, 176, 92), "summer": (74, 122, 66), "autumn": (198, 122, 52),
    "winter": (104, 88, 78),
}  # fmt: skip
WEATHERS = ("clear", "clear", "cloudy", "cloudy", "overcast", "rain", "fog", "snow")  # as likely
# Sky at the zenith, sky at the horizon, light that falls on everything.
SKIES: dict[str, tuple[Colour, Colour, tuple[float, float, float]]] = {
    "clear": ((96, 152, 214), (204, 226, 240), (1.05, 1.03, 0.98)),
    "cloudy": ((124, 164, 206), (214, 226, 234), (1.0, 1.0, 1.0)),
    "overcast": ((168, 176, 186), (212, 214, 216), (0.9, 0.92, 0.95)),
    "rain": ((116, 126, 140), (170, 178, 186), (0.76, 0.8, 0.86)),
    "fog": ((196, 200, 204), (222, 222, 222), (0.92, 0.93, 0.95)),
    "snow": ((186, 194, 206), (226, 230, 236), (0.95, 0.97, 1.02)),
    "dawn": ((150, 160, 204), (250, 204, 178), (1.0, 0.9, 0.86)),
    "dusk": ((92, 84, 142), (246, 156, 104), (0.84, 0.68, 0.66)),
    "night": ((14, 20, 48), (48, 58, 98), (0.5, 0.54, 0.74)),
}
LAMPLIGHT: Colour = (255, 214, 128)
