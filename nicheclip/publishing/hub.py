"""A plain CLIPModel with what the classifier needs beside, and how that gets to the Hub."""

import math
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from safetensors.torch import load_file, save_file

from nicheclip.classifier import FORMAT_VERSION, PROTOTYPES_FILE, SETTINGS_FILE
from nicheclip.clip import encode_texts, load_clip
from nicheclip.domain import Domain
from nicheclip.files import read_json, write_json
from nicheclip.run import CLASS_MEANS_FILE

RepoType = Literal["model", "dataset", "space"]
KEPT = {".gitattributes"}  # of a repository: the Hub's own
LOG_IN = "log in with `hf auth login`, with a token that may write there"
REMEDIES = {
    401: LOG_IN,
    403: LOG_IN,
    404: "check the name, and that your token may read and write there",
    412: "someone has committed there meanwhile; look at it, then push again",
    429: "the Hub has had too many requests from you; wait some minutes and push again",
}


def save_published_model(run: Path, folder: Path, domain: Domain, calibration: dict) -> None:
    """Writes model, processor, nicheclip.json and prototypes.safetensors into `folder`.

    softmax(logits / T) is what the published model's own softmax gives: log T is taken off its
    logit_scale.
    """
    model, processor = load_clip(run / "model")
    with torch.no_grad():
        model.logit_scale.sub_(math.log(calibration["temperature"]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    prompts, prompt_classes = domain.prompt_bank
    embeds = {
        "prototypes": encode_texts(model, processor, domain.canonical_prompts),  # (C, D)
        "prompt_embeds": encode_texts(model, processor, prompts),  # (P, D), by class in file order
        "prompt_classes": torch.tensor(prompt_classes),  # (P,)
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in embeds.items()}
    save_file(tensors | load_file(run / CLASS_MEANS_FILE), folder / PROTOTYPES_FILE)
    settings = {
        "format_version": FORMAT_VERSION,
        "title": domain.title,
        "class_names": domain.class_names,
        "prompts": domain.classes,
        "temperature": calibration["temperature"],
        "trained_logit_scale": calibration["trained_logit_scale"],
        "fitted_on": {"split": calibration["split"], "n": calibration["n"]},
        **{name: calibration[name] for name in ("abstention", "conformal", "ood")},
    }
    write_json(folder / SETTINGS_FILE, settings)


def push(
    folder: Path,
    repo_id: str,
    record: Path,
    private: bool = True,
    repo_type: RepoType = "model",
    overwrite: bool = False,
) -> str:
    """Makes a repository's content that of the folder, in one commit; gives its address.

    Large files that the Hub has already are not uploaded again.

    Args:
        record: a JSON file that remembers the last commit that was pushed to each repository.
        private: whether a new repository is.
        overwrite: whether to replace a commit that is not of this record.

    Raises:
        ValueError: if `repo_id` is none, or the repository is public and `private` is wanted.
        FileExistsError: if the repository's last commit is not of this record.
        OSError: with the remedy, if the Hub refuses or the connection is lost.
    """
    api, pushed = HfApi(), read_json(record, "") if record.is_file() else {}
    sdk = "gradio" if repo_type == "space" else None
    try:
        repo_id = api.create_repo(
            repo_id, private=private, repo_type=repo_type, space_sdk=sdk, exist_ok=True
        ).repo_id
        head = api.repo_info(repo_id, repo_type=repo_type)
        if private and not head.private:
            raise ValueError(f"'{repo_id}' is a public repository; say --public if you mean it")
        siblings = head.siblings or ()  # type: ignore[union-attr]  # it is no kernel
        there, name = {file.rfilename for file in siblings} - KEPT, f"{repo_type}:{repo_id}"
        if there and pushed.get(name) != head.sha and not overwrite:
            last = api.list_repo_commits(repo_id, repo_type=repo_type)[0]
            raise FileExistsError(
                f"the last commit of '{repo_id}', “{last.title}” by "
                f"{', '.join(last.authors) or 'unknown'} of {last.created_at:%Y-%m-%d %H:%M}, was "
                "not pushed from here; look at it, then replace it with --overwrite"
            )
        files = files_of(folder)
        added = [CommitOperationAdd(file, path) for file, path in files.items()]
        removed = [CommitOperationDelete(file) for file in sorted(there - files.keys())]
        # Not upload_folder: where Xet is installed it repeats and splits commits that fail, so half
        # a model can be public.
        commit = api.create_commit(
            repo_id,
            [*added, *removed],
            repo_type=repo_type,
            commit_message=f"NicheCLIP {repo_type}",
            parent_commit=head.sha,
        )
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is no name of a repository: {error}") from error
    # the client raises RuntimeError for a file that it could not upload
    except (HTTPError, RuntimeError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        remedy = REMEDIES.get(status, "try again; a push is one commit, nothing is half-published")
        raise OSError(f"the Hub did not take '{repo_id}': {error}; {remedy}") from error
    write_json(record, pushed | {name: commit.oid})
    return commit.commit_url


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their name in a repository."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in paths}
