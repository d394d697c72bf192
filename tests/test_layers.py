"""Each package of the library imports only from those below it, and none of its users."""

from __future__ import annotations

import ast
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
from setuptools import find_packages

from tests.conftest import ROOT

LAYERS = [
    ("files", "processes", "images", "head"),
    ("recipe",),
    ("domain",),
    ("run", "cached_map"),
    ("clip", "classifier"),
    ("evaluation",),
    ("training",),
    ("publishing",),
    ("__init__",),
]
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}
LIBRARY = ROOT / "nicheclip"
MODULES = sorted(LIBRARY.rglob("*.py"))


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nicheclip"):
            whole = not ROOT.joinpath(*node.module.split(".")).is_dir()
            names |= {node.module} if whole else {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def dotted(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def package(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_downwards(path):
    own = package(dotted(path))
    for name in imported(path):
        root = name.split(".")[0]
        assert root not in ("data_prep", "model_card", "space", "train", "calibrate", "benchmarks")
        if root == "nicheclip" and package(name) != own:
            assert HEIGHT[package(name)] <= HEIGHT[own], f"{dotted(path)} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {dotted(path): imported(path) for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_package_has_its_layer():
    assert {package(dotted(path)) for path in MODULES} == set(HEIGHT)


def test_the_classifier_needs_little():
    """Whoever loads a model needs no datasets, no scikit-learn, no training."""
    needed, waiting = set(), ["nicheclip.classifier"]
    while waiting:
        names = imported(ROOT.joinpath(*waiting.pop().split(".")).with_suffix(".py"))
        waiting += [name for name in names if name.startswith("nicheclip.")]
        needed |= {name.partition(".")[0] for name in names} - {"nicheclip"}
    third_party = set("torch transformers safetensors huggingface_hub PIL numpy tqdm".split())
    assert needed - sys.stdlib_module_names == third_party | {"onnxruntime"}


def test_the_library_is_installed_whole_and_alone():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = find_packages(ROOT, **settings["tool"]["setuptools"]["packages"]["find"])
    own = {dotted(path.parent) for path in LIBRARY.rglob("__init__.py")}
    assert set(found) == own
