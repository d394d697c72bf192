"""python -m benchmarks.filter_throughput

Images a second from 1.5-megapixel JPEG to zero-shot score: the article's loop (one image at a time
in float32) as it is printed and with its prompts encoded once, against data_prep (verify, shrink,
hash, store, encode in batches). The sides take turns, on a random CLIP of ViT-B/32 size.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from data_prep.encode import encode_rows
from data_prep.sources.folders import read_folders
from data_prep.sources.painter import STYLES, draw
from data_prep.verify import verify_rows
from nicheclip.cached_map import map_shards
from nicheclip.clip import encode_texts, zero_shot_logits
from nicheclip.domain import Domain
from nicheclip.evaluation.summary import format_table
from nicheclip.files import quiet_datasets

PROMPTS = [f"a photo of {name}" for name in Domain.load("domains/architecture").class_names]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, default=512, help="for data_prep; the loops take a sixteenth of them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    tokenizer = CLIPTokenizer.from_pretrained("domains/facades/base")
    processor = CLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as name, quiet_datasets():
        folder = Path(name)
        photos = _photos(folder / "images", args.images)
        few = photos[:: max(1, len(photos) // (args.images // 16))]
        sides: dict[str, tuple[int, Callable[[], object]]] = {
            "article's loop, as printed": (
                len(few) // 4,
                partial(_loop, model, processor, few[: len(few) // 4], True),
            ),
            "article's loop, prompts encoded once": (
                len(few),
                partial(_loop, model, processor, few, False),
            ),
            "data_prep": (len(photos), partial(_data_prep, model, processor, folder)),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds + 1):
            for side, (count, work) in sides.items():
                started = time.perf_counter()
                work()
                rates[side].append(count / (time.perf_counter() - started))
    rates = {side: values[1:] for side, values in rates.items()}  # the first round warms up
    ours = np.array(rates["data_prep"])
    rows = [
        [
            side,
            f"{np.median(values):.1f}",
            f"{np.min(values):.1f} to {np.max(values):.1f}",
            f"{np.median(ours / values):.2f}",
        ]
        for side, values in rates.items()
    ]
    print(format_table(["side", "images/s, median", "range", "data_prep is faster by"], rows))
    print(
        f"{args.rounds} rounds in turn, {torch.get_num_threads()} threads; the factor is the "
        "median of the rounds' own"
    )


def _photos(folder: Path, count: int) -> list[Path]:
    """Drawings of 1500 x 1000 pixels with the grain of a photo: about 450 kB each."""
    rng = np.random.default_rng(0)
    for index in range(count):
        picture = draw(STYLES[index % 2], np.random.default_rng(index), 250).resize((1500, 1000))
        pixels = np.asarray(picture, dtype=np.int16) + rng.normal(0, 6, (1000, 1500, 3)).astype(
            np.int16
        )
        path = folder / STYLES[index % 2] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=85)
        path.write_bytes(encoded.getvalue())
    return sorted(folder.rglob("*.jpg"))


@torch.no_grad()
def _loop(
    model: CLIPModel, processor: CLIPProcessor, photos: list[Path], encode_prompts: bool
) -> list[float]:
    text_embeds = encode_texts(model, processor, PROMPTS)
    scores = []
    for path in photos:
        pixels = processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")[
            "pixel_values"
        ]
        image_embeds = model.get_image_features(pixels).pooler_output
        if encode_prompts:
            text_embeds = encode_texts(model, processor, PROMPTS)
        image_embeds = image_embeds / image_embeds.norm(dim=-1, keepdim=True)
        scores.append((100 * image_embeds @ text_embeds.T).softmax(dim=-1)[0, 0].item())
    return scores


def _data_prep(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> np.ndarray:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    listed, _ = read_folders(folder / "images", list(STYLES[:2]))
    verify = partial(verify_rows, stored_short_side=288, smallest_side=32)
    rows: datasets.Dataset = map_shards(
        listed,
        verify,
        listed["source_id"][:],
        "",
        folder / "cache" / "verified",
        "verifying",
        parallel=True,
    )
    image_embeds = encode_rows(model, processor, rows, folder / "cache" / "encoded", "encoding")
    return softmax(
        zero_shot_logits(model, image_embeds, encode_texts(model, processor, PROMPTS)), axis=1
    )


if __name__ == "__main__":
    main()
