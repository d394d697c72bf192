"""python tests/lowest_versions.py > FILE

Prints the lowest versions that pyproject.toml allows, as constraints for pip. But for torch: the
early builds bring gigabytes of CUDA along, so it stays at the version of constraints.txt.
"""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, _, lowest = requirement.partition(">=")
        if lowest and name != "torch":
            print(f"{name}=={lowest}")
    print(
        *(
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.startswith("torch==")
        )
    )
