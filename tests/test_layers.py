"""Each package of the library imports only from those below it, and none of its users."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

LAYERS = [
    ("files", "domain", "processes"),
    ("images", "run", "cached_map"),
    ("clip",),
    ("evaluation",),
    ("classifier",),
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
            module = ROOT.joinpath(*node.module.split("."))
            names |= {
                f"{node.module}.{alias.name}" if module.is_dir() else node.module
                for alias in node.names
            }
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
    graph = {
        dotted(path): {name for name in imported(path) if name.startswith("nicheclip.")}
        for path in MODULES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_package_has_its_layer():
    assert {package(dotted(path)) for path in MODULES} == set(HEIGHT)
