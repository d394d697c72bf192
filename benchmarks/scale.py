"""python -m benchmarks.scale --images 5000 10000 20000

How time and memory of data_prep grow with the number of images: drawn façades with near-duplicates,
wrong labels and broken files, each size in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data_prep.prepare import prepare
from data_prep.sources.facades import paint_facades
from nicheclip.domain import Domain
from nicheclip.evaluation.summary import format_table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 10000, 20000])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scale"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args.one, args.out)))
        return
    rows = []
    for images in args.images:
        command = [
            sys.executable,
            "-m",
            "benchmarks.scale",
            "--one",
            str(images),
            "--out",
            str(args.out),
        ]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
        )
        rows.append(
            [
                f"{found['images']}",
                f"{found['seconds']:.0f}",
                f"{1000 * found['seconds'] / found['images']:.1f}",
                f"{found['peak_mb']:.0f}",
                f"{found['peak_mb'] - found['idle_mb']:.0f}",
            ]
        )
    print(format_table(["images", "seconds", "ms an image", "peak MB", "above the imports"], rows))


def _measure(images: int, out: Path) -> dict[str, float]:
    domain = Domain.load("domains/facades")
    run = out / str(images)
    scale = images / 2280
    options = {name: round(size * scale) for name, size in {
        "smallest_class": 20, "largest_class": 120, "validation": 30, "calibration": 40, "test": 60,
    }.items()}  # fmt: skip
    domain = domain.model_copy(
        update={"source": domain.source.model_copy(update={"options": options})}
    )
    paint_facades(run / "images", list(domain.clusters.values()), 0, **options)
    idle = psutil.Process().memory_info().rss / 2**20
    started = time.perf_counter()
    report = prepare(domain, run)
    return {
        "images": report["counts"]["read"],
        "seconds": time.perf_counter() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "idle_mb": idle,
    }


if __name__ == "__main__":
    main()
