"""What an importance is given to judge, and what it says.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `T` prompt tokens or held
rows, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class PromptStates:
    """One layer's newest queries and the keys they judge: a whole prompt's, or the rows that its heads still hold.

    Attributes:
        query: the queries of the last `N` tokens, `[B, H, N, D]`; an importance says how many it needs.
        key: the keys, `[B, K, T, D]`.
        valid: false where there is nothing to judge (padding), bool `[B, T]`, or `[B, K, T]` if heads differ.
        scaling: factor on the attention logits.
        softcap: bound on the logits (Gemma-2), or none.
        sliding_window: tokens that a query of this layer sees, or none for all.
        positions: each row's place in the sequence, `[B, K, T]`; none if the keys are those of tokens `0` to `T - 1`.
        places: each query's place in the sequence, int64 `[N]`; none if they are the last of these tokens.
        seen: tokens of the sequence so far; none for `T`.
        bias: added to the logits, float32 `[B, K, T]`, or none.
        received: attention that queries before these paid to each row, summed, float32 `[B, K, T]`; none for none.
        judges: false for queries that do not count (padding), bool `[B, N]`; none if all do.
        shared: what several importances need of these states, computed once.
    """

    query: torch.Tensor
    key: torch.Tensor
    valid: torch.Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    positions: torch.Tensor | None = None
    places: torch.Tensor | None = None
    seen: int | None = None
    bias: torch.Tensor | None = None
    received: torch.Tensor | None = None
    judges: torch.Tensor | None = None
    shared: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Softmax attention of a prompt's tokens `start` to before `stop`, float32 `[B, K, g, stop - start, stop]`.

        Tokens from `stop` on are left out, since none of these queries sees them. A query that sees nothing but padding
        has a row of zeros.

        Raises:
            ValueError: some of these queries are not held.
        """
        num_tokens = self.key.shape[2]
        first = num_tokens - self.query.shape[2]
        if not first <= start <= stop <= num_tokens:
            raise ValueError(f"queries {start} to {stop} asked for, {first} to {num_tokens} held")
        return self._attention(start - first, stop - first, stop)

    def last_rows(self, count: int) -> torch.Tensor:
        """Softmax attention of the last `count` queries, or of all if they are fewer, float32 `[B, K, g, count, T]`.

        Raises:
            ValueError: some of these queries of a prompt are not held.
        """
        held = self.query.shape[2]
        if self.positions is None:
            num_tokens = self.key.shape[2]
            return self.rows(num_tokens - min(count, num_tokens), num_tokens)
        return self._attention(held - min(count, held), held, self.key.shape[2])

    def query_places(self) -> torch.Tensor:
        """Each query's place in the sequence, int64 `[N]`."""
        if self.places is not None:
            return self.places
        num_tokens = self.key.shape[2]
        return torch.arange(num_tokens - self.query.shape[2], num_tokens, device=self.key.device)

    def row_positions(self) -> torch.Tensor:
        """Each row's place in the sequence, `[B, K, T]`."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.key.shape[2], device=self.key.device).expand(self.key.shape[:3])

    def valid_rows(self) -> torch.Tensor:
        """Which rows each head has, bool `[B, K, T]`."""
        return per_head(self.valid).expand(self.key.shape[:3])

    def _attention(self, first: int, last: int, num_keys: int) -> torch.Tensor:
        """Softmax attention of held queries `first` to before `last` over the first `num_keys` keys."""
        batch, num_kv_heads, _, head_dim = self.key.shape
        group_size, count = self.query.shape[1] // num_kv_heads, last - first
        query = self.query[:, :, first:last].float() * self.scaling
        query = query.reshape(batch, num_kv_heads, group_size * count, head_dim)
        logits = query @ self.key[:, :, :num_keys].float().transpose(2, 3)  # [B, K, g * count, num_keys]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.reshape(batch, num_kv_heads, group_size, count, num_keys)
        if self.bias is not None:
            logits = logits + self.bias[:, :, None, None, :num_keys]
        places = self.query_places()[first:last, None]
        if self.positions is None:
            positions = torch.arange(num_keys, device=self.key.device)[None, None, None]
        else:
            positions = self.positions[:, :, None, :num_keys]
        visible = positions <= places  # [B or 1, K or 1, count, num_keys]
        if self.sliding_window is not None:
            visible &= positions > places - self.sliding_window
        visible = (visible & per_head(self.valid)[:, :, None, :num_keys])[:, :, None]
        attention = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1).nan_to_num_(nan=0.0)
        if self.judges is not None:
            attention *= self.judges[:, None, None, first:last, None]
        return attention


def per_head(valid: torch.Tensor) -> torch.Tensor:
    """`[B, T]` as `[B, 1, T]`; `[B, K, T]` as it is."""
    return valid[:, None] if valid.ndim == 2 else valid


@dataclass(frozen=True)
class Judgement:
    """What an importance says of a layer's rows.

    Attributes:
        importance: of each row, float32 `[B, K, T]`; higher is kept; any finite value for padding.
        weights: attention that each row can expect, at least 0, by which rows that merge are weighed, `[B, K, T]`; none
            if the importance serves.
        received: attention that each row has received from all queries so far, `[B, K, T]`, for importances that go
            on counting while the model generates; none for others.
    """

    importance: torch.Tensor
    weights: torch.Tensor | None = None
    received: torch.Tensor | None = None
