"""From importance and budgets to the rows that a cache keeps: one axis of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from headprof.compression.kernels import marking
from headprof.compression.kernels.constants import constant
from headprof.compression.methods.observation import NOISE, Observation, per_head
from headprof.compression.rows import HeadCounts, Rows


def largest(
    values: torch.Tensor, counts: torch.Tensor, noise: float = NOISE, *, most: int | None = None
) -> torch.Tensor:
    """Mark the largest values of each row.

    What is worth the same may differ in the last digits: rows that are fewer than the pooling is wide all get the mean
    of all, keys that a model has normalized are of one length. Which has more then depends on the batch or the chunk.
    So the last places go to the earliest of those that are, up to noise, as large as the last that would be marked.

    Args:
        values: float `[..., T]`, without NaN.
        counts: how many to mark, int `[...]`, 0 to `T`.
        noise: the largest difference that means nothing, as a share of the values.
        most: none of the counts is larger; `None` for `T`.

    Returns:
        bool `[..., T]` with exactly `counts` true in each row; of equal values the earlier is marked.
    """
    size = values.shape[-1]
    most = size if most is None else min(max(1, most), size)
    top = values.topk(most, dim=-1).values
    if marking.serves(values):
        return marking.mark_largest(values, top, counts, noise)
    least = top.gather(-1, (counts - 1).clamp(min=0)[..., None])  # the last that may stay
    low, high = torch.aminmax(least * constant((1 - noise, 1 + noise), values.device), dim=-1, keepdim=True)
    above = values > high
    equal = (values >= low) ^ above
    room = counts[..., None] - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))


_PAST = -1e30
"""Importance of what no later query sees: below any other."""


def ranking(
    importance: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    sinks: int,
    keep_last: int | torch.Tensor,
    past: torch.Tensor | None = None,
) -> torch.Tensor:
    """Importance `[B, K, T]` with the tokens that are kept whatever it is at infinity, and padding at minus infinity.

    Args:
        importance: float `[B, K, T]`, finite.
        valid: false where a token is padding, bool `[B, T]`, or `[B, K, T]` if heads differ; `None` if none is.
        sinks: first tokens of the sequence that are always kept.
        keep_last: last tokens of the sequence that are always kept; one number, or one for each head, int `[B, K]`.
        past: tokens that no later query sees, bool `[B, K, T]`: they come after all others, and before padding.
    """
    if past is not None:
        present = ~past if valid is None else per_head(valid) & ~past
        ranked = ranking(importance, present, sinks=sinks, keep_last=keep_last)
        return ranked.masked_fill(past if valid is None else past & per_head(valid), _PAST)
    if valid is None:
        return _ranking_without_padding(importance, sinks, keep_last)
    valid = per_head(valid)
    from_start = valid.cumsum(dim=-1)  # 1 for the first valid token
    from_end = valid.flip(-1).cumsum(dim=-1).flip(-1)
    last = keep_last[..., None] if isinstance(keep_last, torch.Tensor) else keep_last
    ranked = importance.masked_fill((from_start <= sinks) | (from_end <= last), float("inf"))
    return ranked.masked_fill(~valid, float("-inf"))


def _ranking_without_padding(importance: torch.Tensor, sinks: int, keep_last: int | torch.Tensor) -> torch.Tensor:
    tokens = importance.shape[-1]
    if isinstance(keep_last, torch.Tensor):
        index = torch.arange(tokens, device=importance.device)
        ranked = importance.masked_fill(index >= tokens - keep_last[..., None], float("inf"))
    else:
        ranked = importance.clone()
        ranked[..., max(0, tokens - keep_last) :] = float("inf")
    ranked[..., :sinks] = float("inf")
    return ranked


@dataclass(frozen=True)
class Choice:
    """What has been decided on a layer's rows, `[B, K, T]` each.

    Attributes:
        kept: rows that each head keeps, bool.
        ranked: importance, infinite for rows that every head keeps as they are (see `ranking`).
        weights: attention that each row can expect.
        counts: how many rows each head keeps; `None` if the host must look.
        observed: the rows with the queries at hand; `None` where nobody has them.
    """

    kept: torch.Tensor
    ranked: torch.Tensor
    weights: torch.Tensor
    counts: HeadCounts | None = None
    observed: Observation | None = None

    @cached_property
    def rest(self) -> torch.Tensor:
        """Importance of the rows that are not kept, minus infinity for those that are."""
        return self.ranked.masked_fill(self.kept, float("-inf"))

    @cached_property
    def head_counts(self) -> HeadCounts:
        """How many rows each head keeps."""
        return HeadCounts.looked_up(self.kept.sum(dim=-1)) if self.counts is None else self.counts


class Reduction(Protocol):
    """Shortens a layer's rows to those that its heads keep."""

    prompt_queries: int | None = 0
    """How many of a prompt's last queries it needs (all, if there are fewer); `None` for all."""

    recent_queries: int = 0
    """How many of the newest queries it needs while text is generated, as far as there are so many."""

    fits_rows: bool = False
    """Whether kept rows are fitted together to stand for those that go, so that none of them may change after it."""

    def reduce(self, rows: Rows, choice: Choice) -> Rows:
        """What the heads hold from now on, flat.

        Args:
            rows: what they have, a block.
            choice: which of these they keep.
        """
        ...


@dataclass(frozen=True)
class Evict(Reduction):
    """Keep the chosen rows as they are and drop the others."""

    def reduce(self, rows: Rows, choice: Choice) -> Rows:
        return rows.kept(choice.kept, choice.head_counts)
