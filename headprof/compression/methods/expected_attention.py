"""Importance by the attention that queries still to come are expected to pay.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `N` queries, `T` rows, `D`
head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Observation
from headprof.errors import UsageError
from headprof.models.rotary import Rotary


@dataclass(frozen=True)
class ExpectedAttention(Importance):
    """What queries to come would pay, if they were normally distributed as those so far (Devoto et al. 2025).

    "Expected Attention", arXiv 2510.00636, in the form of its authors' kvpress: with mean `m` and covariance `C` of a
    head's queries before rotation, turned by the rotation that is the mean of those at the next `future` positions, the
    expected exponential of a key's logit is `exp(s * m.k + s * s * k.C.k / 2)`, `s` being the layer's scaling. It is
    normalized over the rows, averaged over the group, and multiplied by the norm of the row's value. A softcap and a
    sliding window are left out of account. Queries are turned back by the layer's rotary embedding, so that models
    which normalize them (Qwen3, Gemma-3) are served too. Before any query is known, the values decide.

    Attributes:
        future: positions after the last token over which rotations are averaged.
        skip_first: queries of the first tokens, which are outliers, are left out; so are their rows, which then have
            the highest score of their sequence.
        covariance: whether `C` counts, or the mean alone.
        value_norm: whether the norm of a row's value counts.
        epsilon: added to the attention before it is multiplied by that norm.
    """

    future: int = 512
    skip_first: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    queries = None
    needs_rotary = True

    def __post_init__(self) -> None:
        if self.future < 1:
            raise UsageError(f"There are no {self.future} positions to come: give future of at least 1.")
        if self.skip_first < 0 or self.epsilon < 0:
            raise UsageError("Tokens to skip and epsilon cannot be below 0: give 0 or more.")

    def score(self, observed: Observation) -> Tensor:
        valid = observed.valid_rows()
        shard = observed.layer.shard
        first = shard.together(observed.positions.masked_fill(~valid, observed.num_seen).amin(dim=-1))
        first = first.amin(dim=-1, keepdim=True)  # [B, 1]
        counted = valid & (observed.positions >= first[..., None] + self.skip_first)
        expected = self._expected(observed, counted, observed.positions_of_queries() >= first + self.skip_first)
        if self.value_norm:
            expected = (expected + self.epsilon) * observed.values.float().norm(dim=-1)
        highest = shard.together(expected.masked_fill(~counted, 0.0).amax(dim=-1)).amax(dim=-1)
        return expected.where(counted, highest[:, None, None])

    def _expected(self, observed: Observation, counted: Tensor, asked: Tensor) -> Tensor:
        """Expected attention to the rows that are `counted`, bool `[B, K, T]`: float32 `[B, K, T]`.

        Args:
            observed: queries and rows.
            counted: which rows share the attention.
            asked: which queries tell of those to come, bool `[B, N]`.
        """
        rotary, scaling = observed.layer.rotary, observed.layer.scaling
        assert rotary is not None  # as the plan has seen to
        if observed.query_valid is not None:
            asked = asked & observed.query_valid
        weights = asked[:, None, None, :, None].float()
        total = weights.sum(dim=3, keepdim=True)
        queries = rotary.unrotate(observed.queries.float(), observed.positions_of_queries())
        queries = queries.unflatten(1, (observed.keys.shape[1], -1))  # [B, K, g, N, D]
        mean = (queries * weights).sum(dim=3, keepdim=True) / total.clamp(min=1)  # [B, K, g, 1, D]
        keys = observed.keys.float()
        turned = self._turned(rotary, mean, observed.num_seen)
        logits = (keys[:, :, None] @ turned.transpose(-1, -2))[..., 0] * scaling  # [B, K, g, T]
        if self.covariance:
            queries = (queries - mean) * weights
            spread = queries.transpose(-1, -2) @ queries / total.clamp(min=1)  # [B, K, g, D, D]
            spread = self._turned(rotary, spread, observed.num_seen).transpose(-1, -2)
            spread = self._turned(rotary, spread, observed.num_seen)
            squares = [
                ((keys @ each) * keys).sum(dim=-1) for each in spread.unbind(dim=2)
            ]  # one copy of keys at a time
            logits += torch.stack(squares, dim=2) * (scaling * scaling / 2)
        logits = logits.masked_fill(total[..., 0] == 0, 0.0).masked_fill(~counted[:, :, None], float("-inf"))
        return logits.softmax(dim=-1).nan_to_num(nan=0.0).mean(dim=2)

    def _turned(self, rotary: Rotary, states: Tensor, seen: int) -> Tensor:
        """Vectors `[B, K, g, M, D]` turned by the mean of the rotations at the positions to come."""
        cos, sin = rotary.angles(torch.arange(seen, seen + self.future, device=states.device))
        cos, sin = (each.mean(dim=0).expand(states.shape[3], -1) for each in (cos, sin))
        return rotary.rotate(states.flatten(1, 2), cos, sin).view(states.shape)
