"""python -m model_card RUN [--push-to-hub REPO_ID] [--push-space REPO_ID] [--dry-run]

Builds RUN/hub, exactly what is pushed: the calibrated CLIPModel, its processor, nicheclip.json,
prototypes.safetensors, scorecard.json, figures and the model card. A Space with the demo, and the
prepared dataset, go into repositories of their own. Each push is one commit; repositories are
private unless you say --public.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_card.build import build
from model_card.dataset import write_dataset
from nicheclip.domain import Domain
from nicheclip.files import replaced_folder
from nicheclip.publishing.hub import RepoType, files_of, push
from nicheclip.run import load_prepared
from space.publish import write_space


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model_card", description=__doc__.split("\n", 1)[1]
    )
    parser.add_argument("run", type=Path, help="a run directory that calibrate.py has filled")
    parser.add_argument(
        "--push-to-hub", metavar="REPO_ID", help="push to this repository, e.g. you/your-model"
    )
    parser.add_argument(
        "--push-space", metavar="REPO_ID", help="push the demo of the pushed model to this Space"
    )
    parser.add_argument(
        "--push-dataset",
        metavar="REPO_ID",
        help="push the prepared images, with attribution (only if you may)",
    )
    parser.add_argument(
        "--public", action="store_true", help="make new repositories public (default: private)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a commit that was not pushed from this run directory",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build, list files and sizes, and push nothing"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="publish N test images for the demo (only if you may)",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="add the visual tower as ONNX, in 32 and in 8 bits"
    )
    parser.add_argument(
        "--index",
        nargs="+",
        default=[],
        metavar="SPLIT",
        help="publish the images of these splits, to be searched (only if you may)",
    )
    parser.add_argument(
        "--license", default="other", help="the licence of the model, as the Hub names it"
    )
    args = parser.parse_args()
    if args.push_space and not args.push_to_hub:
        parser.error("--push-space shows a pushed model: give --push-to-hub as well")
    try:
        build(args.run, args.license, args.push_to_hub, args.examples, args.onnx, args.index)
        pushes: list[tuple[str, RepoType, Path]] = [(args.push_to_hub, "model", args.run / "hub")]
        if args.push_space:
            with replaced_folder(args.run / "space_hub") as folder:
                write_space(folder, args.push_to_hub, Domain.load(args.run).title, args.license)
            pushes.append((args.push_space, "space", args.run / "space_hub"))
        if args.push_dataset:
            with replaced_folder(args.run / "dataset_hub") as folder:
                write_dataset(folder, load_prepared(args.run), Domain.load(args.run), args.license)
            pushes.append((args.push_dataset, "dataset", args.run / "dataset_hub"))
        for repo_id, repo_type, folder in pushes:
            print(f"built {folder}")
            if args.dry_run:
                print(listing(folder))
            elif repo_id:
                record = args.run / "pushed.json"
                print(
                    "pushed: "
                    f"{push(folder, repo_id, record, not args.public, repo_type, args.overwrite)}"
                )
        if not (args.push_to_hub or args.push_dataset or args.dry_run):
            print(
                f"figures in {args.run / 'figures'}\n"
                "the next three commands to try, after `source .venv/bin/activate`:\n"
                f"  python -m space {args.run}\n"
                f"  python -m model_card {args.run} --push-to-hub YOU/MODEL --dry-run\n"
                "  python -m data_prep.new_domain FOLDER --name YOUR_NICHE"
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"model_card: {error}")


def listing(folder: Path) -> str:
    """What a push of the folder would publish."""
    sizes = {name: path.stat().st_size for name, path in files_of(folder).items()}
    lines = [f"{size / 1e6:10.2f} MB  {name}" for name, size in sizes.items()]
    return "\n".join(
        [*lines, f"{sum(sizes.values()) / 1e6:10.2f} MB  in {len(sizes)} files; nothing was pushed"]
    )


if __name__ == "__main__":
    main()
