"""CLIP's towers, begun where training begins, and working out nothing twice.

The visual tower is cut at places numbered in the order of the computation: `PIXELS`; 0, after the
embeddings and the layer norm that follows them; k, after k blocks; and `pooled(tower)`, at its end.
What lies before the first thing that trains gives the same states at every visit of a view, so they
can be kept (feature_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import embedding
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    eager_attention_forward,
)

PIXELS = -1


class VisionTower(CLIPVisionModel):
    """A CLIPVisionModel that takes pixels (B, 3, S, S), or the states of its `cut`."""

    cut = PIXELS

    def forward(self, pixel_values: torch.Tensor, **unused) -> BaseModelOutputWithPooling:
        """The pooled output (B, D)."""
        is_pixels = pixel_values.ndim == 4
        states = pixel_values if is_pixels else pixel_values.to(self.post_layernorm.weight.dtype)
        return BaseModelOutputWithPooling(
            pooler_output=self.between(states, PIXELS if is_pixels else self.cut)
        )

    def between(self, states: torch.Tensor, start: int, end: int | None = None) -> torch.Tensor:
        """The states at the cut `end` (pooled, if not given) from those at the cut `start`."""
        blocks: list[Any] = list(self.encoder.layers)
        last = len(blocks)
        end = pooled(self) if end is None else end
        if start == PIXELS != end:
            states, start = self.pre_layrnorm(self.embeddings(states)), 0
        for block in blocks[start : min(end, last - 1)]:
            states = block(states, None)
        if start < last <= end:
            states = (
                blocks[-1](states, None)
                if end == last
                else _class_token_of_block(blocks[-1], states)
            )
        return self.post_layernorm(states[:, 0]) if start <= last < end else states


class TextTower(CLIPTextModel):
    """A CLIPTextModel that takes tokens and mask, (P, L) each, or its own pooled output (P, D).

    A token's states depend on what stands before it alone: prompts that begin alike share the
    states of their beginning, and padding has none. Nothing reads the last block's states but those
    of the last token.
    """

    row_of_token: torch.Tensor | None = None  # (V,), of the tokens that train alone

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **unused
    ):
        """The pooled output (P, D)."""
        if input_ids.is_floating_point():
            return BaseModelOutputWithPooling(pooler_output=input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        blocks: list[Any] = list(self.encoder.layers)
        last = blocks.pop()
        nodes, place = shared_beginnings(input_ids, attention_mask)
        end = place.gather(1, attention_mask.sum(dim=1, keepdim=True) - 1).flatten()  # (P,)
        states = self._embeds(input_ids.flatten()[nodes])  # (N, D)
        states = states + self.embeddings.position_embedding(nodes % input_ids.shape[1])

        def at(projected: torch.Tensor) -> torch.Tensor:
            return projected.index_select(0, place.flatten()).unflatten(0, place.shape)  # (P, L, D)

        length = input_ids.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        for block in blocks:
            attention, seen = block.self_attn, block.layer_norm1(states)
            projected = (
                at(project(seen))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            attended = _attend(attention, *projected, seen=before[None, None])
            states = _finish(block, states, attended.flatten(0, 1).index_select(0, nodes))
        attention, seen = last.self_attn, last.layer_norm1(states)
        queries = attention.q_proj(seen[end])[:, None]  # (P, 1, D)
        keys, values = at(attention.k_proj(seen)), at(attention.v_proj(seen))
        attended = _attend(
            attention, queries, keys, values, seen=attention_mask.bool()[:, None, None]
        )
        states = _finish(last, states[end], attended[:, 0])
        return BaseModelOutputWithPooling(pooler_output=self.final_layer_norm(states))

    def _embeds(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.row_of_token is None:
            return self.embeddings.token_embedding(tokens)
        return embedding(self.row_of_token[tokens], self.used_embeddings)

    def train_only(self, tokens: torch.Tensor) -> None:
        """Of the token embeddings only these (U,) train, as a parameter of their own.

        Others get no gradient anyhow: this way no optimiser walks through them, and they do not
        decay.
        """
        weight = self.embeddings.token_embedding.weight.requires_grad_(False)
        self._tokens = tokens.to(weight.device)
        self.row_of_token = torch.full((len(weight),), -1, device=weight.device)
        self.row_of_token[self._tokens] = torch.arange(len(tokens), device=weight.device)
        self.used_embeddings = torch.nn.Parameter(weight[self._tokens])

    def train_all(self) -> None:
        """Undoes `train_only`."""
        if self.row_of_token is not None:
            self.store_embeddings()
            self.row_of_token = None
            del self.used_embeddings

    @torch.no_grad()
    def store_embeddings(self) -> None:
        """Writes what `train_only` has trained to its place among all."""
        if self.row_of_token is not None:
            self.embeddings.token_embedding.weight[self._tokens] = self.used_embeddings

    @torch.no_grad()
    def read_embeddings(self) -> None:
        """The other way: after weights were loaded."""
        if self.row_of_token is not None:
            self.used_embeddings.copy_(self.embeddings.token_embedding.weight[self._tokens])


def shared_beginnings(
    input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct beginnings of prompts: where each stands first, and which one each token ends.

    Args:
        input_ids: (P, L), padded on the right.
        attention_mask: (P, L).

    Returns:
        (N,) indices of the flattened tokens, and (P, L) indices of these N; 0 for padding.
    """
    # on a GPU each length would wait for the one before
    ids, live = input_ids.cpu(), attention_mask.bool().cpu()
    nodes, place = [], torch.zeros_like(ids)
    beginning = torch.zeros(len(ids), dtype=ids.dtype)
    vocabulary, count = int(ids.max()) + 1, 0
    for length in range(ids.shape[1]):
        (prompts,) = live[:, length].nonzero(as_tuple=True)
        distinct, of_prompt = (beginning[prompts] * vocabulary + ids[prompts, length]).unique(
            return_inverse=True
        )
        first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, of_prompt, prompts, "amin")
        nodes.append(first * ids.shape[1] + length)
        place[prompts, length] = count + of_prompt
        beginning[prompts] = of_prompt
        count += len(distinct)
    return torch.cat(nodes).to(input_ids.device), place.to(input_ids.device)


def begin_later(model: CLIPModel) -> tuple[VisionTower, TextTower]:
    """Gives the towers the forward passes above.

    Modules, parameters and their names stay as they are.
    """
    vision, text = model.vision_model, model.text_model
    vision.__class__, text.__class__ = VisionTower, TextTower
    return vision, text


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
    attention, seen = block.self_attn, block.layer_norm1(states)
    queries = attention.q_proj(seen[:, :1])
    return _finish(
        block,
        states[:, :1],
        _attend(attention, queries, attention.k_proj(seen), attention.v_proj(seen)),
    )


def _attend(
    attention: CLIPAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, Q, D) queries, (B, T, D) keys and values -> (B, Q, D).

    Args:
        seen: which keys a query sees, (B or 1, 1, Q or 1, T) bool; None: all.
    """
    heads = [
        each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, Q or T, D / H)
        for each in (queries, keys, values)
    ]
    mask = (
        None
        if seen is None
        else torch.zeros_like(seen, dtype=queries.dtype).masked_fill(~seen, -torch.inf)
    )
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    dropout = attention.dropout if attention.training else 0.0
    attended, _ = function(
        attention, *heads, mask, scaling=attention.scale, dropout=dropout, is_causal=False
    )
    return attended.flatten(2)


def _finish(block: CLIPEncoderLayer, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """A block's states (..., D), from those before it and what they attend to."""
    states = states + block.self_attn.out_proj(attended)
    return states + block.mlp(block.layer_norm2(states))
