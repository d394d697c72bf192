"""The folder of a Gradio Space: the app with the code that it needs, and the name of the model that it shows."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import yaml

CODE = Path(__file__).parents[1]
# What the app imports. The Hub installs gradio by sdk_version.
NEEDED = (
    "datasets", "faiss-cpu", "huggingface_hub", "numpy", "pillow", "pydantic", "pyyaml", "safetensors", "scipy",
    "torch", "tqdm", "transformers",
)  # fmt: skip
MODULES = {
    "nicheclip": ("__init__", "classifier", "data", "domain", "image_index", "results"),
    "space": ("__init__", "app", "photo", "scorecard", "search"),
}


def write_space(folder: Path, model_id: str, title: str, license_name: str) -> None:
    """Writes the folder, with every version as installed here.

    Args:
        model_id: the repository of the model, which the app loads when it starts.
    """
    for package, modules in MODULES.items():
        (folder / package).mkdir()
        for module in modules:
            shutil.copy(CODE / package / f"{module}.py", folder / package)
    head = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "models": [model_id],
        "license": license_name,
    }
    files = {
        "README.md": f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"
        f"The demo of [{model_id}](https://huggingface.co/{model_id}). If that model is private, "
        "give this Space a secret `HF_TOKEN` that may read it.\n",
        "requirements.txt": "".join(
            f"{name}=={version(name).partition('+')[0]}\n" for name in NEEDED
        ),
        "app.py": f'from space.app import LAUNCH, build_app\n\nbuild_app("{model_id}").launch(**LAUNCH)\n',
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
