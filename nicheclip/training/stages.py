"""Which parameters train in which stage."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from nicheclip.domain import Stage

VISUAL_BLOCKS = "vision_model.encoder.layers."


def trainable_names(parameter_names: Iterable[str], stage: Stage) -> list[str]:
    """The names of the parameters that train in a stage, in the model's order.

    Raises:
        ValueError: if a pattern of the stage matches no parameter, or it asks for more visual
            blocks than there are.
    """
    names = list(parameter_names)
    blocks = sorted({int(name.split(".")[3]) for name in names if name.startswith(VISUAL_BLOCKS)})
    if stage.last_visual_blocks > len(blocks):
        raise ValueError(
            f"stage '{stage.name}': last_visual_blocks is {stage.last_visual_blocks}, "
            f"but the visual tower has {len(blocks)} blocks"
        )
    last = blocks[len(blocks) - stage.last_visual_blocks :]
    patterns = [*stage.train, *(f"{VISUAL_BLOCKS}{block}.*" for block in last)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            towers = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"stage '{stage.name}': pattern '{pattern}' matches no parameter; names begin "
                f"with {', '.join(towers)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_stages(base: str | Path, stages: Iterable[Stage]) -> None:
    """Checks the patterns of all stages against the base's configuration: no weights are read.

    Raises:
        ValueError: as `trainable_names`.
        OSError: if there is no CLIP model of that name.
    """
    with torch.device("meta"):
        names = [name for name, _ in CLIPModel(CLIPConfig.from_pretrained(base)).named_parameters()]
    for stage in stages:
        trainable_names(names, stage)


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Freezes all of the model but what the stage trains; gives the names of what trains."""
    names = trainable_names((name for name, _ in model.named_parameters()), stage)
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return names
