"""The published folder: a plain CLIPModel with the temperature folded in, and what the classifier needs beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors.torch import load_file, save_file

from nicheclip.classifier import FORMAT_VERSION, PROTOTYPES_FILE, SETTINGS_FILE, SHAPE_FILE
from nicheclip.domain import Domain
from nicheclip.results import write_json
from nicheclip.zero_shot import encode_texts, load_clip


def save_published_model(run: Path, folder: Path, domain: Domain, calibration: dict[str, Any]) -> None:
    """Writes model, processor, nicheclip.json and prototypes.safetensors into `folder`.

    softmax(logits / T) is what the published model's own softmax gives: log T is taken off its logit_scale.
    """
    model, processor = load_clip(run / "model")
    with torch.no_grad():
        model.logit_scale -= math.log(calibration["temperature"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    prototypes = encode_texts(model, processor, domain.canonical_prompts).cpu().contiguous()
    save_file({"prototypes": prototypes} | load_file(run / SHAPE_FILE), folder / PROTOTYPES_FILE)
    write_json(
        folder / SETTINGS_FILE,
        {
            "format_version": FORMAT_VERSION,
            "title": domain.title,
            "class_names": domain.class_names,
            "prompts": domain.classes,
            "clusters": domain.clusters,
            "temperature": calibration["temperature"],
            "trained_logit_scale": calibration["trained_logit_scale"],
            "fitted_on": {"split": calibration["split"], "n": calibration["n"]},
            "abstention": calibration["abstention"],
            "conformal": calibration["conformal"],
            "border": calibration["border"],
        },
    )


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads the folder as one commit and gives the address of the commit.

    Raises:
        OSError: with the remedy, if the Hub refuses or the connection is lost.
    """
    api = HfApi()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # Not upload_folder: where Xet is installed it repeats and splits commits that fail, so half a model can be public.
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.create_commit(repo_id, additions, commit_message="NicheCLIP model").commit_url
    except (HTTPError, RuntimeError) as error:  # the client raises RuntimeError for a file that it could not upload
        remedy = "try again; a push is one commit, so nothing is half-published"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            remedy = "log in with `hf auth login`, with a token that may write there"
        raise OSError(f"the Hub did not take '{repo_id}': {error}; {remedy}") from error
