"""The folder of a Gradio Space: the app with the code that it needs, and the model's name."""

import shutil
import sys
from importlib.metadata import packages_distributions, version
from modulefinder import ModuleFinder
from pathlib import Path

import yaml

CODE = Path(__file__).parents[1]


def code_of(module: str) -> tuple[set[Path], set[str]]:
    """The files of this project that a module needs, and the packages that those import on top."""
    finder = ModuleFinder([str(CODE)])
    finder.import_hook(module)
    files = {Path(path) for found in finder.modules.values() if (path := vars(found)["__file__"])}
    imported = {name.partition(".")[0] for name in finder.badmodules}  # it looks here alone
    return files, imported - sys.stdlib_module_names - {"nicheclip", "space"}


def write_space(folder: Path, model_id: str, title: str, license_name: str) -> None:
    """Writes the folder, with every version as installed here; the app loads `model_id`."""
    code, packages = code_of("space.app")
    # The Hub installs gradio by sdk_version, and without ONNX nobody needs onnxruntime.
    needed = packages - {"gradio", "onnxruntime"}
    projects = sorted({packages_distributions()[package][0] for package in needed})
    pins = [f"{name}=={version(name).partition('+')[0]}\n" for name in projects]
    for path in code:
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
        "requirements.txt": "".join(pins),
        "app.py": "from space.app import LAUNCH, build_app\n\n"
        f'build_app("{model_id}").launch(**LAUNCH)\n',
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
