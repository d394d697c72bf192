"""A niche is one YAML file; `Domain.load` reads it, checks it, and says what to mend.

domain = Domain.load("domains/facades/domain.yaml")
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from nicheclip.files import replaced_file

Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
GatedMetric = Literal[
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "top_3_accuracy",
    "hard_negative_pass_rate",
    "semantic_recall_at_1",
    "image_recall_at_1",
    "image_recall_at_5",
    "ece",
    "nll",
    "brier",
    "aurc",
    "coverage",
    "selective_accuracy",
    "conformal_coverage",
    "noise_confidence_p95",
    "ood_auroc",
    "ood_fpr95",
    "same_answer",
]


class DomainError(ValueError):
    """A domain file that can't be used: names the file, the key, the value and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Origin(_Section):
    """Where images come from.

    `path` names class folders, a dataset (Hub id, Parquet or Arrow), or a module that writes class
    folders; `options` are passed on, see `data_prep.sources`.
    """

    path: str | None = None
    options: dict[str, Any] = {}

    @field_validator("kind", mode="before", check_fields=False)
    @classmethod
    def _former_kinds(cls, kind: Any) -> Any:
        if kind in ("facades", "shapes"):
            module = {"facades": "paint", "shapes": "shapes"}[kind]
            raise ValueError(
                f"the kind '{kind}' of older versions is a module now; write `kind: module` and "
                f"`path: domains.facades.{module}`"
            )
        return kind


class Source(_Origin):
    """Where the images of the domain come from; `--images` overrides its path."""

    kind: Literal["folder", "dataset", "commons", "module"] = "folder"

    @model_validator(mode="after")
    def _module_is_named(self) -> Source:
        if self.kind == "module" and self.path is None:
            raise ValueError("no path; give the module that draws, as domains.facades.paint")
        return self


class RetentionSource(_Origin):
    """Where the images of the retention task come from."""

    kind: Literal["folder", "dataset", "module"] = "folder"
    path: str


class Retention(_Section):
    """A zero-shot task outside of the domain: what the fine-tuned model should not forget."""

    title: Text
    source: RetentionSource
    classes: dict[Text, list[Text]]  # as those of the domain: prompts, the canonical one first
    images_per_class: int = Field(100, ge=1)  # at most; where there are more, a draw decides

    @field_validator("classes")
    @classmethod
    def _classes(cls, classes: dict[str, list[str]]) -> dict[str, list[str]]:
        return _checked_classes(classes)

    @property
    def canonical_prompts(self) -> list[str]:
        """The first prompt of each class, in class order: the zero-shot classifier."""
        return [prompts[0] for prompts in self.classes.values()]


class Splits(_Section):
    """What each held-out split takes of each class: an integer of images, or a share below 1."""

    validation: float = Field(0.15, gt=0)
    calibration: float = Field(0.15, gt=0)
    test: float = Field(0.25, gt=0)

    @field_validator("*")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(
                f"{value:g} is neither a share below 1 nor a whole number of images a class"
            )
        return value

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> Splits:
        shares = [share for share in (self.validation, self.calibration, self.test) if share < 1]
        if sum(shares) >= 1:
            raise ValueError(
                f"the shares add up to {sum(shares):g}, which leaves nothing to train on; lower "
                "them"
            )
        return self


class QualityFilter(_Section):
    """Which training images are suspected of a wrong label, and what becomes of them.

    `linear_probe`: the out-of-fold probability of the own label, from a linear probe on the base's
    image_embeds, is below `threshold` times the mean of the class. `zero_shot` (the article's):
    base CLIP's probability of the own label is below `threshold`. `max_drop_share` caps what one
    class may lose: a class that the base model does not know must not be deleted. `flag` drops
    nothing; either way the suspects are listed in RUN/review.csv.
    """

    mode: Literal["linear_probe", "zero_shot", "none"] = "linear_probe"
    threshold: Share | None = None  # default: 0.2 for linear_probe, 0.05 for zero_shot
    max_drop_share: float = Field(0.3, ge=0, lt=1)
    action: Literal["drop", "flag"] = "drop"


class Augmentation(_Section):
    """A fresh draw at each visit of a training image.

    Angles in degrees, the rest as factors or probabilities.
    """

    crop_scale: tuple[Share, Share] = (0.75, 1.0)  # share of the area that is kept
    horizontal_flip: Share = 0.5
    rotation: float = Field(5.0, ge=0, le=180)
    perspective: Share = 0.1  # largest shift of a corner, as a share of the side
    brightness: Share = 0.2
    contrast: Share = 0.2
    saturation: Share = 0.2
    hue: float = Field(0.02, ge=0, le=0.5)
    grayscale: Share = 0.05
    blur: Share = 0.1

    @field_validator("crop_scale")
    @classmethod
    def _order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two numbers, 0 < smallest <= largest <= 1")
        return value


class Stage(_Section):
    """One stage of training: which parameters train, for how long, how fast.

    `train` holds shell patterns over the parameter names of `CLIPModel`; `last_visual_blocks` adds
    that many transformer blocks from the end of the visual tower. `warmup` is a share of the
    stage's own steps.
    """

    name: Text
    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    train: list[Text]
    last_visual_blocks: int = Field(0, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)


class Domain(_Section):
    """Everything that makes a niche: classes, prompts, clusters, how to train, how to judge."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: Text
    description: Text
    base: Text  # a Hub id, or a folder relative to the domain file
    classes: dict[Text, list[Text]]
    # none: all classes are one cluster; `data_prep.clusters` proposes some
    clusters: dict[Text, list[Text]] = {}
    stages: list[Stage] = Field(min_length=1)
    gates: dict[GatedMetric, float]  # the target of each gated metric of the scorecard
    source: Source = Source()
    retention: Retention | None = None  # none: nobody looks what fine-tuning forgets
    splits: Splits = Splits()
    quality_filter: QualityFilter = QualityFilter()
    samples_per_class: int = Field(280, ge=1)
    smallest_side: int = Field(32, ge=1)  # pixels; smaller images are quarantined
    stored_short_side: int = Field(288, ge=32)  # pixels; images are stored shrunk to this
    augmentation: Augmentation = Augmentation()
    training: dict[str, Any] = {}  # any field of StagedTrainingArguments
    selective_accuracy: float = Field(0.95, gt=0, lt=1)  # what the abstention threshold aims at
    answered_share: float | None = Field(None, gt=0, le=1)  # instead: the coverage that it aims at
    # how often the prediction set should hold the label
    conformal_coverage: float = Field(0.9, gt=0, lt=1)

    @field_validator("classes")
    @classmethod
    def _classes(cls, classes: dict[str, list[str]]) -> dict[str, list[str]]:
        return _checked_classes(classes)

    @model_validator(mode="before")
    @classmethod
    def _former_names_and_no_clusters(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if "outside" in raw:
            raise ValueError("the key 'outside' of older versions is 'retention' now; rename it")
        if not raw.get("clusters") and isinstance(raw.get("classes"), dict):
            return raw | {"clusters": {"all": list(raw["classes"])}}
        return raw

    @model_validator(mode="after")
    def _clusters_fit_classes_and_gates(self) -> Domain:
        homes: dict[str, str] = {}
        for cluster, members in self.clusters.items():
            for member in members:
                if member not in self.classes:
                    close = _did_you_mean(member, self.classes)
                    raise ValueError(f"clusters.{cluster}: '{member}' is no class{close}")
                if homes.setdefault(member, cluster) != cluster or members.count(member) > 1:
                    raise ValueError(
                        f"clusters: class '{member}' is in '{homes[member]}' and in '{cluster}'; "
                        "keep it in one"
                    )
        if missing := [name for name in self.classes if name not in homes]:
            raise ValueError(
                f"clusters: {_quote(missing)} in no cluster; put it with the classes it is "
                "confused with, or alone"
            )
        alone = all(len(members) < 2 for members in self.clusters.values())
        if "hard_negative_pass_rate" in self.gates and alone:
            raise ValueError(
                "gates.hard_negative_pass_rate: no class shares its cluster with another, so "
                "nothing is a hard negative; remove the gate, or put classes that are confused "
                "into one cluster"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Domain:
        """Reads and checks a domain file.

        Args:
            path: the YAML file, or the folder that holds it as `domain.yaml`.
            overrides: top-level keys to replace, such as `base="…"`; None is ignored.

        Raises:
            DomainError: if it is missing or wrong; lists every problem with key, value, remedy.
        """
        path = Path(path)
        path = path / "domain.yaml" if path.is_dir() else path
        raw = _read(path)
        overrides = {key: value for key, value in overrides.items() if value is not None}
        folder = (
            Path(overrides["base"]) if "base" in overrides else path.parent / str(raw.get("base"))
        )
        raw |= overrides
        if folder.is_dir():
            raw["base"] = str(folder.resolve())
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
            raise DomainError(f"{path} can't be used:\n{problems}") from error

    def save(self, path: str | Path) -> None:
        """Writes the file in one piece."""
        fields = self.model_dump(mode="json")
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        with replaced_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @property
    def class_names(self) -> list[str]:
        """In the order of the class indices."""
        return list(self.classes)

    def indices(self, class_names: Iterable[str]) -> np.ndarray:
        """The index of each class name, (N,) int."""
        index_of = {name: index for index, name in enumerate(self.classes)}
        return np.array([index_of[name] for name in class_names])

    @property
    def canonical_prompts(self) -> list[str]:
        """The first prompt of each class, in class order: the zero-shot classifier."""
        return [prompts[0] for prompts in self.classes.values()]

    @property
    def prompt_bank(self) -> tuple[list[str], list[int]]:
        """All prompts, and the class index of each."""
        bank = [
            (prompt, index)
            for index, prompts in enumerate(self.classes.values())
            for prompt in prompts
        ]
        return [prompt for prompt, _ in bank], [index for _, index in bank]

    @property
    def class_clusters(self) -> list[int]:
        """The cluster index of each class, in class order."""
        homes = {
            name: index for index, members in enumerate(self.clusters.values()) for name in members
        }
        return [homes[name] for name in self.classes]

    @property
    def by_cluster(self) -> list[int]:
        """The class indices, those of one cluster side by side."""
        return [
            self.class_names.index(name) for members in self.clusters.values() for name in members
        ]


def _read(path: Path) -> dict[str, Any]:
    """The keys of a domain file, not checked yet."""
    if not path.is_file():
        raise DomainError(
            f"no domain file at '{path}'; expected a YAML file like domains/facades/domain.yaml"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    # PyYAML lets through what its constructors raise, as for a 13th month or a list as a key.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DomainError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise DomainError(
            f"{path} holds a {type(raw).__name__}; expected keys such as name, base, classes"
        )
    return raw


def _checked_classes(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    """The classes, if there are two or more, each with prompts and a name of its own.

    Raises:
        ValueError: if not.
    """
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} classes; a classifier needs at least two")
    owners: dict[str, str] = {}
    for name, prompts in classes.items():
        if not prompts:
            raise ValueError(
                f"class '{name}' has no prompt; give it at least one, the canonical one first"
            )
        for prompt in prompts:
            if owners.setdefault(prompt, name) != name:
                raise ValueError(
                    f"prompt '{prompt}' is in both '{owners[prompt]}' and '{name}'; reword one"
                )
    folded: dict[str, str] = {}
    for name in classes:
        if folded.setdefault(class_key(name), name) != name:
            raise ValueError(
                f"duplicate class: '{folded[class_key(name)]}' and '{name}'; remove one"
            )
    return classes


def class_key(name: str) -> str:
    """What spellings of one class share, whatever their case, accents' form, or "_", "-", " "."""
    composed = unicodedata.normalize("NFC", name)
    return re.sub(r"[\s_]+|(?<=\w)-+(?=\w)", " ", composed).strip().casefold()


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key}'; remove or rename one",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(problem: ErrorDetails) -> str:
    """One line of plain words for one of pydantic's problems."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_did_you_mean(location[-1], _fields_at(location[:-1]))}"
    if problem["type"] == "missing":
        return f"missing key '{key}'; add it (domains/facades/domain.yaml shows all keys)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch" or problem["type"] == "string_too_short":
        message = (
            "expected lower-case letters, digits, '-', '_' or '.'; rename it"
            if key == "name"
            else "expected some text"
        )
    value = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    return f"{key + ': ' if key else ''}{message}{value}"


def _fields_at(location: list[str]) -> Iterable[str]:
    """The keys of the section of the domain file that lies at `location`."""
    section: type[BaseModel] = Domain
    for name in location:
        if name in section.model_fields:
            annotation = section.model_fields[name].annotation
            kinds = [annotation, *get_args(annotation)]
            section = next(kind for kind in kinds if isinstance(kind, type(BaseModel)))
    return section.model_fields


def _did_you_mean(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of {_quote(candidates)}"


def _quote(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
