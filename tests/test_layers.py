"""The core imports downwards only, and never from the rooms that use it."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT

# From the ground up; a module may import only from those before it.
ORDER = [
    "domain",
    "results",
    "pages",
    "launch",
    "run",
    "metrics",
    "calibration",
    "probe",
    "losses",
    "sampler",
    "stages",
    "towers",
    "data",
    "shards",
    "zero_shot",
    "outside",
    "wise_ft",
    "stability",
    "strange",
    "answers",
    "scorecard",
    "classifier",
    "image_index",
    "hub",
    "feature_cache",
    "callbacks",
    "training_args",
    "checkpoints",
    "trainer",
    "training_record",
    "__init__",
]


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nicheclip":
            names |= {f"nicheclip.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nicheclip").glob("*.py")), ids=lambda path: path.stem
)
def test_imports_point_downwards(path):
    below = ORDER[: ORDER.index(path.stem)]
    for name in imported(path):
        root, _, module = name.partition(".")
        assert root not in (
            "data_prep",
            "model_card",
            "space",
            "train",
            "calibrate",
            "domains",
            "benchmarks",
        ), name
        if root == "nicheclip":
            assert module in below, f"{path.name} imports {name}, which is not below it"


def test_the_classifier_needs_little():
    """The Space carries classifier.py along, so it must not pull in the rest."""
    roots = {name.partition(".")[0] for name in imported(ROOT / "nicheclip" / "classifier.py")}
    third_party = roots - {
        "__future__",
        "collections",
        "dataclasses",
        "io",
        "json",
        "math",
        "pathlib",
    }
    needed = {"torch", "transformers", "safetensors", "huggingface_hub", "PIL", "numpy"}
    assert third_party == needed | {"onnxruntime"}  # the last only for an ONNX backend
