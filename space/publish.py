"""The folder of a Gradio Space: the app with the code that it needs, and the model's name."""

from __future__ import annotations

import ast
import shutil
from importlib.metadata import version
from pathlib import Path

import yaml

CODE = Path(__file__).parents[1]
# What that code imports. The Hub installs gradio by sdk_version.
NEEDED = (
    "datasets faiss-cpu huggingface_hub numpy pillow pydantic pyyaml safetensors scipy torch tqdm "
    "transformers"
).split()


def modules(entry: str) -> set[Path]:
    """The files of this project that a module needs, itself and all `__init__.py` among them."""
    found: set[Path] = set()
    waiting = [CODE.joinpath(*entry.split(".")).with_suffix(".py")]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        folders = path.relative_to(CODE).parents[:-1]
        waiting += [CODE / folder / "__init__.py" for folder in folders]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                place = CODE.joinpath(*node.module.split("."))
                waiting += [place / f"{alias.name}.py" for alias in node.names]
                waiting += [place.with_suffix(".py"), place / "__init__.py"]
    return found


def write_space(folder: Path, model_id: str, title: str, license_name: str) -> None:
    """Writes the folder, with every version as installed here.

    Args:
        model_id: the repository of the model, which the app loads when it starts.
    """
    for path in modules("space.app"):
        copy = folder / path.relative_to(CODE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
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
        "requirements.txt": "".join(f"{n}=={version(n).partition('+')[0]}\n" for n in NEEDED),
        "app.py": "from space.app import LAUNCH, build_app\n\n"
        f'build_app("{model_id}").launch(**LAUNCH)\n',
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
