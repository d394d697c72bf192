"""CLIP's towers as a stage trains them: begun where training begins, working out nothing twice.

The visual tower is cut at places numbered in the order of the computation: `PIXELS`, before all;
k, after k blocks; and its depth, after all of them, where only the class token is left and
post_layernorm is to come. What lies before the first thing that trains gives the same states each
time, so they can be kept (feature_cache.py).
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding, normalize
from transformers import CLIPModel, CLIPVisionModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, eager_attention_forward

PIXELS = -1
PROMPTS_AT_ONCE = 32  # attention grows with the square of their tokens


class StageTowers(nn.Module):
    """A CLIPModel whose trained parameters are those of one stage (`requires_grad`).

    Of the token embeddings only those that prompts use train, as a parameter of their own: others
    would get no gradient, but the optimiser would walk through them.

    Args:
        clip: its weights are trained in place, but for the token embeddings: see `store`.
        prompts: the tokens of each, from its start to its end.
        prototypes: (C, D) in place of the text tower, trained as well.
        patch_dropout: share of the patches of pixels that a training step leaves out.
    """

    tokens: torch.Tensor  # (U,) all that occur in prompts, rising

    def __init__(
        self,
        clip: CLIPModel,
        prompts: list[list[int]],
        prototypes: torch.Tensor | None = None,
        patch_dropout: float = 0.0,
    ):
        super().__init__()
        self.clip, self.config, self.prompts = clip, clip.config, prompts
        self.patch_dropout = patch_dropout
        trained = [name for name, weight in clip.named_parameters() if weight.requires_grad]
        self.cut = cut_before(clip.vision_model, trained)
        table = clip.text_model.embeddings.token_embedding.weight
        tokens = torch.tensor([*chain.from_iterable(prompts)], device=table.device).unique()
        self.register_buffer("tokens", tokens, persistent=False)
        self.used = nn.Parameter(table.detach()[self.tokens], requires_grad=table.requires_grad)
        table.requires_grad_(False)
        self.prototypes = None if prototypes is None else nn.Parameter(prototypes.clone())

    def trained(self) -> dict[str, nn.Parameter]:
        """What the stage trains, by name."""
        return {name: part for name, part in self.named_parameters() if part.requires_grad}

    def copies(self) -> dict[str, torch.Tensor]:
        """Of what the stage trains, by name."""
        return {name: part.detach().clone() for name, part in self.trained().items()}

    @torch.no_grad()
    def begin_with(self, found: Mapping[str, np.ndarray]) -> None:
        """Takes what `training.lda.discriminants` has found as projection and prototypes."""
        mean, projection, prototypes = (
            torch.from_numpy(found[name]) for name in ("mean", "projection", "prototypes")
        )
        assert self.prototypes is not None  # see check_order
        self.clip.visual_projection.weight.copy_(projection)
        self.clip.vision_model.post_layernorm.bias -= mean.to(self.used)
        seen = prototypes.any(dim=1)  # a class without an image keeps its text_embeds
        self.prototypes[seen] = prototypes[seen].to(self.used)

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies `weights`, by name as in `trained`, into the parameters and the CLIPModel."""
        for name, part in self.trained().items():
            part.copy_(weights[name])
        self.store()

    @torch.no_grad()
    def store(self) -> CLIPModel:
        """The CLIPModel, with its token embeddings as they are trained."""
        self.clip.text_model.embeddings.token_embedding.weight[self.tokens] = self.used
        return self.clip

    def forward(
        self, images: torch.Tensor | None, prompts: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """image_embeds (B, D) and text_embeds (P, D) of unit length, and exp(logit_scale).

        Args:
            images: as `encode_images`; None: there are no image_embeds.
            prompts: (P,) which of the prompts; where there are prototypes, these are the
                text_embeds.
        """
        # In the weights' precision: under autocast the logits would be rounded to 8 bits.
        precision = self.used.dtype
        if self.prototypes is not None:
            text_embeds: torch.Tensor = self.prototypes
        else:
            parts = [
                self.encode_texts([self.prompts[prompt] for prompt in part.tolist()])
                for part in prompts.cpu().split(PROMPTS_AT_ONCE)
            ]
            text_embeds = torch.cat(parts).to(precision)
        image_embeds = None
        if images is not None:
            image_embeds = normalize(self.encode_images(images).to(precision), dim=-1)
        return image_embeds, normalize(text_embeds, dim=-1), self.clip.logit_scale.exp()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, S, S), or the states at the cut, -> (B, D)."""
        tower, start = self.clip.vision_model, PIXELS if images.ndim == 4 else self.cut
        states = images.to(self.used.dtype)
        if start == PIXELS and self.patch_dropout and self.training:
            states, start = self._without_patches(between(tower, states, PIXELS, 0)), 0
        states = between(tower, states, start, depth(tower))
        return self.clip.visual_projection(tower.post_layernorm(states))

    def _without_patches(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, D), the class token first; leaves others out by torch's stream of chance."""
        batch, places, width = states.shape
        count = round((places - 1) * (1 - self.patch_dropout))
        kept = torch.rand(batch, places - 1).argsort(dim=1)[:, :count] + 1  # (B, count)
        kept = kept.to(states.device)[..., None].expand(-1, -1, width)
        return torch.cat([states[:, :1], states.gather(1, kept)], dim=1)

    def encode_texts(self, prompts: list[list[int]]) -> torch.Tensor:
        """Prompts -> (P, D). What they have in common at their beginning is worked out once.

        A token's states depend on what stands before it alone. So all prompts are one sequence of
        their N distinct beginnings, each of which sees those that it begins with.
        """
        tower = self.clip.text_model
        tokens, positions, sees, ends = (
            part.to(self.used.device) for part in distinct_beginnings(prompts)
        )
        rows = torch.searchsorted(self.tokens, tokens)
        states = embedding(rows, self.used) + tower.embeddings.position_embedding(positions)
        states = states[None]  # (1, N, D)
        mask = torch.zeros_like(sees, dtype=states.dtype).masked_fill(~sees, -torch.inf)
        *blocks, last = tower.encoder.layers
        for block in blocks:
            states = block(states, mask[None, None])
        states = at_places(last, states, ends, mask[ends][None, None])
        return self.clip.text_projection(tower.final_layer_norm(states[0]))


def distinct_beginnings(prompts: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """The N distinct beginnings of P prompts.

    Returns:
        their last tokens (N,), the positions of these (N,), which others each begins with, itself
        included, (N, N) bool, and which of them are the whole prompts, (P,).
    """
    found: dict[tuple[int, int], int] = {}  # (the beginning before, its next token) -> beginning
    paths = []
    for prompt in prompts:
        path, before = [], -1
        for token in prompt:
            before = found.setdefault((before, token), len(found))
            path.append(before)
        paths.append(torch.tensor(path))
    positions = torch.zeros(len(found), dtype=torch.long)
    sees = torch.zeros(len(found), len(found), dtype=torch.bool)
    for beginnings in paths:
        length = len(beginnings)
        positions[beginnings] = torch.arange(length)
        sees[beginnings[:, None], beginnings] = torch.ones(length, length, dtype=torch.bool).tril()
    tokens = torch.tensor([token for _, token in found])
    return tokens, positions, sees, torch.stack([beginnings[-1] for beginnings in paths])


def depth(tower: CLIPVisionModel) -> int:
    """The last cut: after all blocks, of the class token alone, before post_layernorm."""
    return len(tower.encoder.layers)


def between(tower: CLIPVisionModel, states: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The states at the cut `end` from those at `start`: (B, T, D), or (B, D) at the depth."""
    if start == PIXELS < end:
        states, start = tower.pre_layrnorm(tower.embeddings(states)), 0
    blocks: list[Any] = list(tower.encoder.layers)
    for block in blocks[start : min(end, len(blocks) - 1)]:
        states = block(states, None)
    if start < end == len(blocks):
        class_token = torch.zeros(1, dtype=torch.long, device=states.device)
        states = at_places(blocks[-1], states, class_token)[:, 0]
    return states


def at_places(
    block: CLIPEncoderLayer,
    states: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """A block's states at Q places, (B, T, D) -> (B, Q, D), where nothing reads the others.

    Keys and values are all that is needed of those: a sixth of the block's multiplications.
    """
    attention, seen = block.self_attn, block.layer_norm1(states)
    projected = attention.q_proj(seen[:, places]), attention.k_proj(seen), attention.v_proj(seen)
    queries, keys, values = (
        each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, Q or T, D / H)
        for each in projected
    )
    implementation = attention.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    attended, _ = attend(
        attention, queries, keys, values, mask, scaling=attention.scale, dropout=dropout
    )
    states = states[:, places] + attention.out_proj(attended.flatten(2))
    return states + block.mlp(block.layer_norm2(states))


def cut_before(tower: CLIPVisionModel, trained: Iterable[str]) -> int:
    """The last cut that nothing of these lies before, by names of the whole CLIPModel."""
    cuts = [depth(tower)]
    for name in trained:
        if name.startswith("vision_model.encoder.layers."):
            cuts.append(int(name.split(".")[3]))
        elif name.startswith("vision_model.") and "post_layernorm" not in name:
            cuts.append(PIXELS)
    return min(cuts)


def weights_before(tower: CLIPVisionModel, cut: int) -> dict[str, torch.Tensor]:
    """The weights that the states at a cut depend on."""
    return {
        name: weights
        for name, weights in tower.state_dict().items()
        if cut_before(tower, [f"vision_model.{name}"]) < cut
    }
