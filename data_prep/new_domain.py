"""python -m data_prep.new_domain FOLDER --name birds [--noun bird] [--base MODEL] [--out FILE]

Writes a domain file from class folders: FOLDER/<class>/<image>, or FOLDER/<split>/<class>/<image>.
Classes are the folders' names, prompts are templates, clusters are proposals: it trains as it is,
and its comments say what is worth a person's time. Tells what it found in the folder, and the next
commands.
"""

import argparse
import json
import logging
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from transformers import CLIPConfig

from data_prep.clusters import propose
from data_prep.sources.folders import SIDECARS, list_files, split_and_folders
from nicheclip.clip import encode_texts, load_clip, zero_shot_logits
from nicheclip.domain import Domain, class_key
from nicheclip.evaluation.intervals import format_table
from nicheclip.files import replaced_file
from nicheclip.images import readable_formats
from nicheclip.publishing.pages import environment

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
MOST_CROSS_FITTED = 20_000  # images; so many can spare an exam, and trainings take long
FEW_CLASSES = 4  # which make one cluster


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    about = __doc__.split("\n", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m data_prep.new_domain", description=about)
    add = parser.add_argument
    add("folder", type=Path, help="one folder a class inside, named as the class")
    add("--name", required=True, help="of the domain, in lower case, e.g. birds")
    add("--noun", default="", help="what the classes are, if adjectives: a Gothic *building*")
    add("--base", default=BASE, help=f"a Hub id or a folder (default: {BASE})")
    add("--out", type=Path, help="default: domains/NAME/domain.yaml")
    add("--force", action="store_true", help="overwrite the file if there is one")
    args = parser.parse_args(arguments)
    out = args.out or Path("domains") / args.name / "domain.yaml"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if out.exists() and not args.force:
            raise FileExistsError(f"'{out}' exists; give --force to overwrite it, or another --out")
        survey = look_into(args.folder)
        domain = write_domain(out, domain_file(survey, args.name, args.base, args.noun))
    except (ValueError, OSError) as error:
        sys.exit(f"data_prep.new_domain: {error}")
    print(summary(survey, domain))
    print(f"\nwritten to {out}: look at its prompts and clusters, or go on with it as it is")
    print(f"next: python -m data_prep {out}\nthen:")
    stages = ("accelerate launch train.py", "python calibrate.py", "python -m model_card")
    for command in (*stages, "python -m space"):
        print(f"  {command} runs/{args.name}")


@dataclass(frozen=True)
class Survey:
    """What lies in the folder."""

    folder: Path
    images: dict[str, int]  # files of each class that begin like an image, in the order of names
    splits: set[str]  # that folders give
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
    paths = [path.relative_to(folder) for path in list_files(folder) if path.name not in SIDECARS]
    deeper = {path.parts[0] for path in paths if len(path.parts) > 2}
    flat = {path.parts[0] for path in paths if len(path.parts) == 2} - deeper
    placed = [(path.as_posix(), *split_and_folders(path.parts, flat)) for path in paths]
    inside = [(path, folders) for path, _, folders in placed if folders]
    is_image = {path: _begins_like_an_image(folder / path) for path, _ in inside}
    others = [path for path in is_image if not is_image[path]]
    images = Counter(folders[0] for path, folders in inside if is_image[path])
    if len(images) < 2:
        only = f"only the class '{next(iter(images))}'" if images else "no class folder with images"
        raise ValueError(f"{only} in '{folder}'; expected at least two, as {folder}/wren/1.jpg")
    counts = dict(sorted(images.items()))
    by_key: dict[str, str] = {}
    for name in counts:
        if (other := by_key.setdefault(class_key(name), name)) != name:
            raise ValueError(f"the folders '{other}' and '{name}' name one class; join them")
    loose = [path for path, _, folders in placed if not folders]
    nested = sorted({"/".join(folders[:2]) for _, folders in inside if len(folders) > 1})
    tiny = [f"{name} ({count})" for name, count in counts.items() if count < LEAST]
    small = [f"{name} ({count})" for name, count in counts.items() if LEAST <= count < SMALL_CLASS]
    told = {
        f"fewer than {LEAST} images, one for each split, so data_prep will refuse": tiny,
        f"fewer than {SMALL_CLASS} images, so its own accuracy will say little": small,
        "folders inside of a class, whose images count as the class's": nested,
        f"{len(others)} files that are no images, which data_prep will set aside": others,
        f"{len(loose)} files outside of any class folder, left out": loose,
    }
    warnings = [f"{what}: {_few(names)}" for what, names in told.items() if names]
    splits = {split for _, split, folders in placed if split and folders}
    return Survey(folder, counts, splits, warnings)


def _begins_like_an_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=readable_formats()):
            return True
    except Exception:  # decoders raise nearly anything for a broken file; data_prep will say what
        return False


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def domain_file(survey: Survey, name: str, base: str, noun: str) -> str:
    """The YAML, with what depends on the images and on the base."""
    names = [re.sub(r"[\s_]+|(?<=\w)-+(?=\w)", " ", folder).strip() for folder in survey.images]
    prompts = _prompts(names, noun, noun or _kind(name))
    local: str | None = base
    config: Any
    try:
        config = CLIPConfig.from_pretrained(base, local_files_only=True)
    except OSError:  # it is not here, and a big model is not fetched for a proposal
        local, config = None, CLIPConfig()
    clusters, origin = _clusters(prompts, local)
    middle = int(statistics.median(survey.images.values()))
    templates = environment(Path(__file__).parent)
    templates.autoescape = False
    page = templates.get_template("new_domain.yaml.jinja")
    return page.render(
        quoted=partial(json.dumps, ensure_ascii=False),  # which is YAML, whatever a class is called
        survey=survey,
        name=name,
        title=name[0].upper() + re.sub(r"[-_.]", " ", name[1:]),
        base=Path(base).resolve().as_posix() if Path(base).is_dir() else base,
        prompts=prompts,
        clusters=clusters,
        origin=origin,
        middle=middle,
        samples=min(280, max(24, middle)),
        cross_fit=_cross_fit(survey),
        hard_negatives=not clusters or any(len(members) > 1 for members in clusters.values()),
        side=max(32, config.vision_config.image_size * 9 // 7),
        small=SMALL_CLASS,
    )


def _cross_fit(survey: Survey) -> bool:
    """Whether there are too few images to hold some of them back, and no exam of their own."""
    own_exam = survey.splits - {"train"}
    return not own_exam and sum(survey.images.values()) < MOST_CROSS_FITTED


def _prompts(names: list[str], noun: str, kind: str) -> dict[str, list[str]]:
    """The templates filled in; numbers before a name, as in "001.Wren", are left out."""
    plain = [re.sub(r"^\d+[ .]+(?=\D)", "", name) for name in names]
    if len(set(plain)) < len(plain):
        plain = names
    prompts = {}
    for name, short in zip(names, plain, strict=True):
        filled = {"a": "an" if short[0] in "aeiouAEIOU" else "a", "kind": kind}
        called = f"{short} {noun}".strip()
        prompts[name] = [template.format(noun=called, **filled) for template in TEMPLATES]
    return prompts


def _kind(name: str) -> str:
    """Of what the classes are kinds: "birds" -> "bird"; a comment asks to correct it."""
    words = re.sub(r"[-_.]", " ", name).strip()
    for plural, singular in ((r"ies$", "y"), (r"(?<=[cs]h)es$", ""), (r"(?<!s)s$", "")):
        words = re.sub(plural, singular, words)
    return words


def _clusters(prompts: dict[str, list[str]], base: str | None) -> tuple[dict[str, list[str]], str]:
    """Classes whose prompts the base finds alike, or whose names share a word; and which it was."""
    names = list(prompts)
    if len(names) <= FEW_CLASSES:
        return {"all": names}, "so few classes are one cluster"
    clusters = propose(names, _alike(prompts, base) if base else _shared_words(names))
    if len(clusters) == len(names):
        return {}, "none proposed, since no classes stand out as alike: all of them are one cluster"
    by_words = "words that the names share, without the base model"
    asked = "the base model's text_embeds of the prompts" if base else by_words
    return clusters, f"proposed from {asked}: a guess"


def _alike(prompts: dict[str, list[str]], base: str) -> np.ndarray:
    """How likely each class is taken for another one, (C, C) symmetric; itself is left out."""
    model, processor = load_clip(base)
    means = [encode_texts(model, processor, own).mean(dim=0) for own in prompts.values()]
    prototypes = torch.nn.functional.normalize(torch.stack(means), dim=-1)  # (C, D)
    logits = zero_shot_logits(model, prototypes.cpu().numpy(), prototypes)
    np.fill_diagonal(logits, -np.inf)
    taken_for = softmax(logits, axis=1)
    return (taken_for + taken_for.T) / 2


def _shared_words(names: list[str]) -> np.ndarray:
    """The share of words that two names have in common (Jaccard), (C, C); diagonal 0."""
    words = [set(re.findall(r"\w+", name.casefold())) for name in names]
    shared = np.array([[len(a & b) / max(len(a | b), 1) for b in words] for a in words])
    np.fill_diagonal(shared, 0)
    return shared


def write_domain(out: Path, text: str) -> Domain:
    """Writes the domain file in one piece, once it has been loaded and found to be right.

    Raises:
        ValueError: if the name, or that of a class, does not suit a domain file.
    """
    with replaced_file(out) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        try:
            return Domain.load(unfinished)
        except ValueError as error:
            raise ValueError(str(error).replace(str(unfinished), str(out))) from error


def summary(survey: Survey, domain: Domain) -> str:
    """Classes with their images, the smallest first, and the warnings, in plain text."""
    counts = survey.images.items()
    homes = [list(domain.clusters)[index] for index in domain.class_clusters]
    rows = [[name, str(n), home] for (name, n), home in zip(counts, homes, strict=True)]
    rows.sort(key=lambda row: int(row[1]))
    (smallest, least, _), (largest, most, _) = rows[0], rows[-1]
    lines = [
        f"{sum(survey.images.values())} images of {len(rows)} classes in {survey.folder}; the "
        f"smallest class is {smallest} with {least}, the largest {largest} with {most}"
    ]
    if survey.splits:
        splits = ", ".join(sorted(survey.splits))
        lines.append(f"splits given by folders: {splits}; data_prep fills the others")
    if domain.evaluation == "cross_fit":
        lines.append(
            f"fewer than {MOST_CROSS_FITTED:,} images, so evaluation: cross_fit: each is examined "
            "once by a model that has not seen it, and the published model is trained on all"
        )
    lines += [f"warning: {warning}" for warning in survey.warnings]
    return "\n".join([*lines, "", format_table(["folder", "images", "cluster"], rows)])


if __name__ == "__main__":
    main()
