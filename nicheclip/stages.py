"""Which parameters train in which stage."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from nicheclip.domain import Stage

VISUAL_BLOCKS = "vision_model.encoder.layers."


def trainable_names(parameter_names: Iterable[str], stage: Stage) -> list[str]:
    """The names of the parameters that train in a stage, in the model's order.

    Raises:
        ValueError: if a pattern of the stage matches no parameter, or it asks for more visual blocks than there are.
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
                f"stage '{stage.name}': pattern '{pattern}' matches no parameter; names begin with {', '.join(towers)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Freezes all of the model but what the stage trains; gives the names of what trains."""
    names = trainable_names((name for name, _ in model.named_parameters()), stage)
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return names
