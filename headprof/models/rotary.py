"""The rotary position embedding of a model's layers, for those who must turn queries and keys to other positions."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import atan2
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headprof.models.decoder import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANYWHERE = 1009
"""A position at which no pair of dimensions is turned by whole quarters."""


@dataclass(frozen=True)
class Turning:
    """How dimensions of a head are turned, in numbers: at position `p` dimension `d` of `x` becomes
    `x[d] * cos(p * f[d]) - x[partner[d]] * sin(p * f[d])`.

    Attributes:
        frequencies: `f`, radians a position, of either sign; 0 for a dimension that is not turned.
        partners: with which dimension each is turned, itself if it is not.
    """

    frequencies: tuple[float, ...]
    partners: tuple[int, ...]


@dataclass(frozen=True)
class Rotary:
    """The rotary position embedding of one layer (Su et al. 2021, "RoFormer").

    Attributes:
        embedding: the model's module that makes cosines and sines of positions.
        apply: the function of its modelling file that turns queries and keys by these.
        layer_type: for models whose kinds of layers turn differently (Gemma-3), else `None`.
    """

    embedding: torch.nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None = None

    @cached_property
    def _own(self) -> torch.nn.Module:
        """A copy: some embeddings go on otherwise once they have been asked about a later position."""
        return copy.deepcopy(self.embedding)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at positions, int `[N]`: float32 `[N, R]` each, with the model's scaling in them."""
        device = next(self._own.buffers(), positions).device
        like = torch.zeros(1, dtype=torch.float32, device=device)
        extra = () if self.layer_type is None else (self.layer_type,)
        cos, sin = self._own(like, positions.to(device)[None].long(), *extra)
        return cos[0].float().to(positions.device), sin[0].float().to(positions.device)

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn `[B, H, N, D]` by cosines and sines `[N, R]`; it is linear in these, so means of them serve too."""
        return self.apply(states, states, cos[None], sin[None])[0]

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """What `[B, H, N, D]` was before it was turned to these positions, int `[N]`."""
        cos, sin = self.angles(positions)
        size = cos.square() + sin.square()  # not 1 where the embedding scales too
        return self.rotate(states, cos / size, -sin / size)

    def turns_back(self, head_dim: int) -> bool:
        """Whether `unrotate` undoes what the model does to a head of this width, tried out."""
        states = torch.linspace(-1, 1, 4 * head_dim).view(1, 1, 4, head_dim)
        positions = torch.tensor([0, 1, 5, 77])
        try:
            turned = self.rotate(states, *self.angles(positions))
            back = self.unrotate(turned, positions)
        except Exception:  # other modelling files have other ideas of these functions
            return False
        return back.shape == states.shape and torch.allclose(back, states, atol=1e-4)

    def partners(self, head_dim: int) -> tuple[int, ...] | None:
        """For each dimension of a head the one with which it is turned, itself if it is not, tried out.

        The length of such a pair does not depend on the position. `None` where dimensions are not turned in pairs.
        """
        one_each = torch.eye(head_dim)[None, None]
        try:
            turned = self.rotate(one_each, *self.angles(torch.full((head_dim,), _ANYWHERE)))
        except Exception:  # other modelling files have other ideas of these functions
            return None
        if turned.shape != one_each.shape:
            return None
        others = (turned[0, 0] != 0).fill_diagonal_(False)
        if int(others.sum(dim=-1).max()) > 1:
            return None
        partner = [each if not bool(row.any()) else int(row.int().argmax()) for each, row in enumerate(others)]
        return tuple(partner) if all(partner[other] == each for each, other in enumerate(partner)) else None

    def turning(self, head_dim: int) -> Turning | None:
        """The same in numbers, without the factor of an embedding that scales too; `None` as for `partners`.

        It is tried out once, at position 1, where embeddings that follow the length of a text are as they begin.
        """
        return _turning(self, head_dim)


@lru_cache(maxsize=32)
def _turning(rotary: Rotary, head_dim: int) -> Turning | None:
    if (partners := rotary.partners(head_dim)) is None:
        return None
    anew = Rotary(copy.deepcopy(rotary.embedding).cpu(), rotary.apply, rotary.layer_type)
    one_each = torch.eye(head_dim)[None, None]
    turned = anew.rotate(one_each, *anew.angles(torch.ones(head_dim, dtype=torch.int64)))[0, 0].tolist()
    frequencies = [
        0.0 if other == own else atan2(-turned[other][own], turned[own][own]) for own, other in enumerate(partners)
    ]
    return Turning(tuple(frequencies), partners)


def rotary_of(model: PreTrainedModel, layer_idx: int = 0) -> Rotary | None:
    """The rotary embedding of one of a model's layers; `None` if there is none where Transformers' models have it."""
    decoder = decoder_of(model)
    embedding = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or apply is None:
        return None
    kinds = getattr(decoder.config, "layer_types", None)
    by_kind = "layer_type" in inspect.signature(embedding.forward).parameters
    return Rotary(embedding, apply, kinds[layer_idx] if kinds and by_kind else None)
