"""Which parameters train in which stage."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from nicheclip.recipe import PROTOTYPES, Stage

VISUAL_BLOCKS = "vision_model.encoder.layers."


def trainable_names(parameter_names: Iterable[str], stage: Stage) -> list[str]:
    """The names of the parameters that train in a stage, in the model's order.

    Raises:
        ValueError: if a pattern of the stage matches no parameter, or it asks for more visual
            blocks than there are.
    """
    names = list(parameter_names)
    blocks = len({name.split(".")[3] for name in names if name.startswith(VISUAL_BLOCKS)})
    if stage.last_visual_blocks > blocks:
        raise ValueError(
            f"stage '{stage.name}': last_visual_blocks is {stage.last_visual_blocks}, "
            f"but the visual tower has {blocks} blocks"
        )
    last = range(blocks - stage.last_visual_blocks, blocks)
    patterns = [*stage.train, *(f"{VISUAL_BLOCKS}{block}.*" for block in last)]
    patterns = [pattern for pattern in patterns if pattern != PROTOTYPES]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            towers = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"stage '{stage.name}': pattern '{pattern}' matches no parameter; names begin "
                f"with {', '.join(towers)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def all_trained(model: nn.Module, stages: Iterable[Stage]) -> list[str]:
    """The names of the parameters that any of the stages trains. Raises: as `trainable_names`."""
    names = [name for name, _ in model.named_parameters()]
    return [name for stage in stages for name in trainable_names(names, stage)]


def check_stages(base: str | Path, stages: Iterable[Stage]) -> None:
    """Checks the patterns of all stages against the base's configuration: no weights are read.

    Raises: as `trainable_names`, and OSError if there is no CLIP model of that name.
    """
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig.from_pretrained(base))
    for stage in stages:
        set_trainable(model, stage)


def set_trainable(model: nn.Module, stage: Stage) -> None:
    """Freezes all of the model but what the stage trains."""
    parameters = dict(model.named_parameters())
    names = trainable_names(parameters, stage)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
