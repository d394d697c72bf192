"""A niche is one YAML file; `Domain.load` reads it, checks it, and says what to mend.

domain = Domain.load("domains/facades/domain.yaml")
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from nicheclip.files import read_yaml, replaced_file
from nicheclip.recipe import Section, Share, Stage, Text, check_order, recipe

GATED_METRICS = (
    "accuracy balanced_accuracy macro_f1 top_3_accuracy hard_negative_pass_rate "
    "semantic_recall_at_1 image_recall_at_1 image_recall_at_5 ece nll brier aurc coverage "
    "selective_accuracy conformal_coverage noise_confidence_p95 ood_auroc ood_fpr95 same_answer"
).split()


SPLITS = ("train", "validation", "calibration", "test")  # of `evaluation: holdout`


class DomainError(ValueError):
    """A domain file that can't be used: names the file, the key, the value and the remedy."""


def class_key(name: str) -> str:
    """What spellings of one class share, whatever their case, accents' form, or "_", "-", " "."""
    composed = unicodedata.normalize("NFC", name)
    return re.sub(r"[\s_]+|(?<=\w)-+(?=\w)", " ", composed).strip().casefold()


def _unmistakable(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    """The classes, if no name or prompt of one could be taken for another's."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, prompts in classes.items():
        if (other := names.setdefault(class_key(name), name)) != name:
            raise ValueError(f"duplicate class: '{other}' and '{name}'; remove one")
        for prompt in prompts:
            if (other := owners.setdefault(prompt, name)) != name:
                raise ValueError(f"prompt '{prompt}' is in both '{other}' and '{name}'; reword one")
    return classes


Prompts = Annotated[list[Text], Field(min_length=1)]  # the canonical one first
Classes = Annotated[dict[Text, Prompts], Field(min_length=2), AfterValidator(_unmistakable)]


class Source(Section):
    """Where images come from; `--images` overrides the path of the domain's.

    `path` names class folders, a dataset (Hub id, Parquet or Arrow), or a module that writes class
    folders; `options` are passed on, see `data_prep.sources`.
    """

    path: str | None = None
    options: dict[str, Any] = {}
    kind: Literal["folder", "dataset", "commons", "module"] = "folder"

    @field_validator("kind")
    @classmethod
    def _module_is_named(cls, kind: str, known: ValidationInfo) -> str:
        if kind == "module" and known.data.get("path", "") is None:
            raise ValueError("no path; give the module that draws, as domains.facades.paint")
        return kind


class RetentionSource(Source):
    """Where the images of the retention task come from."""

    path: str
    kind: Literal["folder", "dataset", "module"] = "folder"


class Retention(Section):
    """A zero-shot task outside of the domain: what the fine-tuned model should not forget."""

    title: Text
    source: RetentionSource
    classes: Classes
    images_per_class: int = Field(100, ge=1)  # at most; where there are more, a draw decides

    @property
    def canonical_prompts(self) -> list[str]:
        """The first prompt of each class, in class order: the zero-shot classifier."""
        return [prompts[0] for prompts in self.classes.values()]


class Splits(Section, validate_default=True):
    """What each held-out split takes of each class: an integer of images, or a share below 1."""

    validation: float = Field(0.15, gt=0)
    calibration: float = Field(0.15, gt=0)
    test: float = Field(0.25, gt=0)

    @field_validator("*")
    @classmethod
    def _leaves_something_to_train(cls, value: float, known: ValidationInfo) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a share below 1 nor a whole number of images")
        shares = sum(share for share in (*known.data.values(), value) if share < 1)
        if shares >= 1:
            raise ValueError(f"{shares:g} in all leaves nothing to train on; lower a share")
        return value


class QualityFilter(Section):
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


class Augmentation(Section):
    """A draw at each visit of an image: angles in degrees, the rest factors or probabilities."""

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


class Domain(Section):
    """Everything that makes a niche: classes, prompts, clusters, how to train, how to judge."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: Text
    description: Text
    base: Text  # a Hub id, or a folder relative to the domain file
    classes: Classes
    clusters: dict[Text, list[Text]] = Field({}, validate_default=True)  # none: all are one
    recipe: str | None = None  # of recipes.yaml; None: `stages` are the domain's own
    stages: list[Stage] = Field(min_length=1)
    gates: dict[str, float]  # the target of each, see `GATED_METRICS`
    source: Source = Source()
    retention: Retention | None = None  # none: nobody looks what fine-tuning forgets
    evaluation: Literal["holdout", "cross_fit"] = "holdout"  # docs/data.md tells them apart
    folds: int = Field(5, ge=3)  # of cross_fit
    splits: Splits = Splits()  # of holdout
    quality_filter: QualityFilter = QualityFilter()
    samples_per_class: int = Field(280, ge=1)
    smallest_side: int = Field(32, ge=1)  # pixels; smaller images are quarantined
    stored_short_side: int = Field(288, ge=32)  # pixels; images are stored shrunk to this
    augmentation: Augmentation = Augmentation()
    training: dict[str, Any] = {}  # any field of StagedTrainingArguments
    selective_accuracy: float = Field(0.95, gt=0, lt=1)  # what the abstention threshold aims at
    answered_share: float | None = Field(None, gt=0, le=1)  # instead: the coverage that it aims at
    conformal_coverage: float = Field(0.9, gt=0, lt=1)  # of the label by the prediction set

    @model_validator(mode="before")
    @classmethod
    def _recipe_has_stages(cls, raw: dict[str, Any]) -> dict[str, Any]:
        name, training = raw.get("recipe") or "default", raw.get("training") or {}
        if not isinstance(name, str) or not isinstance(training, dict) or "stages" in raw:
            return raw
        training = recipe(name).get("training", {}) | training
        return raw | {"recipe": name, "stages": recipe(name)["stages"], "training": training}

    @field_validator("stages")
    @classmethod
    def _can_follow_each_other(cls, stages: list[Stage]) -> list[Stage]:
        check_order(stages)
        return stages

    @field_validator("clusters", mode="wrap")
    @classmethod
    def _each_class_has_one(
        cls, raw: Any, check: Callable[[Any], dict], known: ValidationInfo
    ) -> dict[str, list[str]]:
        classes = known.data.get("classes", {})
        clusters = check(raw or {"all": list(classes)})
        members = [(name, f"in '{home}'") for home, names in clusters.items() for name in names]
        for name, home in members:
            if classes and name not in classes:
                raise ValueError(f"'{name}' {home} is no class{_did_you_mean(name, classes)}")
        for name in classes:
            homes = [home for member, home in members if member == name]
            if len(homes) != 1:
                raise ValueError(
                    f"class '{name}' is {' and '.join(homes) or 'in no cluster'}; keep it in one, "
                    "with the classes it is confused with, or alone"
                )
        return clusters

    @field_validator("gates")
    @classmethod
    def _can_be_judged(cls, gates: dict[str, float], known: ValidationInfo) -> dict[str, float]:
        for metric in gates:
            if metric not in GATED_METRICS:
                close = _did_you_mean(metric, GATED_METRICS)
                raise ValueError(f"'{metric}' is no metric of the scorecard{close}")
        clusters = known.data.get("clusters")
        alone = clusters and all(len(members) < 2 for members in clusters.values())
        if "hard_negative_pass_rate" in gates and alone:
            raise ValueError(
                "hard_negative_pass_rate: no class shares its cluster with another, so nothing is "
                "a hard negative; remove the gate, or join classes that are confused"
            )
        return gates

    @classmethod
    def load(cls, path: str | Path, base: str | None = None) -> Domain:
        """Reads and checks a domain file.

        Args:
            path: the YAML file, or the folder that holds it as `domain.yaml`.
            base: takes the place of the file's.

        Raises:
            DomainError: if it is missing or wrong; lists every problem with key, value, remedy.
        """
        path = Path(path)
        path = path / "domain.yaml" if path.is_dir() else path
        if not path.is_file():
            raise DomainError(f"no domain file at '{path}'; domains/facades/domain.yaml is one")
        try:
            raw = read_yaml(path)
        except ValueError as error:
            raise DomainError(error) from error
        folder = path.parent / str(raw.get("base")) if base is None else Path(base)
        if folder.is_dir() or base is not None:
            raw["base"] = str(folder.resolve()) if folder.is_dir() else base
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
            raise DomainError(f"{path} can't be used:\n{problems}") from error

    def save(self, path: str | Path) -> None:
        """Writes the file in one piece."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
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
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that the prepared images are divided into."""
        if self.evaluation == "holdout":
            return SPLITS
        return tuple(f"fold_{number}" for number in range(1, self.folds + 1))

    @property
    def canonical_prompts(self) -> list[str]:
        """The first prompt of each class, in class order: the zero-shot classifier."""
        return [prompts[0] for prompts in self.classes.values()]

    @property
    def prompt_bank(self) -> tuple[list[str], list[int]]:
        """All prompts, and the class index of each."""
        bank = list(self.classes.values())
        classes = [index for index, prompts in enumerate(bank) for _ in prompts]
        return [prompt for prompts in bank for prompt in prompts], classes

    @property
    def class_clusters(self) -> list[int]:
        """The cluster index of each class, in class order."""
        clusters = enumerate(self.clusters.values())
        homes = {name: index for index, members in clusters for name in members}
        return [homes[name] for name in self.classes]

    @property
    def by_cluster(self) -> np.ndarray:
        """The class indices (C,), those of one cluster side by side."""
        return self.indices(name for members in self.clusters.values() for name in members)


def _explain(problem: ErrorDetails) -> str:
    """One line of plain words for one of pydantic's problems."""
    *section, name = [str(part) for part in problem["loc"]] or ["recipe"]
    key = ".".join([*section, name])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_did_you_mean(name, _fields_at(section))}"
    if problem["type"] == "missing":
        return f"missing key '{key}'; add it (domains/facades/domain.yaml shows all keys)"
    if problem["type"] == "value_error":
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    message = problem["msg"]
    if problem["type"] == "string_pattern_mismatch":
        letters = "lower-case letters, digits, '-', '_' or '.'"
        message = f"expected {letters if key == 'name' else 'some text'}"
    return f"{key}: {message} (got {problem['input']!r})"


def _fields_at(location: list[str]) -> Iterable[str]:
    section: type[BaseModel] = Domain
    for name in location:
        if field := section.model_fields.get(name):
            kinds = [field.annotation, *get_args(field.annotation)]
            section = next(kind for kind in kinds if isinstance(kind, type(BaseModel)))
    return section.model_fields


def _did_you_mean(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    expected = ", ".join(f"'{candidate}'" for candidate in candidates)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of {expected}"
