"""python -m benchmarks.onnx_latency [--threads 2] [--rounds 60]

How long one image takes in the visual tower: torch, ONNX in 32 bits, ONNX in 8 bits, in turn in one
process, with random weights of ViT-B/32 size. The article's gate is 200 ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from nicheclip.classifier import OnnxTower, VisualTower
from nicheclip.evaluation.summary import format_table
from nicheclip.publishing.onnx import export_tower, quantize

GATE = 200.0  # ms
WARM_UP = 5


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.onnx_latency", description=__doc__.split("\n", 1)[1]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tower = VisualTower(CLIPModel(CLIPConfig())).eval()  # the defaults of CLIPConfig are ViT-B/32
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        export_tower(tower, fp32)
        quantize(fp32, int8)
        sides = {
            "torch float32": tower,
            "ONNX float32": OnnxTower(fp32, args.threads),
            "ONNX INT8": OnnxTower(int8, args.threads),
        }
        sizes = [
            sum(p.numel() * 4 for p in tower.parameters()),
            fp32.stat().st_size,
            int8.stat().st_size,
        ]
        pixels = torch.randn(1, 3, 224, 224)
        cosine = (sides["ONNX INT8"](pixels) * tower(pixels)).sum().item()
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(WARM_UP + args.rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                side(pixels)
                if turn >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - started))
    reference = np.array(times["torch float32"])
    rows = [
        [
            name,
            f"{np.median(each):.1f}",
            f"{np.percentile(each, 95):.1f}",
            f"{np.median(reference / np.array(each)):.2f}",
            f"{size / 1e6:.0f}",
            "pass" if np.percentile(each, 95) < GATE else "fail",
        ]
        for (name, each), size in zip(times.items(), sizes, strict=True)
    ]
    print(
        format_table(
            ["visual tower", "p50 ms", "p95 ms", "faster by", "MB", f"p95 < {GATE:.0f} ms"], rows
        )
    )
    print(
        f"{args.rounds} images one by one, {args.threads} threads; cosine of INT8 to torch "
        f"{cosine:.4f}"
    )


if __name__ == "__main__":
    main()
