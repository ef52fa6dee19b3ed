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
        query: the prompt's queries, `[B, H, T, D]`.
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

    def last_rows(self, count: int) -> torch.Tensor:
        """Softmax attention of the last `count` queries, float32 `[B, K, g, count, T]`."""
        num_kv_heads, num_tokens, head_dim = self.key.shape[1:]
        batch = self.query.shape[0]
        query = self.query[:, :, -count:].float().reshape(batch, num_kv_heads, -1, head_dim)
        logits = query @ self.key.float().transpose(2, 3) * self.scaling  # [B, K, g * count, T]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        positions = torch.arange(num_tokens, device=self.key.device)
        observers = positions[-count:, None]
        visible = positions <= observers
        if self.sliding_window is not None:
            visible &= positions > observers - self.sliding_window
        visible = (visible & self.valid[:, None, :])[:, None, None]  # [B, 1, 1, count, T]
        logits = logits.reshape(batch, num_kv_heads, -1, count, num_tokens)
        # A padding query sees nothing; its row is made zero instead of NaN.
        return logits.masked_fill(~visible, float("-inf")).softmax(dim=-1).nan_to_num(nan=0.0)


class Importance(Protocol):
    """Scores the prompt's tokens for each KV head of a layer; higher is kept."""

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
    """

    window: int = 16
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise UsageError(
                f"A kernel of {self.kernel} has no middle: give an odd --kernel, such as {self.kernel + 1}."
            )
        if self.pooling not in ("max", "mean"):
            raise UsageError(f"There is no pooling {self.pooling!r}: choose max or mean.")

    def score(self, states: PromptStates) -> torch.Tensor:
        num_tokens = states.key.shape[2]
        window = min(self.window, num_tokens)
        attention = states.last_rows(window).sum(dim=3).mean(dim=2)  # [B, K, T]
        age = torch.arange(num_tokens, 0, -1, device=attention.device)  # 1 for the last token
        attention = attention / age.clamp(max=window)
        if self.pooling == "mean":
            return avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)
        return max_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
