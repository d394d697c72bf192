"""Publishing through the real huggingface_hub client, against a small server of our own.

The client reads its endpoint when it is imported, so it runs in processes of its own; here is only
the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import CLIPModel, CLIPProcessor, pipeline

from nicheclip import NicheClassifier
from nicheclip.publishing.hub import push
from nicheclip.run import load_prepared
from tests.hub_server import READER, WRITER, Commit, File, HubServer, Repository

ROOT = Path(__file__).parents[1]
REPO_ID = "you/model"
EVERYWHERE = f"--push-to-hub {REPO_ID} --push-space you/demo --push-dataset you/data".split()


def client(
    hub: HubServer,
    home: Path,
    *arguments: object,
    xet: bool = False,
    folder: Path = ROOT,
    path: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs Python with a client of huggingface_hub that has the server's address and a token."""
    ours = ("HF_", "TRANSFORMERS_")
    environment = {name: v for name, v in os.environ.items() if not name.startswith(ours)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER}
    environment |= {"NO_PROXY": "127.0.0.1"} | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def call(hub: HubServer, home: Path, function: str, *arguments: object) -> list:
    """Calls a function of this module in a client's process.

    The server takes large files through git-LFS.
    """
    code = "import json, sys; from tests import test_push; "
    code += f"print(json.dumps(test_push.{function}(*sys.argv[1:])))"
    process = client(hub, home, "-c", code, *arguments)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def push_with_each(folder: str, record: str, *attempts: str) -> list[str]:
    """For each token, followed by " overwrite" or not, what a push gives: address or error."""
    results = []
    for attempt in attempts:
        os.environ["HF_TOKEN"], _, overwrite = attempt.partition(" ")
        try:
            results.append(push(Path(folder), REPO_ID, Path(record), overwrite=bool(overwrite)))
        except OSError as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def probabilities(source: str, data: str) -> list[list[list[float]]]:
    """Those of the test images, by stock CLIPModel and pipeline, and by ours."""
    images = [image.convert("RGB") for image in load_from_disk(data)["test"]["image"]]
    classifier = NicheClassifier.from_pretrained(source)
    prompts = [synonyms[0] for synonyms in classifier.settings["prompts"].values()]
    model, processor = CLIPModel.from_pretrained(source), CLIPProcessor.from_pretrained(source)
    with torch.inference_mode():
        outputs = model(**processor(text=prompts, images=images, padding=True, return_tensors="pt"))
    answers = pipeline("zero-shot-image-classification", model=source)(
        images, candidate_labels=prompts, hypothesis_template="{}"
    )
    scores = [{each["label"]: each["score"] for each in answer} for answer in answers]
    return [
        outputs.logits_per_image.softmax(dim=-1).tolist(),
        [[answer[prompt] for prompt in prompts] for answer in scores],
        classifier.probabilities(images).tolist(),
    ]


def linked(run: Path, tmp_path: Path) -> Path:
    """The shared run, for commands that build its hub folder anew."""
    own_run = tmp_path / "run"
    own_run.mkdir()
    for entry in run.iterdir():
        if entry.name not in ("hub", ".lock", ".holder"):
            (own_run / entry.name).symlink_to(entry)
    return own_run


def publish(
    hub: HubServer, run: Path, tmp_path: Path, *arguments: str, xet: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m model_card` on a run of its own."""
    command = ("-m", "model_card", linked(run, tmp_path), *arguments)
    return client(hub, tmp_path, *command, xet=xet)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(run: Path, tmp_path_factory) -> Iterator[tuple[HubServer, list[str]]]:
    """A server that was pushed to many times, and what each push gave."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        # A lost file, a lost connection, too many requests, a fault of the Hub.
        server.fail_next = [("POST", "/commit/", status) for status in (None, 429, 500)]
        server.fail_next.append(("PUT", "/lfs/", 403))
        attempts = ["hf_unknown", READER, *[WRITER] * 5]
        arguments = (run / "hub", home / "pushed.json", *attempts)
        yield server, call(server, home, "push_with_each", *arguments)


def test_a_refused_token_is_an_error_that_says_to_log_in(pushed):
    for message in pushed[1][:2]:
        assert REPO_ID in message and "`hf auth login`" in message and "may write" in message


def test_each_fault_is_an_error_with_its_remedy(pushed):
    assert pushed[0].fail_next == []
    remedies = ["try again", "try again", "wait some minutes", "try again"]
    for message, remedy in zip(pushed[1][2:6], remedies, strict=True):
        assert REPO_ID in message and remedy in message and "hf auth login" not in message


def test_a_push_is_one_commit_with_the_files_of_the_folder(pushed, run):
    server, results = pushed
    repository = server.repositories[REPO_ID]
    assert repository.private
    # One, although pushes failed before: those left nothing.
    commits = [f"{server.url}/{REPO_ID}/commit/{each.oid}" for each in repository.commits[1:]]
    assert commits == results[6:]
    folder = run / "hub"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    published = {path: file.content for path, file in repository.at("main").files.items()}
    assert published.pop(".gitattributes")
    assert published == files
    assert repository.at("main").files["model.safetensors"].lfs


def test_a_large_file_is_uploaded_once_however_often_the_push_was_interrupted(pushed):
    uploads = pushed[0].uploads
    assert len(uploads) == len(set(uploads)) > 0


@pytest.mark.slow
def test_an_upload_that_is_cut_off_publishes_nothing_and_the_next_push_goes_on(hub, run, tmp_path):
    hub.fail_next = [("PUT", "/lfs/", None)] * 12  # the client tries each several times
    arguments = (run / "hub", tmp_path / "pushed.json", WRITER)
    (message,) = call(hub, tmp_path, "push_with_each", *arguments)
    assert "try again" in message
    assert len(hub.repositories[REPO_ID].commits) == 1
    hub.fail_next = []
    assert call(hub, tmp_path, "push_with_each", *arguments)[0].startswith(hub.url)


def test_someone_elses_commit_is_not_overwritten_unless_told(hub, run, tmp_path):
    folder, record = tmp_path / "hub", tmp_path / "pushed.json"
    shutil.copytree(run / "hub", folder)
    call(hub, tmp_path, "push_with_each", folder, record, WRITER)
    (folder / "scorecard.json").unlink()
    # from here, so nobody is overwritten
    call(hub, tmp_path, "push_with_each", folder, record, WRITER)
    repository = hub.repositories[REPO_ID]
    assert len(repository.commits) == 3
    assert "scorecard.json" not in repository.at("main").files  # what the folder lacks goes
    newer = {**repository.at("main").files, "README.md": File(b"mended by hand", lfs=False)}
    repository.commits.append(Commit("f" * 40, "A better card", newer))

    attempts = (WRITER, f"{WRITER} overwrite")
    refused, told = call(hub, tmp_path, "push_with_each", folder, record, *attempts)
    assert refused.startswith("FileExistsError")
    assert "A better card" in refused and "--overwrite" in refused
    assert told.startswith(hub.url)
    assert len(repository.commits) == 5
    assert repository.at("main").files["README.md"].content == (folder / "README.md").read_bytes()


def test_a_commit_that_comes_between_is_a_conflict(hub, run, tmp_path):
    hub.fail_next = [("POST", "/commit/", 412)]
    arguments = (run / "hub", tmp_path / "pushed.json", WRITER)
    (message,) = call(hub, tmp_path, "push_with_each", *arguments)
    assert "meanwhile" in message
    assert len(hub.repositories[REPO_ID].commits) == 1


def test_a_public_repository_gets_nothing_private(hub, run, tmp_path):
    hub.repositories[REPO_ID] = Repository(private=False)
    ended = publish(hub, run, tmp_path, "--push-to-hub", REPO_ID)
    assert ended.returncode == 1
    assert "is a public repository; say --public" in ended.stderr
    assert len(hub.repositories[REPO_ID].commits) == 1


def test_a_dry_run_lists_what_would_be_pushed_and_asks_nobody(hub, run, tmp_path):
    ended = publish(hub, run, tmp_path, *EVERYWHERE, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories == {}
    files = ("model.safetensors", "space/app.py", "requirements.txt", "data/train.parquet")
    for told in (*files, "nothing was pushed"):
        assert told in ended.stdout


@pytest.mark.slow
def test_space_and_dataset_have_repositories_the_cards_usage_works_and_the_space_boots(
    hub, run, tmp_path
):
    ended = publish(hub, run, tmp_path, *EVERYWHERE, "--index", "test")
    assert ended.returncode == 0, ended.stderr
    assert hub.repositories.keys() == {REPO_ID, "spaces/you/demo", "datasets/you/data"}

    table, data = tmp_path / "test.parquet", hub.repositories["datasets/you/data"].at("main")
    table.write_bytes(data.files["data/test.parquet"].content)
    rows = Dataset.from_parquet(str(table), cache_dir=str(tmp_path / "cache"))
    assert rows["source_id"][:] == load_prepared(run)["test"]["source_id"][:]

    space = tmp_path / "space"
    for name, file in hub.repositories["spaces/you/demo"].at("main").files.items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(file.content)
    card = hub.repositories[REPO_ID].at("main").files["README.md"].content.decode()
    (tmp_path / "photo.jpg").write_bytes(next((run / "hub" / "examples").iterdir()).read_bytes())
    usages = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(usages) == 2
    # as printed; the client's working directory is not the project's, so it is on the path
    for usage in usages:
        code = f"import sys; sys.path.append({str(ROOT)!r})\n{usage}"
        used = client(hub, tmp_path / "fresh", "-c", code, folder=tmp_path)
        assert used.returncode == 0, used.stderr
        assert used.stdout.strip()

    boot = "from space.app import build_app; print(len(build_app('you/model').blocks))"
    booted = client(hub, tmp_path / "fresh", "-c", boot, folder=space)
    assert booted.returncode == 0, booted.stderr
    assert int(booted.stdout) > 10


def test_what_is_loaded_from_the_hub_gives_the_scorecards_probabilities_for_a_hundred_images(
    pushed, run, tmp_path
):
    table, cache = str(run / "predictions.parquet"), str(tmp_path / "cache")
    measured = Dataset.from_parquet(table, cache_dir=cache)
    from_hub = np.array(call(pushed[0], tmp_path, "probabilities", REPO_ID, run / "data"))
    assert len(measured) >= 100
    for given in from_hub:
        np.testing.assert_allclose(given, np.array(measured["probabilities"]), rtol=0, atol=1e-5)


def test_a_failed_commit_publishes_nothing_and_ends_the_command_plainly(hub, run, tmp_path):
    # Xet is what users have. With it, HfApi.upload_folder repeats commits that fail and splits
    # them; push must not. No file is announced as large, so the client asks for no Xet storage.
    hub.lfs_suffixes = ()
    hub.fail_next = [("POST", "/commit/", 500)]
    ended = publish(hub, run, tmp_path, "--push-to-hub", REPO_ID, xet=True)
    assert ended.returncode == 1
    assert hub.fail_next == []
    assert len(hub.repositories[REPO_ID].commits) == 1
    assert "Traceback" not in ended.stderr
    message = ended.stderr[ended.stderr.index("model_card: ") :]
    assert REPO_ID in message and "500" in message and "try again" in message
