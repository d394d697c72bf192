"""python -m model_card RUN [--push-to-hub REPO_ID] [--push-space REPO_ID] [--push-dataset REPO_ID]

Builds RUN/hub, exactly what is pushed: the calibrated CLIPModel, its processor, nicheclip.json,
prototypes.safetensors, scorecard.json, figures and the model card. A Space with the demo, and the
prepared dataset, go into repositories of their own. Each push is one commit; repositories are
private unless you say --public.
"""

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
    about = __doc__.split("\n", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m model_card", description=about)
    add = parser.add_argument
    add("run", type=Path, help="a run directory that calibrate.py has filled")
    add("--push-to-hub", metavar="REPO_ID", help="push to this repository, e.g. you/your-model")
    add("--push-space", metavar="REPO_ID", help="push the demo of the pushed model to this Space")
    add("--push-dataset", metavar="REPO_ID", help="push the prepared images (only if you may)")
    add("--public", action="store_true", help="make new repositories public (default: private)")
    add("--overwrite", action="store_true", help="replace a commit not pushed from this run")
    add("--dry-run", action="store_true", help="build, list files and sizes, and push nothing")
    add("--onnx", action="store_true", help="add the visual tower as ONNX, in 32 and in 8 bits")
    examples = "publish N test images for the demo (only if you may)"
    add("--examples", type=int, default=0, metavar="N", help=examples)
    index = "publish the images of these splits, or all, to be searched (only if you may)"
    add("--index", nargs="+", default=[], metavar="SPLIT", help=index)
    add("--license", default="other", help="the licence of the model, as the Hub names it")
    args = parser.parse_args()
    if args.push_space and not args.push_to_hub:
        parser.error("--push-space shows a pushed model: give --push-to-hub as well")
    try:
        publish(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"model_card: {error}")


def publish(args: argparse.Namespace) -> None:
    """Builds the folders of the repositories that are asked for, and lists or pushes them."""
    run, license_name = args.run, args.license
    build(run, license_name, args.push_to_hub, args.examples, args.onnx, args.index)
    domain = Domain.load(run)
    folders: list[tuple[RepoType, str, Path]] = [("model", args.push_to_hub, run / "hub")]
    if args.push_space:
        folders.append(("space", args.push_space, run / "space_hub"))
        with replaced_folder(run / "space_hub") as folder:
            write_space(folder, args.push_to_hub, domain.title, license_name)
    if args.push_dataset:
        folders.append(("dataset", args.push_dataset, run / "dataset_hub"))
        with replaced_folder(run / "dataset_hub") as folder:
            write_dataset(folder, load_prepared(run), domain, license_name)
    for repo_type, repo_id, folder in folders:
        print(f"built {folder}")
        if args.dry_run:
            sizes = {name: path.stat().st_size / 1e6 for name, path in files_of(folder).items()}
            for name, size in sizes.items():
                print(f"{size:10.2f} MB  {name}")
            print(f"{sum(sizes.values()):10.2f} MB  in {len(sizes)} files; nothing was pushed")
        elif repo_id:
            record, private = run / "pushed.json", not args.public
            print("pushed:", push(folder, repo_id, record, private, repo_type, args.overwrite))
    if not (args.push_to_hub or args.push_dataset or args.dry_run):
        print(
            f"figures in {run / 'figures'}\n"
            "the next three commands to try, after `source .venv/bin/activate`:\n"
            f"  python -m space {run}\n"
            f"  python -m model_card {run} --push-to-hub YOU/MODEL --dry-run\n"
            "  python -m data_prep.new_domain FOLDER --name YOUR_NICHE"
        )


if __name__ == "__main__":
    main()
