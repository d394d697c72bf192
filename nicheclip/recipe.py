"""How to fine-tune: stages as data, and the recipes that have a name (recipes.yaml).

A list in place of a value is a grid: StagedTrainer tries its members, and validation chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nicheclip.files import read_yaml

RECIPES = read_yaml(Path(__file__).with_name("recipes.yaml"))
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(pattern=r"\S")]
Rate = Annotated[float, Field(gt=0)]
PROTOTYPES = "prototypes"
GRIDS = ("start", "sampling", "epochs", "learning_rate")  # fields whose values are all tried
Sampling = Literal["balanced", "natural"]
Value = TypeVar("Value")
# One value, or several to choose from.
Grid = Annotated[
    list[Value], BeforeValidator(lambda value: value if isinstance(value, list) else [value])
]


class Section(BaseModel):
    """A part of a domain file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(Section):
    """One stage of training: what trains, by which loss, for how long, how fast.

    Where a field is a grid, each combination is trained, and the lowest validation NLL wins; `mix`
    is chosen after that.

    Attributes:
        train: shell patterns over the parameter names of `CLIPModel`; `prototypes` are free class
            prototypes (C, D), which stand in for the text tower until a stage with the loss
            `distillation` has taught them to it.
        last_visual_blocks: so many transformer blocks from the end of the visual tower train too.
        epochs: of the sampled images; of 20 steps for `distillation`.
        warmup: share of the stage's steps.
        batch_size: at most, over all processes; default: `per_device_train_batch_size` of each.
        weight_decay: default: that of the arguments.
        sampling: `balanced`: each image as often as data_prep's `repeats`; `natural`: once. Where
            both are tried, epochs are of natural samples, and balanced ones take as many steps.
            Default: as in the stage before.
        supcon: weight of a supervised contrastive loss between images.
        logit_scale: what exp(logit_scale) begins with; default: as it is. It is learned where
            `train` names it.
        start: `lda`: the visual projection and the prototypes begin as a linear discriminant
            analysis of the training images' features, see `training.lda`.
        patch_dropout: share of patches that a sample leaves out (FLIP, arXiv:2212.00794).
        ema: decay per step of the averaged weights that are judged and kept; 0: none.
        keep: the `last` epoch, or the `best` on validation, which ends the stage early.
        runs: how many are trained, each with draws of its own, and averaged.
        mix: their share in the weights, beside what stood before the stage.
    """

    name: Text
    train: list[Text]
    last_visual_blocks: int = Field(0, ge=0)
    epochs: Grid[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    learning_rate: Grid[Rate] = Field(min_length=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    batch_size: int | None = Field(None, ge=1)
    weight_decay: float | None = Field(None, ge=0)
    sampling: Grid[Sampling] = []
    loss: Literal["class_prompts", "multi_positive", "info_nce", "distillation"] = "class_prompts"
    supcon: float = Field(0.0, ge=0)
    logit_scale: float | None = Field(None, gt=0, le=100)
    start: Grid[Literal["base", "lda"]] = Field(["base"], min_length=1)
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    ema: float = Field(0.0, ge=0, lt=1)
    keep: Literal["last", "best"] = "last"
    runs: int = Field(1, ge=1)
    mix: Grid[Share] = Field([1.0], min_length=1)

    @property
    def free_prototypes(self) -> bool:
        """Whether prototypes take the place of the text tower."""
        return PROTOTYPES in self.train

    def trains(self, parameter: str) -> bool:
        """Whether a pattern of `train` matches the name."""
        return any(fnmatchcase(parameter, pattern) for pattern in self.train)

    def variants(self, repeats: float = 1.0) -> list[Stage]:
        """One stage for each combination of the grids, `mix` left as it is.

        Args:
            repeats: how many balanced samples there are for one image.
        """
        found = []
        for values in product(*(getattr(self, name) or [None] for name in GRIDS)):
            variant = {name: [value] for name, value in zip(GRIDS, values, strict=True) if value}
            if variant.get("sampling") == ["balanced"] and len(self.sampling) > 1:
                variant["epochs"] = [max(1, round(variant["epochs"][0] / repeats))]
            found.append(self.model_copy(update=variant))
        return found

    def grid_values(self, variant: Stage) -> dict[str, Any]:
        """What distinguishes one of the variants from the others."""
        names = [name for name in GRIDS if len(getattr(self, name)) > 1]
        return {name: getattr(variant, name)[0] for name in names}


def check_order(stages: Sequence[Stage]) -> None:
    """Whether stages can follow each other.

    Raises:
        ValueError: naming the stage that can't.
    """
    free, names = "", set()
    for stage in stages:
        distils, prototypes = stage.loss == "distillation", stage.free_prototypes
        of_text = stage.trains("text_projection.weight") or stage.trains("text_model.embeddings")
        projection = stage.trains("visual_projection.weight")
        of_images = projection or stage.trains("logit_scale") or stage.last_visual_blocks
        is_head = stage is stages[0] and prototypes and projection
        faults = {
            "has the name of another one; rename it": stage.name in names,
            "distils prototypes, but no stage before it trains them": distils and not free,
            "distils prototypes into the text side; leave the rest out of its `train`": distils
            and (prototypes or of_images),
            f"trains prototypes with the loss '{stage.loss}'; expected class_prompts": prototypes
            and stage.loss not in ("class_prompts", "distillation"),
            "trains prototypes in place of the text side; leave that out of its `train`": prototypes
            and of_text,
            f"reads prompts, but the prototypes of '{free}' stand in for the text tower; add "
            f"'{PROTOTYPES}' to its `train`, or distil them before it": free
            and not (distils or prototypes),
            "can't have `start: lda`, which is for a first stage that trains prototypes and the "
            "visual projection": "lda" in stage.start and not is_head,
        }
        for told, wrong in faults.items():
            if wrong:
                raise ValueError(f"stage '{stage.name}' {told}")
        names.add(stage.name)
        free = "" if distils else stage.name if prototypes else free
    if free:
        raise ValueError(
            f"the prototypes of stage '{free}' never reach the text tower; add a stage with "
            "`loss: distillation` and `train: [text_model.*, text_projection.*]`"
        )


def recipe(name: str) -> dict[str, Any]:
    """`stages` and `training` of a named recipe.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"'{name}' is no recipe; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
