"""CLIP's towers with a forward pass that can begin where training begins.

The visual tower is cut at places numbered in the order of the computation: `PIXELS`; 0, after the embeddings and the
layer norm that follows them; k, after k blocks; and `pooled(tower)`, at its end. What lies before the first thing that
trains gives the same states at every visit of a view, so they can be kept (nicheclip/feature_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

PIXELS = -1


class VisionTower(CLIPVisionModel):
    """A CLIPVisionModel that takes pixels (B, 3, S, S), or states of its `cut`: (B, T, D) between, (B, D) pooled."""

    cut = PIXELS

    def forward(self, pixel_values: torch.Tensor, **unused) -> BaseModelOutputWithPooling:
        is_pixels = pixel_values.ndim == 4
        states = pixel_values if is_pixels else pixel_values.to(self.post_layernorm.weight.dtype)
        return BaseModelOutputWithPooling(pooler_output=self.between(states, PIXELS if is_pixels else self.cut))

    def between(self, states: torch.Tensor, start: int, end: int | None = None) -> torch.Tensor:
        """The states at the cut `end` (pooled, if not given) from those at the cut `start`."""
        blocks, last = self.encoder.layers, len(self.encoder.layers)
        end = pooled(self) if end is None else end
        if start == PIXELS != end:
            states, start = self.pre_layrnorm(self.embeddings(states)), 0
        for block in blocks[start : min(end, last - 1)]:
            states = block(states, None)
        if start < last <= end:
            states = blocks[-1](states, None) if end == last else _class_token_of_block(blocks[-1], states)
        return self.post_layernorm(states[:, 0]) if start <= last < end else states


class TextTower(CLIPTextModel):
    """A CLIPTextModel that also takes its own pooled output (P, D), in the place of tokens."""

    def forward(self, input_ids: torch.Tensor, **options) -> BaseModelOutputWithPooling:
        if input_ids.is_floating_point():
            return BaseModelOutputWithPooling(pooler_output=input_ids)
        return super().forward(input_ids, **options)


def begin_later(model: CLIPModel) -> None:
    """Gives the towers the forward passes above; modules, parameters and their names stay as they are."""
    model.vision_model.__class__ = VisionTower
    model.text_model.__class__ = TextTower


def pooled(tower: CLIPVisionModel) -> int:
    """The last cut: the class token's states after the layer norm at the end."""
    return len(tower.encoder.layers) + 1


def cut_before(tower: CLIPVisionModel, trainable: Iterable[str]) -> int:
    """The last cut that nothing trainable lies before.

    Args:
        trainable: names of parameters of the whole CLIPModel.
    """
    prefix = "vision_model."
    cuts = [pooled(tower)]
    for name in trainable:
        if name.startswith(prefix + "encoder.layers."):
            cuts.append(int(name.split(".")[3]))
        elif name.startswith(prefix + "post_layernorm."):
            cuts.append(pooled(tower) - 1)
        elif name.startswith(prefix):
            cuts.append(PIXELS)
    return min(cuts)


def weights_before(tower: CLIPVisionModel, cut: int) -> dict[str, torch.Tensor]:
    """The weights that the states at a cut depend on."""
    return {
        name: weights
        for name, weights in tower.state_dict().items()
        if cut_before(tower, [f"vision_model.{name}"]) < cut
    }


def _class_token_of_block(block: CLIPEncoderLayer, states: torch.Tensor) -> torch.Tensor:
    """The class token after the last block, (B, T, D) -> (B, 1, D); nothing reads the others.

    Their keys and values are all that is needed of them: a sixth of the block's multiplications.
    """
    attention = block.self_attn
    seen = block.layer_norm1(states)

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, T or 1, D / H)

    attended = scaled_dot_product_attention(
        heads(attention.q_proj(seen[:, :1])),
        heads(attention.k_proj(seen)),
        heads(attention.v_proj(seen)),
        dropout_p=attention.dropout if block.training else 0.0,
        scale=attention.scale,
    )
    states = states[:, :1] + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return states + block.mlp(block.layer_norm2(states))
