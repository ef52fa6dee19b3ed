"""Which prompt tokens matter to a head: one axis of the table of methods.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `T` prompt tokens,
`D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from headprof.errors import UsageError


@dataclass(frozen=True)
class PromptStates:
    """One layer's queries and keys, right after that layer attended over the prompt.

    Attributes:
        query: the queries of the prompt's last `N <= T` tokens, `[B, H, N, D]`; an importance says how many it needs.
        key: the prompt's keys, `[B, K, T, D]`.
        valid: false where a token is padding, bool `[B, T]`.
        scaling: factor on the attention logits.
        softcap: bound on the logits (Gemma-2), or none.
        sliding_window: tokens that a query of this layer sees, or none for all.
    """

    query: torch.Tensor
    key: torch.Tensor
    valid: torch.Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Softmax attention of the tokens from `start` to before `stop`, float32 `[B, K, g, stop - start, stop]`.

        Tokens from `stop` on are left out, since none of these queries sees them. A query that sees nothing but padding
        has a row of zeros.

        Raises:
            ValueError: some of these queries are not held.
        """
        batch, num_kv_heads, num_tokens, head_dim = self.key.shape
        first = num_tokens - self.query.shape[2]
        if not first <= start <= stop <= num_tokens:
            raise ValueError(f"queries {start} to {stop} asked for, {first} to {num_tokens} held")
        group_size = self.query.shape[1] // num_kv_heads
        query = self.query[:, :, start - first : stop - first].float() * self.scaling
        query = query.reshape(batch, num_kv_heads, group_size * (stop - start), head_dim)
        logits = query @ self.key[:, :, :stop].float().transpose(2, 3)  # [B, K, g * (stop - start), stop]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        positions = torch.arange(stop, device=self.key.device)
        observers = positions[start:, None]
        visible = positions <= observers
        if self.sliding_window is not None:
            visible &= positions > observers - self.sliding_window
        visible = (visible & self.valid[:, None, :stop])[:, None, None]  # [B, 1, 1, stop - start, stop]
        logits = logits.reshape(batch, num_kv_heads, group_size, stop - start, stop)
        return logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1).nan_to_num_(nan=0.0)

    def last_rows(self, count: int) -> torch.Tensor:
        """Softmax attention of the last `count` queries, float32 `[B, K, g, count, T]`."""
        num_tokens = self.key.shape[2]
        return self.rows(num_tokens - count, num_tokens)


class Importance(Protocol):
    """Scores the prompt's tokens for each KV head of a layer; higher is kept."""

    @property
    def queries(self) -> int | None:
        """How many of the prompt's last queries it needs (all, if the prompt is shorter); none for all."""
        ...

    def score(self, states: PromptStates) -> torch.Tensor:
        """Importance of each token, float32 `[B, K, T]`; any finite value for padding."""
        ...


@dataclass(frozen=True)
class WindowAttention:
    """Attention from the last queries of the prompt, pooled over neighboring tokens (SnapKV, Li et al. 2024).

    Each token's score is the mean over the group's query heads and over those observing queries that can see it, so
    that tokens inside the window are judged on the same scale as the rest.

    Attributes:
        window: number of observing queries.
        kernel: width of the pooling over tokens, odd; 1 for none.
        pooling: what a token takes from its neighbors: the paper's `"max"`, or the `"mean"`.
        power: of the mean over queries and heads. The paper's 1 is the plain mean; with 2, the root of the mean
            square, one query or head that looks hard at a token outweighs many that glance.
        ramp: count the observing queries by their order, 1 for the oldest up to `window` for the last.
    """

    window: int = 16
    kernel: int = 7
    pooling: str = "max"
    power: float = 1.0
    ramp: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"A window of {self.window} queries judges nothing: give a --window of at least 1.")
        if self.kernel % 2 == 0:
            raise UsageError(
                f"A kernel of {self.kernel} has no middle: give an odd --kernel, such as {self.kernel + 1}."
            )
        if self.pooling not in ("max", "mean"):
            raise UsageError(f"There is no pooling {self.pooling!r}: choose max or mean.")
        if self.power <= 0:
            raise UsageError(f"A mean to the power of {self.power} does not exist: give a power above 0.")

    @property
    def queries(self) -> int:
        return self.window

    def score(self, states: PromptStates) -> torch.Tensor:
        num_tokens = states.key.shape[2]
        window = min(self.window, num_tokens)
        rows = states.last_rows(window)  # [B, K, g, window, T]
        device = rows.device
        weights = torch.arange(1.0, window + 1, device=device) if self.ramp else torch.ones(window, device=device)
        attention = (rows**self.power * weights[:, None]).sum(dim=3).mean(dim=2)
        age = torch.arange(num_tokens, 0, -1, device=device)  # 1 for the last token
        weight_of_newest = weights.flip(0).cumsum(0)  # of the last query, the last two ...
        attention = (attention / weight_of_newest[age.clamp(max=window) - 1]) ** (1 / self.power)
        if self.pooling == "mean":
            return avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)
        return max_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)


@dataclass(frozen=True)
class LastQuery:
    """Attention from the last token of the prompt, averaged over all heads of the layer (TOVA, Oren et al. 2024).

    All KV heads of the layer get the same scores.
    """

    queries = 1

    def score(self, states: PromptStates) -> torch.Tensor:
        attention = states.last_rows(1).mean(dim=(1, 2, 3))  # [B, T]
        return attention[:, None].expand(states.key.shape[:3])


@dataclass(frozen=True)
class Accumulated:
    """Attention summed over all queries of the prompt, averaged over the group (H2O, Zhang et al. 2023).

    Attributes:
        block: queries at a time; a few float32 tensors `[B, H, block, T]` are held at once, never `T x T`.
    """

    block: int = 64
    queries = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"A block of {self.block} queries is empty: give at least 1.")

    def score(self, states: PromptStates) -> torch.Tensor:
        num_tokens = states.key.shape[2]
        total = states.key.new_zeros(states.key.shape[:3], dtype=torch.float32)
        for start in range(0, num_tokens, self.block):
            stop = min(start + self.block, num_tokens)
            total[..., :stop] += states.rows(start, stop).sum(dim=3).mean(dim=2)
        return total


@dataclass(frozen=True)
class KeyNorm:
    """Minus the L2 norm of the key: tokens with small keys draw most attention (Devoto et al. 2024)."""

    queries = 0

    def score(self, states: PromptStates) -> torch.Tensor:
        return -states.key.float().norm(dim=-1)


@dataclass(frozen=True)
class Recency:
    """Later tokens matter more (StreamingLLM, Xiao et al. 2024, which keeps the first four as sinks)."""

    queries = 0

    def score(self, states: PromptStates) -> torch.Tensor:
        places = torch.arange(states.key.shape[2], dtype=torch.float32, device=states.key.device)
        return places.expand(states.key.shape[:3])
