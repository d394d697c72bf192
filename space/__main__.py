"""python -m space RUN_OR_REPO_ID [--port N] [--share]

Opens the app of a run directory (its RUN/hub), of a published folder, or of a repository of the
Hub.
"""

import argparse
import sys

from space.app import LAUNCH, build_app


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m space", description=__doc__.split("\n", 1)[1])
    add = parser.add_argument
    add("source", metavar="RUN_OR_REPO_ID", help="a run, a published folder or a Hub repo id")
    add("--port", type=int, help="serve on this port (default: the first free one from 7860)")
    add("--share", action="store_true", help="also open a public gradio.live link")
    args = parser.parse_args()
    try:
        build_app(args.source).launch(server_port=args.port, share=args.share, **LAUNCH)
    except (ValueError, OSError) as error:
        sys.exit(f"space: {error}")


if __name__ == "__main__":
    main()
