"""The embedded default: drawn façades in class folders, with planted faults that are known.

The train pool is like photos from the web: some labels are wrong, some pictures come twice, some
files are broken, classes are uneven. The held-out splits are like what an expert has gone through:
evenly many, clean, rightly labelled.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data_prep.sources.rows import read_options
from domains.facades.painter import draw
from nicheclip.domain import Domain
from nicheclip.files import read_json, replaced_folder, write_json
from nicheclip.images import encode_jpeg

ATTRIBUTION = "drawn by NicheCLIP, CC0"


@dataclass(frozen=True)
class FacadeOptions:
    """How many drawings, and the faults of the train pool, as shares of it."""

    smallest_class: int = 20
    largest_class: int = 120
    validation: int = 30  # a class, as the next two
    calibration: int = 40
    test: int = 60
    wrong_labels: float = 0.08
    # one in four of them of a held-out drawing: a leak, if it is not found
    near_duplicates: float = 0.05
    unreadable: float = 0.01
    size: int = 96  # pixels


class Drawing(NamedTuple):
    """One file to paint."""

    name: str  # split/label/file
    label: str  # the class folder
    style: str  # that is drawn
    number: int  # of the drawing, the same for a copy
    broken: bool = False
    original: str | None = None  # the name of the drawing of which this is a near-duplicate


def write_images(folder: Path, domain: Domain, seed: int, **options: Any) -> Path:
    """Paints `folder`/<split>/<style>/*.jpg with metadata.jsonl and truth.json, unless it is done.

    `truth.json` holds wrong_labels {source_id: true style}, near_duplicates {source_id: source_id
    of the original} and unreadable [source_id], for `domains.facades.score`. Two of three wrong
    labels stay inside their cluster of the domain, as people's errors do. `options` are the fields
    of `FacadeOptions`.

    Raises:
        ValueError: for an option that does not exist, or if `folder` holds something else.
    """
    chosen = read_options(FacadeOptions, options)
    clusters = list(domain.clusters.values())
    order = {"seed": seed, "clusters": clusters, "attribution": ATTRIBUTION, **asdict(chosen)}
    truth_file = folder / "truth.json"
    if truth_file.is_file() and read_json(truth_file, "")["order"] == order:
        return folder
    if folder.exists() and not truth_file.is_file():
        raise ValueError(f"'{folder}' was not painted here; choose another --run")
    drawings = _plan(clusters, chosen, seed)
    lines = [json.dumps({"file_name": d.name, "attribution": ATTRIBUTION}) for d in drawings]
    truth = {
        "order": order,
        "wrong_labels": {d.name: d.style for d in drawings if d.label != d.style},
        "near_duplicates": {d.name: d.original for d in drawings if d.original},
        "unreadable": [d.name for d in drawings if d.broken],
    }
    with replaced_folder(folder) as unfinished, ProcessPoolExecutor() as pool:
        painting = partial(_paint_file, unfinished, seed, chosen.size)
        painted = pool.map(painting, drawings, chunksize=16)
        list(tqdm(painted, total=len(drawings), desc="painting façades", unit="img"))
        (unfinished / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(unfinished / "truth.json", truth)
    return folder


def _plan(clusters: list[list[str]], options: FacadeOptions, seed: int) -> list[Drawing]:
    """Every file to paint, faults included."""
    rng = np.random.default_rng(seed)
    styles = [style for cluster in clusters for style in cluster]
    held_out: list[Drawing] = []
    for split in ("validation", "calibration", "test"):
        for style in styles:
            for index in range(getattr(options, split)):
                name = f"{split}/{style}/{index:04d}.jpg"
                held_out.append(Drawing(name, style, style, len(held_out)))

    sizes = np.geomspace(options.smallest_class, options.largest_class, len(styles)).round()
    pool = np.repeat(styles, rng.permutation(sizes.astype(int))).tolist()
    fate = rng.permutation(len(pool))
    wrong = fate[: round(options.wrong_labels * len(pool))]
    broken = fate[len(pool) - round(options.unreadable * len(pool)) :]
    train = []
    for index, style in enumerate(pool):
        number, label = len(held_out) + index, style
        if index in wrong:
            cluster = next(cluster for cluster in clusters if style in cluster)
            near = [other for other in cluster if other != style]
            far = [other for other in styles if other not in cluster]
            label = str(rng.choice(near if near and rng.random() < 2 / 3 else far))
        name = f"train/{label}/{number:05d}.jpg"
        train.append(Drawing(name, label, style, number, broken=index in broken))

    readable = [drawing for drawing in train if not drawing.broken]
    for copy in range(round(options.near_duplicates * len(pool))):
        originals = held_out if copy % 4 == 0 else readable
        original = originals[rng.integers(len(originals))]
        name = f"train/{original.label}/copy{copy:04d}.jpg"
        train.append(original._replace(name=name, original=original.name))
    return held_out + train


def _paint_file(folder: Path, seed: int, size: int, drawing: Drawing) -> None:
    image = draw(drawing.style, np.random.default_rng([seed, drawing.number]), size)
    rng = np.random.default_rng([seed, drawing.number, 1])
    quality = 92
    if drawing.original:
        left, top, right, bottom = rng.integers(1, max(2, size // 24), size=4)
        image = image.crop((left, top, size - right, size - bottom))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        quality = int(rng.integers(60, 75))
    content = encode_jpeg(image, quality)
    if drawing.broken:
        content = content[: int(len(content) * rng.uniform(0, 0.6))]
    path = folder / drawing.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
