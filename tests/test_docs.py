"""What README and docs say: files that exist, options that are known, commands that run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import calibrate
import train
from data_prep import clusters, new_domain
from nicheclip.domain import Domain
from tests.conftest import ROOT, tiny_facades
from tests.hub_server import HubServer
from tests.test_push import client, linked

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = {
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
}


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_of_the_project_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    own = [link for link in links if link and "://" not in link]
    assert [link for link in own if not (document.parent / link).exists()] == []
    rooms = "nicheclip|data_prep|model_card|space|benchmarks|tests|domains|docs"
    files = re.findall(rf"\b(?:{rooms})/[\w/.]+\.\w+", text)
    own = [file for file in files if not file.startswith("domains/birds")]
    assert [file for file in own if not (ROOT / file).exists()] == []


def test_the_rooms_of_the_documents_are_those_of_the_library():
    packages = {path.parent.name for path in (ROOT / "nicheclip").glob("*/__init__.py")}
    for name in ("README.md", "docs/architecture.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert packages <= set(re.findall(r"^ *(\w+)/  ", text, flags=re.MULTILINE)), name


def test_every_module_of_the_library_has_its_line_in_a_room():
    """docs/architecture.md names the modules at the root of the library."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "nicheclip").glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"\w+", text))


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """The options of all commands: ours, and those of the launchers."""
    said = [*launch_command_parser()._option_string_actions, get_args_parser().format_help()]
    mains = [calibrate.main, clusters.main, new_domain.main]
    modules = [f"{name}.__main__" for name in ("data_prep", "model_card", "space")]
    modules += [f"benchmarks.{name}" for name in BENCHMARKS]
    mains += [import_module(name).main for name in modules]
    domain = Domain.load(train.DEFAULT_DOMAIN)
    mains.append(lambda: train.parse_arguments(domain, Path("run"), ["--help"]))
    printed = "argparse.ArgumentParser._print_message"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", "--help"])
        patch.setattr(printed, lambda _, text, file=None: said.append(text))
        for main in mains:
            with pytest.raises(SystemExit):
                main()
    return {option for text in said for option in re.findall(r"--[a-z][\w-]*", text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_is_named_is_known(document, known_options):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text(encoding="utf-8")))
    assert named - known_options == set()


@pytest.mark.slow
def test_a_model_is_published_and_used_as_the_documents_say(run, tmp_path):
    own_run = linked(run, tmp_path)
    (tmp_path / "runs").mkdir()
    own_run.rename(tmp_path / "runs" / "birds")
    examples = sorted((run / "hub" / "examples").iterdir())
    shutil.copy(examples[0], tmp_path / "photo.jpg")
    with HubServer() as hub:
        (commands,) = blocks("docs/publishing.md", "bash")
        for command in commands.splitlines():
            _, *arguments = shlex.split(command)
            ended = client(hub, tmp_path / "home", *arguments, folder=tmp_path, path=ROOT)
            assert ended.returncode == 0, f"{command}\n{ended.stderr[-3000:]}"
        expected = {"you/your-model", "spaces/you/your-demo", "datasets/you/your-data"}
        assert hub.repositories.keys() == expected
        usages = blocks("README.md", "python")
        assert len(usages) == 2
        for usage in usages:
            used = client(hub, tmp_path / "fresh", "-c", usage, folder=tmp_path, path=ROOT)
            assert used.returncode == 0, used.stderr
            assert used.stdout.strip()


@pytest.mark.slow
def test_training_is_launched_as_the_documents_say(prepared, tmp_path):
    (commands,) = blocks("docs/scaling.md", "bash")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    modules = {"accelerate": "accelerate.commands.accelerate_cli"}
    modules["torchrun"] = "torch.distributed.run"
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for command in commands.splitlines():
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(prepared, tmp_path / "runs" / "birds")
        launcher, *arguments = shlex.split(command, comments=True)
        ranks = ["0", "1"] if "--node_rank" in arguments else ["0"]
        launched = []
        for rank in ranks:
            pairs = pairwise(["", *arguments])
            own = [rank if option == "--node_rank" else word for option, word in pairs]
            started = [sys.executable, "-m", modules[launcher], *own]
            launched.append(subprocess.Popen(started, cwd=tmp_path, env=environment, **piped))
        for process in launched:
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"{command}\n{said[-3000:]}"
        processes = 2 if len(ranks) == 2 or "2" in arguments else 1
        training = (tmp_path / "runs" / "birds" / "training.json").read_text()
        assert f'"processes": {processes}' in training


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "training_speed --size small --rounds 1 --steps 1 --out speed/found.json",
        "recipes tiny.yaml --seeds 1 --only zero_shot linear_probe ours no_filter --out recipes",
    ],
)
def test_the_benchmarks_of_the_documents_run(command, tmp_path):
    tiny_facades(tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    name, *options = command.split()
    command, environment = [sys.executable, "-m", f"benchmarks.{name}", *options], os.environ
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip()
