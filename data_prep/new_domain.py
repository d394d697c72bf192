"""python -m data_prep.new_domain FOLDER --name birds [--noun bird] [--base MODEL] [--out FILE]

Writes a domain file from class folders: FOLDER/<class>/<image>, or FOLDER/<split>/<class>/<image>.
Classes are the folders' names, prompts are templates, clusters and the length of the stages are
proposals: it trains as it is, and its comments say what is worth a person's time. Tells what it
found in the folder, and the next commands.
"""

from __future__ import annotations

import argparse
import logging
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from PIL import Image
from scipy.special import softmax
from transformers import CLIPTextConfig, CLIPVisionConfig

from data_prep.clusters import propose
from data_prep.sources.folders import SIDECARS, list_files, split_of
from nicheclip.clip import encode_texts, load_clip
from nicheclip.domain import Domain, class_key
from nicheclip.evaluation.intervals import format_table
from nicheclip.files import replaced_file
from nicheclip.images import readable_formats

BASE = "openai/clip-vit-base-patch32"
TEMPLATES = (
    "a photo of {a} {noun}",
    "a photo of {a} {noun}, a kind of {kind}",
    "a close-up photo of {a} {noun}",
    "{a} {noun} seen from a distance",
    "a snapshot of {a} {noun}",
)
SMALL_CLASS = 20  # below it a test split of a quarter holds 5 images or fewer
LEAST = 4  # one image for each split
FEW_CLASSES = 4  # which make one cluster
STEPS = 300  # of the first stage, roughly
BATCH = 48
WIDE = 512  # of a text tower: OpenAI's and larger
# Learning rates of the two stages: the article's for OpenAI's ViT-B/32, and for a narrow base
# between what validation has chosen on façades (3e-4) and on photographs (1e-3), docs/ablations.md.
RATES = {"wide": ("5.0e-6", "5.0e-7"), "narrow": ("5.0e-4", "5.0e-5")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.new_domain", description=__doc__.split("\n", 1)[1]
    )
    parser.add_argument(
        "folder", type=Path, help="one folder a class inside, its name that of the class"
    )
    parser.add_argument("--name", required=True, help="of the domain, in lower case, e.g. birds")
    parser.add_argument(
        "--noun",
        default="",
        help="what each class is, where its name alone is an adjective: a Gothic *building*",
    )
    parser.add_argument("--base", default=BASE, help=f"a Hub id or a folder (default: {BASE})")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: domains/NAME/domain.yaml)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if there is one")
    args = parser.parse_args(arguments)
    out = args.out or Path("domains") / args.name / "domain.yaml"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        survey = look_into(args.folder)
        domain = write_domain(survey, args.name, args.base, out, args.force, args.noun)
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep.new_domain: {error}")
    print(summary(survey, domain))
    print(f"\nwritten to {out}: look at its prompts and clusters, or go on with it as it is")
    print(f"next: python -m data_prep {out}\nthen:")
    run = f"runs/{args.name}"
    for command in (
        "accelerate launch train.py",
        "python calibrate.py",
        "python -m model_card",
        "python -m space",
    ):
        print(f"  {command} {run}")


@dataclass(frozen=True)
class Survey:
    """What lies in the folder.

    Attributes:
        images: how many files of each class folder begin like an image.
        splits: the splits that the folder gives.
        warnings: what a person should know, one line each.
    """

    folder: Path
    images: dict[str, int]
    splits: set[str]
    warnings: list[str]


def look_into(folder: Path) -> Survey:
    """Counts the images of each class; opens each file, and decodes none.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds fewer than two classes, or two whose names differ too little.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at '{folder}'; expected one that holds a folder of images a class"
        )
    images: Counter[str] = Counter()
    nested: defaultdict[str, set[str]] = defaultdict(set)
    splits, others = set(), []
    files = (path for path in list_files(folder) if path.name not in SIDECARS)
    top = {path.relative_to(folder).parts for path in files}
    deeper = {parts[0] for parts in top if len(parts) > 2}
    flat = {parts[0] for parts in top if len(parts) == 2} - deeper
    loose = [parts for parts in top if len(parts) == 1]
    for parts in sorted(top - set(loose)):
        split = split_of(parts, flat)
        if split:
            splits.add(split)
        name, *inner = parts[1:-1] if split else parts[:-1]
        if inner:
            nested[name].add(inner[0])
        if _begins_like_an_image(folder.joinpath(*parts)):
            images[name] += 1
        else:
            others.append("/".join(parts))
    _check_names(folder, images)
    warnings = _warnings(images, others, nested, ["/".join(parts) for parts in loose])
    return Survey(folder, dict(images), splits, warnings)


def _begins_like_an_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=readable_formats()):
            return True
    except Exception:  # decoders raise nearly anything for a broken file; data_prep will say what
        return False


def _check_names(folder: Path, images: dict[str, int]) -> None:
    if len(images) < 2:
        only = f"only the class '{next(iter(images))}'" if images else ""
        found = only or "no class folder with images"
        raise ValueError(
            f"{found} in '{folder}'; a classifier needs at least two, each a folder of images: "
            f"{folder}/wren/1.jpg"
        )
    by_key = defaultdict(list)
    for name in images:
        by_key[class_key(name)].append(name)
    for alike in by_key.values():
        if len(alike) > 1:
            raise ValueError(
                f"the folders {' and '.join(map(repr, alike))} name one class; put them together"
            )


def _warnings(
    images: dict[str, int], others: list[str], nested: dict[str, set[str]], loose: list[str]
) -> list[str]:
    by_size = sorted(images.items())
    tiny = [f"{name} ({count})" for name, count in by_size if count < LEAST]
    small = [f"{name} ({count})" for name, count in by_size if LEAST <= count < SMALL_CLASS]
    inside = sorted(f"{name}/{inner}" for name, inners in nested.items() for inner in inners)
    told = {
        f"fewer than {LEAST} images, which can't fill the four splits, so data_prep will "
        f"refuse: {_few(tiny)}; add images, or take the folders out": tiny,
        f"fewer than {SMALL_CLASS} images, so its own accuracy will say little: "
        f"{_few(small)}": small,
        f"folders inside of a class, whose images count as the class's: {_few(inside)}": inside,
        f"{len(others)} files that are no images, which data_prep will set aside: "
        f"{_few(others)}": others,
        f"{len(loose)} files outside of any class folder, left out: {_few(sorted(loose))}": loose,
    }
    return [warning for warning, names in told.items() if names]


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_domain(
    survey: Survey, name: str, base: str, out: Path, force: bool, noun: str = ""
) -> Domain:
    """Writes the domain file in one piece, once it has been loaded and found to be right.

    Args:
        noun: put after each class in its prompts, where classes are adjectives: "Gothic" -> "a
            Gothic building".

    Raises:
        FileExistsError: if there is one already, unless `force`.
        ValueError: if the name, or that of a class, does not suit a domain file.
    """
    if out.exists() and not force:
        raise FileExistsError(f"'{out}' exists; give --force to overwrite it, or another --out")
    text = _domain_file(survey, name, base, noun)
    with replaced_file(out) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        try:
            return Domain.load(unfinished)
        except ValueError as error:
            raise ValueError(str(error).replace(str(unfinished), str(out))) from error


def _domain_file(survey: Survey, name: str, base: str, noun: str) -> str:
    """The YAML, from the template.

    How long the stages are and how fast depends on the images and on the base.
    """
    names = [
        re.sub(r"[\s_]+|(?<=\w)-+(?=\w)", " ", folder).strip() for folder in sorted(survey.images)
    ]
    prompts = _prompts(names, noun, noun or _kind(name))
    local = _local_base(base)
    text = CLIPTextConfig.from_pretrained(local) if local else CLIPTextConfig()
    vision = CLIPVisionConfig.from_pretrained(local) if local else CLIPVisionConfig()
    clusters, origin = _clusters(prompts, local)
    middle = int(statistics.median(survey.images.values()))
    samples = min(280, max(24, middle))
    epoch = samples * len(names)
    batch = min(BATCH, epoch // 2)
    epochs = round(min(12, max(5, STEPS * batch / epoch)))
    return _template().render(
        survey=survey,
        name=name,
        title=name[0].upper() + re.sub(r"[-_.]", " ", name[1:]),
        base=Path(base).resolve().as_posix() if Path(base).is_dir() else base,
        prompts=prompts,
        clusters=clusters,
        origin=origin,
        middle=middle,
        samples=samples,
        batch=batch,
        epochs=(epochs, max(3, epochs // 2)),
        rates=RATES["wide" if text.hidden_size >= WIDE else "narrow"],
        blocks=min(2, vision.num_hidden_layers),
        hard_negatives=any(len(members) > 1 for members in clusters.values()) or not clusters,
        side=max(32, vision.image_size * 9 // 7),  # type: ignore[operator]  # CLIP's is one number
        smallest=min(survey.images.values()),
        small=SMALL_CLASS,
    )


def _prompts(names: list[str], noun: str, kind: str) -> dict[str, list[str]]:
    """The templates filled in for each class.

    Numbers before a name, as in "001.Wren", are left out.
    """
    plain = [re.sub(r"^\d+[ .]+(?=\D)", "", name).strip() for name in names]
    if len(set(plain)) < len(plain):
        plain = names
    called = [f"{name} {noun}".strip() for name in plain]
    return {
        name: [
            template.format(a="an" if of[0] in "aeiouAEIOU" else "a", noun=of, kind=kind)
            for template in TEMPLATES
        ]
        for name, of in zip(names, called, strict=True)
    }


def _kind(name: str) -> str:
    """Of what the classes are kinds: "birds" -> "bird"; a comment asks to correct it."""
    words = re.sub(r"[-_.]", " ", name).strip()
    for plural, singular in ((r"ies$", "y"), (r"(?<=[cs]h)es$", ""), (r"(?<!s)s$", "")):
        if re.search(plural, words):
            return re.sub(plural, singular, words)
    return words


def _local_base(base: str) -> str | None:
    """The folder that holds the base model, if it is here already.

    A big model is not fetched for a proposal.
    """
    if Path(base).is_dir():
        return base
    try:
        return snapshot_download(base, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _clusters(prompts: dict[str, list[str]], local: str | None) -> tuple[dict[str, list[str]], str]:
    """Classes whose prompts the base finds alike, or whose names share a word.

    And how that was found.
    """
    names = list(prompts)
    if len(names) <= FEW_CLASSES:
        return {"all": names}, "so few classes are one cluster"
    if local:
        model, processor = load_clip(local)
        text_embeds = [
            encode_texts(model, processor, own).mean(dim=0).cpu().numpy()
            for own in prompts.values()
        ]
        members = propose(_alike(np.stack(text_embeds), model.logit_scale.exp().item()))
        origin = "proposed from the base model's text_embeds of the prompts: a guess"
    else:
        members = propose(_shared_words(names))
        origin = "proposed from words that the names share, without the base model: a guess"
    if len(members) == len(names):
        return {}, "none proposed, since no classes stand out as alike: all of them are one cluster"
    return {
        f"c{n}": [names[index] for index in own] for n, own in enumerate(members, start=1)
    }, origin


def _alike(text_embeds: np.ndarray, scale: float) -> np.ndarray:
    """How likely each prompt is taken for another one, (C, C) symmetric; itself is left out."""
    text_embeds = text_embeds / np.linalg.norm(text_embeds, axis=1, keepdims=True)
    logits = scale * text_embeds @ text_embeds.T
    np.fill_diagonal(logits, -np.inf)
    taken_for = softmax(logits, axis=1)
    return (taken_for + taken_for.T) / 2


def _shared_words(names: list[str]) -> np.ndarray:
    """The share of words that two names have in common (Jaccard), (C, C) symmetric.

    0 on the diagonal.
    """
    words = [set(re.findall(r"\w+", name.casefold())) for name in names]
    shared = np.array([[len(a & b) / len(a | b) if a | b else 0 for b in words] for a in words])
    np.fill_diagonal(shared, 0)
    return shared


def summary(survey: Survey, domain: Domain) -> str:
    """Classes with their images, the smallest first, and the warnings, in plain text."""
    counts = sorted(survey.images.items(), key=lambda item: (item[1], item[0]))
    lines = [
        f"{sum(survey.images.values())} images of {len(counts)} classes in {survey.folder}; the "
        f"smallest class is {counts[0][0]} with {counts[0][1]}, the largest {counts[-1][0]} with "
        f"{counts[-1][1]}"
    ]
    if survey.splits:
        lines.append(
            f"splits given by folders: {', '.join(sorted(survey.splits))}; data_prep fills the "
            "others"
        )
    homes = {member: cluster for cluster, members in domain.clusters.items() for member in members}
    of_key = {class_key(name): name for name in domain.classes}
    rows = [[name, str(count), homes[of_key[class_key(name)]]] for name, count in counts]
    warnings = [f"warning: {warning}" for warning in survey.warnings]
    return "\n".join([*lines, *warnings, "", format_table(["folder", "images", "cluster"], rows)])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["scalar"] = _scalar
    return environment.get_template("new_domain.yaml.jinja")


def _scalar(value: Any) -> str:
    """As YAML on one line, quoted where it must be: a class may be called "no" or "1"."""
    return yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=float("inf")
    ).split("\n")[0]


if __name__ == "__main__":
    main()
