"""Publishing through the real huggingface_hub client, against a small server of our own instead of the Hub.

The client reads its endpoint when it is imported, so it runs in processes of its own; here is only the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from nicheclip import NicheClassifier
from nicheclip.hub import push
from tests.hub_server import READER, WRITER, HubServer

ROOT = Path(__file__).parents[1]
REPO_ID = "you/model"


def client(hub: HubServer, home: Path, *arguments: object, xet: bool) -> subprocess.CompletedProcess[str]:
    """Runs Python with a client of huggingface_hub that starts with nothing but the server's address and a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITER, "NO_PROXY": "127.0.0.1"}
    environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def call(hub: HubServer, home: Path, function: str, *arguments: object) -> list:
    """Calls a function of this module in a client's process; the server takes large files through git-LFS."""
    code = f"import json, sys; from tests import test_push; print(json.dumps(test_push.{function}(*sys.argv[1:])))"
    process = client(hub, home, "-c", code, *arguments, xet=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def push_with_each(folder: str, *tokens: str) -> list[str]:
    """For each token what a push with it gives: the address of the commit, or the message of the OSError."""
    results = []
    for token in tokens:
        os.environ["HF_TOKEN"] = token
        try:
            results.append(push(Path(folder), REPO_ID, private=True))
        except OSError as error:
            results.append(str(error))
    return results


def probabilities(source: str, *images: str) -> list[list[list[float]]]:
    """Those of the stock CLIPModel over the canonical prompts, and those of the NicheClassifier."""
    model = CLIPModel.from_pretrained(source)
    processor = CLIPProcessor.from_pretrained(source)
    classifier = NicheClassifier.from_pretrained(source)
    prompts = [synonyms[0] for synonyms in classifier.settings["prompts"].values()]
    pictures = [Image.open(image) for image in images]
    with torch.inference_mode():
        outputs = model(**processor(text=prompts, images=pictures, padding=True, return_tensors="pt"))
    return [outputs.logits_per_image.softmax(dim=-1).tolist(), classifier.probabilities(images).tolist()]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, list[str]]]:
    """A server that was pushed to five times, and what each push gave: four that had to fail, then a good one."""
    with HubServer() as server:
        # The third push loses a file on its way, the fourth its connection.
        server.fail_next = [("PUT", "/lfs/", 403), ("POST", "/commit/", None)]
        tokens = ["hf_unknown", READER, WRITER, WRITER, WRITER]
        yield server, call(server, tmp_path_factory.mktemp("home"), "push_with_each", run / "hub", *tokens)


def test_a_refused_token_is_an_error_that_says_to_log_in(pushed):
    for message in pushed[1][:2]:
        assert REPO_ID in message and "`hf auth login`" in message and "may write" in message


def test_a_lost_file_or_connection_is_an_error_that_says_to_try_again(pushed):
    assert pushed[0].fail_next == []
    for message in pushed[1][2:4]:
        assert REPO_ID in message and "try again" in message and "hf auth login" not in message


def test_a_push_is_one_commit_with_the_files_of_the_folder(pushed, run):
    server, results = pushed
    repository = server.repositories[REPO_ID]
    assert repository.private
    # One, although four pushes failed before: those left nothing.
    assert [f"{server.url}/{REPO_ID}/commit/{commit.oid}" for commit in repository.commits] == results[4:]
    folder = run / "hub"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: file.content for path, file in repository.at("main").files.items()} == files
    assert repository.at("main").files["model.safetensors"].lfs


def test_a_pushed_model_loads_from_its_repo_id_and_says_the_same(pushed, run, tmp_path):
    images = sorted(map(str, (run / "hub" / "examples").iterdir()))
    from_repo = np.array(call(pushed[0], tmp_path, "probabilities", REPO_ID, *images))
    assert from_repo.shape[:2] == (2, len(images))
    np.testing.assert_allclose(from_repo, probabilities(str(run / "hub"), *images), rtol=0, atol=1e-6)


def test_a_failed_commit_publishes_nothing_and_ends_the_command_plainly(hub, run, tmp_path):
    own_run = tmp_path / "run"  # the command builds its hub folder anew, and the shared run has to stay as it is
    own_run.mkdir()
    for entry in run.iterdir():
        if entry.name != "hub":
            (own_run / entry.name).symlink_to(entry)
    # Xet is what users have. With it, HfApi.upload_folder repeats commits that fail and splits them; push must not.
    # No file is announced as large, so the client asks for no Xet storage.
    hub.lfs_suffixes = ()
    hub.fail_next = [("POST", "/commit/", 500)]
    ended = client(hub, tmp_path, "-m", "model_card", own_run, "--push-to-hub", REPO_ID, xet=True)
    assert ended.returncode == 1
    assert hub.fail_next == []
    assert hub.repositories[REPO_ID].commits == []
    assert "Traceback" not in ended.stderr
    message = ended.stderr[ended.stderr.index("model_card: ") :]
    assert REPO_ID in message and "500" in message and "try again" in message
