"""python -m model_card RUN [--push-to-hub REPO_ID]

Builds RUN/hub, exactly what is pushed: the calibrated CLIPModel, its processor, nicheclip.json,
prototypes.safetensors, scorecard.json, figures and the model card.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_card.build import build
from nicheclip.hub import push


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_card", description=__doc__.split("\n", 1)[1])
    parser.add_argument("run", type=Path, help="a run directory that calibrate.py has filled")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="push to this repository, e.g. you/your-model")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument(
        "--examples", type=int, default=0, metavar="N", help="publish N test images for the demo (only if you may)"
    )
    parser.add_argument(
        "--index",
        nargs="+",
        default=[],
        metavar="SPLIT",
        help="publish the images of these splits, to be searched (only if you may)",
    )
    parser.add_argument("--license", default="other", help="the licence of the model, as the Hub names it")
    args = parser.parse_args()
    try:
        folder = build(args.run, args.license, args.push_to_hub, args.examples, index=args.index)
        print(f"built {folder}")
        if args.push_to_hub:
            print(f"pushed: {push(folder, args.push_to_hub, private=not args.public)}")
        else:
            print(
                f"figures in {args.run / 'figures'}\n"
                "the next three commands to try, after `source .venv/bin/activate`:\n"
                f"  python -m space {args.run}\n"
                f"  python -m model_card {args.run} --push-to-hub YOU/MODEL\n"
                "  python -m data_prep YOUR_DOMAIN.yaml --images FOLDER"
            )
    except (ValueError, OSError) as error:
        sys.exit(f"model_card: {error}")


if __name__ == "__main__":
    main()
