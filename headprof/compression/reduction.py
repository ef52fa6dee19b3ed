"""From importance and budgets to the rows that a cache keeps: one axis of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


def largest(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mark the largest values of each row.

    Args:
        values: float `[..., T]`, without NaN.
        counts: how many to mark, int `[...]`, 0 to `T`.

    Returns:
        bool `[..., T]` with exactly `counts` true in each row; of equal values the earlier is marked.
    """
    most = max(1, int(counts.max()))
    least = values.topk(most, dim=-1).values.gather(-1, (counts - 1).clamp(min=0)[..., None])  # the last that may stay
    above, equal = values > least, values == least
    room = counts - above.sum(dim=-1)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room[..., None]))


def ranking(
    importance: torch.Tensor, valid: torch.Tensor, *, sinks: int, keep_last: int | torch.Tensor
) -> torch.Tensor:
    """Importance `[B, K, T]` with the tokens that are kept whatever it is at infinity, and padding at minus infinity.

    Args:
        importance: float `[B, K, T]`, finite.
        valid: false where a token is padding, bool `[B, T]`.
        sinks: first tokens of the sequence that are always kept.
        keep_last: last tokens of the sequence that are always kept; one number, or one for each head, int `[B, K]`.
    """
    from_start = valid.cumsum(dim=-1)[:, None]  # 1 for the first valid token
    from_end = valid.flip(-1).cumsum(dim=-1).flip(-1)[:, None]
    last = keep_last[..., None] if isinstance(keep_last, torch.Tensor) else keep_last
    ranked = importance.masked_fill((from_start <= sinks) | (from_end <= last), float("inf"))
    return ranked.masked_fill(~valid[:, None], float("-inf"))


def top_tokens(
    importance: torch.Tensor,
    counts: torch.Tensor,
    valid: torch.Tensor,
    *,
    sinks: int,
    keep_last: int | torch.Tensor,
) -> torch.Tensor:
    """Mark the tokens that each head keeps: its sinks, its last tokens, and its most important others.

    Args:
        importance: float `[B, K, T]`, finite.
        counts: tokens to keep, int `[B, K]`; at most the valid tokens of the sequence.
        valid: false where a token is padding, bool `[B, T]`.
        sinks: first tokens of the sequence that are kept whatever their importance.
        keep_last: last tokens of the sequence that are kept whatever their importance; one number, or one for each
            head, int `[B, K]`.

    Returns:
        bool `[B, K, T]` with exactly `counts` true in each head; of equal tokens the earlier is kept.
    """
    return largest(ranking(importance, valid, sinks=sinks, keep_last=keep_last), counts)


class Reduction(Protocol):
    """Shortens a layer's prompt to the rows that its heads keep."""

    def reduce(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all heads, one head after the other, `[kept.sum(), D]` each.

        Args:
            keys, values: the prompt's, `[B, K, T, D]`.
            kept: tokens that each head keeps, bool `[B, K, T]`.
        """
        ...


@dataclass(frozen=True)
class Evict:
    """Keep the chosen tokens as they are and drop the others."""

    def reduce(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys[kept], values[kept]
