"""From class folders to a domain file that trains as it is; and the document that promises so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.new_domain import look_into, main
from data_prep.sources.folders import read_folders
from domains.facades.painter import STYLES, draw
from nicheclip.domain import Domain
from nicheclip.files import read_json
from tests.conftest import FACADES, ROOT

BASE = str(FACADES / "base")


def photos(folder: Path, counts: dict[str, int]) -> Path:
    """Small pictures by class folder; what is on them does not matter."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")
    return folder


def write(folder: Path, *options: str, name: str = "birds") -> Domain:
    out = folder.parent / "domain.yaml"
    main([str(folder), "--name", name, "--out", str(out), "--force", *options])
    return Domain.load(out)


def test_classes_prompts_and_source_come_from_the_folders(tmp_path):
    counts = {"House_Sparrow": 24, "willow-tit": 25, "001.Auk": 26, "no": 24, "A-": 24, "été": 30}
    folder = photos(tmp_path / "photos", counts)
    domain = write(folder, "--base", BASE)
    names = {"001.Auk", "A-", "House Sparrow", "no", "willow tit", "été"}
    assert set(domain.class_names) == names
    prompts = ["a photo of an Auk", "a photo of an Auk, a kind of bird"]
    assert domain.classes["001.Auk"][:2] == prompts
    assert domain.classes["willow tit"][0] == "a photo of a willow tit"
    assert all(len(prompts) == 5 for prompts in domain.classes.values())
    assert (domain.source.kind, domain.source.path) == ("folder", str(folder))
    rows, outside = read_folders(domain.source.path, domain.class_names)
    assert (len(rows), outside) == (sum(counts.values()), [])
    assert domain.samples_per_class == 24
    assert domain.base == BASE


def test_adjectives_get_their_noun(tmp_path):
    folder = photos(tmp_path / "photos", {"Gothic": 24, "Art_Deco": 24})
    prompts = write(folder, "--base", BASE, "--noun", "building", name="styles").classes
    first = [own[0] for own in prompts.values()]
    assert first == ["a photo of an Art Deco building", "a photo of a Gothic building"]


@pytest.mark.parametrize(("many", "middle"), [(3, 5), (3, 900), (20, 100)])
def test_samples_fit_the_size_of_the_data(tmp_path, many, middle):
    counts = dict.fromkeys(map(str, range(many)), middle) | {"0": 4, "1": middle + 1}
    domain = write(photos(tmp_path / "photos", counts), "--base", BASE)
    assert domain.samples_per_class == {5: 24, 100: 100, 900: 280}[middle]
    assert domain.recipe == "default"


def test_a_large_base_sees_more_pixels(tmp_path):
    folder = photos(tmp_path / "photos", {"a": 4, "b": 4})
    bases = (BASE, "openai/clip-vit-base-patch32")
    small, large = (write(folder, "--base", base) for base in bases)
    assert (small.stored_short_side, large.stored_short_side) == (96 * 9 // 7, 288)


def test_clusters_are_what_the_base_finds_alike_or_share_a_word(tmp_path, capsys):
    """The façades' base knows from its texts alone; one that is not here knows nothing."""
    folder = photos(tmp_path / "photos", dict.fromkeys(STYLES, 4))
    domain, facades = write(folder, "--base", BASE, name="buildings"), Domain.load(FACADES)
    together = [set(members) for members in domain.clusters.values() if len(members) > 1]
    own = {name: cluster for cluster, members in facades.clusters.items() for name in members}
    pairs = [(a, b) for members in together for a in members for b in members if a < b]
    assert pairs and np.mean([own[a] == own[b] for a, b in pairs]) > 0.5
    names = ["blue tit", "coal tit", "song thrush", "mistle thrush", "wren"]
    domain = write(photos(tmp_path / "birds", dict.fromkeys(names, 4)), "--base", "nobody/nowhere")
    assert sorted(map(sorted, domain.clusters.values())) == [
        ["blue tit", "coal tit"], ["mistle thrush", "song thrush"], ["wren"]
    ]  # fmt: skip
    assert re.search(r"coal tit +4 +c1\n(.+\n)+wren +4 +c3\n", capsys.readouterr().out)
    folder = photos(tmp_path / "more", dict.fromkeys("abcdef", 4))
    domain = write(folder, "--base", "nobody/nowhere")
    assert list(domain.clusters) == ["all"]


def test_what_it_finds_is_said(tmp_path, capsys):
    folder = photos(tmp_path / "photos", {"wren": 30, "robin": 4, "tit": 2, "wren/nest": 1})
    (folder / "robin" / "notes.txt").write_text("no image")
    (folder / "robin" / ".DS_Store").write_text("hidden")
    (folder / "loose.png").write_bytes(b"")
    write(folder, "--base", "nobody/nowhere")
    told = capsys.readouterr().out
    assert "37 images of 3 classes" in told
    assert "the smallest class is tit with 2, the largest wren with 31" in told
    assert re.search(r"fewer than 4 images, .* data_prep will refuse: tit \(2\)", told)
    assert "fewer than 20 images, so its own accuracy will say little: robin (4)" in told
    assert "folders inside of a class, whose images count as the class's: wren/nest" in told
    assert "1 files that are no images, which data_prep will set aside: robin/notes.txt" in told
    assert "1 files outside of any class folder, left out: loose.png" in told
    assert f"next: python -m data_prep {tmp_path / 'domain.yaml'}" in told
    assert "accelerate launch train.py runs/birds" in told


def test_folders_that_give_the_splits(tmp_path, capsys):
    for split in ("train", "test"):
        photos(tmp_path / "photos" / split, {"wren": 20, "robin": 20})
    assert write(tmp_path / "photos", "--base", "nobody/nowhere").class_names == ["robin", "wren"]
    told = "splits given by folders: test, train; data_prep fills the others"
    assert told in capsys.readouterr().out
    found = look_into(photos(tmp_path / "exams", {"test": 5, "essay": 5}))
    assert (found.images, found.splits) == ({"test": 5, "essay": 5}, set())


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"wren": 5}, [], "only the class 'wren' .* at least two"),
        ({}, [], "no class folder with images"),
        ({"willow-tit": 5, "Willow_Tit": 5}, [], "'Willow_Tit' and 'willow-tit' name one class"),
        ({"a": 5, "b": 5}, ["--name", "Big"], "domain.yaml can't be used:\n.*lower-case"),
    ],
)
def test_what_can_not_become_a_domain_is_explained(tmp_path, counts, options, message):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit, match=f"^data_prep.new_domain: .*{message}"):
        write(photos(tmp_path / "photos", counts), "--base", "nobody/nowhere", *options)
    assert not list(tmp_path.glob("domain.yaml*"))


def test_nothing_is_overwritten_unless_forced(tmp_path):
    folder, out = photos(tmp_path / "photos", {"wren": 5, "robin": 5}), tmp_path / "own.yaml"
    out.write_text("mine")
    arguments = [str(folder), "--name", "birds", "--base", "nobody/nowhere", "--out", str(out)]
    with pytest.raises(SystemExit, match="'.*own.yaml' exists; give --force"):
        main(arguments)
    assert out.read_text() == "mine"
    main([*arguments, "--force"])
    assert Domain.load(out).name == "birds"
    told = "no folder at '.*nowhere'; expected one that holds a folder of images a class"
    with pytest.raises(SystemExit, match=told):
        main([str(tmp_path / "nowhere"), "--name", "birds"])


@pytest.mark.slow
def test_the_commands_of_the_document_lead_from_a_folder_to_a_scorecard_and_an_open_app(tmp_path):
    """As they stand in docs/your_own_niche.md; but for the base, which needs no download."""
    for number, style in enumerate(STYLES[:5]):
        (tmp_path / "photos" / style.replace(" ", "_")).mkdir(parents=True)
        for index in range(24):
            image = draw(style, np.random.default_rng([number, index]), 128)
            image.save(tmp_path / "photos" / style.replace(" ", "_") / f"{index}.jpg")
    for name in ("data_prep", "model_card", "nicheclip", "space", "train.py", "calibrate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "docs" / "your_own_niche.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    first = blocks[0].splitlines()
    assert len(first) == 6 and commands[: len(first)] == first
    for command in commands:
        words = shlex.split(command)
        if words[0] == "accelerate":
            launch = "python -m accelerate.commands.launch --num_processes 1 --cpu".split()
            words = launch + words[2:]
        if "data_prep.new_domain" in words:
            words += ["--base", BASE]
        words[0] = sys.executable
        if "space" in words:
            opens(words, tmp_path)
            continue
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    run = tmp_path / "runs" / "birds"
    assert read_json(run / "scorecard.json", "")["metrics"]["accuracy"]["n"] > 10
    assert (run / "hub" / "README.md").is_file()
    assert Domain.load(tmp_path / "domains" / "birds").name == "birds"


def opens(words: list[str], folder: Path) -> None:
    """The app says where it listens."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    app = subprocess.Popen(words, cwd=folder, **piped)
    try:
        until = time.monotonic() + 120
        while "Running on local URL" not in (line := app.stdout.readline()):
            assert line and time.monotonic() < until, "it ended, or did not open"
    finally:
        app.terminate()
        app.wait()
