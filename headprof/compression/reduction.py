"""From importance and budgets to the rows that a cache keeps: one axis of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


def top_tokens(
    importance: torch.Tensor, counts: torch.Tensor, valid: torch.Tensor, *, sinks: int, keep_last: int
) -> torch.Tensor:
    """Mark the tokens that each head keeps: its sinks, its last tokens, and its most important others.

    Args:
        importance: float `[B, K, T]`.
        counts: tokens to keep, int `[B, K]`; at most the valid tokens of the sequence.
        valid: false where a token is padding, bool `[B, T]`.
        sinks: first tokens of the sequence that are kept whatever their importance.
        keep_last: last tokens of the sequence that are kept whatever their importance.

    Returns:
        bool `[B, K, T]` with exactly `counts` true in each head; of equal tokens the earlier is kept.
    """
    order_from_start = valid.cumsum(dim=-1)  # 1 for the first valid token
    from_end = valid.flip(-1).cumsum(dim=-1).flip(-1)
    protected = valid & ((order_from_start <= sinks) | (from_end <= keep_last))
    ranked = importance.masked_fill(protected[:, None], float("inf")).masked_fill(~valid[:, None], float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(ranked.shape[-1], device=ranked.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return rank < counts[..., None]


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
