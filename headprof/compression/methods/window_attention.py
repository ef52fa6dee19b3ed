"""Importance by the attention of the last queries: of a window of them, or of the very last.

Shapes: `B` sequences, `K` KV heads, `g` query heads per KV head, `T` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Observation
from headprof.errors import UsageError


@dataclass(frozen=True)
class WindowAttention(Importance):
    """Attention from the last queries of the prompt, pooled over neighboring tokens (SnapKV, Li et al. 2024).

    Each token's score is the mean over the group's query heads and over those observing queries that can see it, so
    that tokens inside the window are judged on the same scale as the rest.

    Attributes:
        window: number of observing queries.
        kernel: width of the pooling over tokens, odd; 1 for none.
        pooling: what a token takes from its neighbors: the paper's `"max"`, or the `"mean"`.
        power: of the mean over queries and heads. The paper's 1 is the plain mean; with 2, the root of the mean
            square, one query or head that looks hard at a token outweighs many that glance.
        ramp: count the observing queries by their order, 1 for the oldest up to `window` for the last; padding is not
            among them, so that a short prompt is judged in a batch as it is alone.
    """

    window: int = 16
    kernel: int = 7
    pooling: str = "max"
    power: float = 1.0
    ramp: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"A window of {self.window} queries judges nothing: give a --window of at least 1.")
        if self.kernel < 1:
            raise UsageError(f"A kernel of {self.kernel} tokens averages nothing: give an odd --kernel, 1 or more.")
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

    def score(self, observed: Observation) -> Tensor:
        return self.pooled(self.attention(observed), observed)

    def pooled(self, attention: Tensor, observed: Observation) -> Tensor:
        """Each row's score from its own and its neighbors' attention, `[B, K, T]`; padding is nobody's neighbor."""
        padding = self.kernel // 2
        if self.pooling == "max":
            return max_pool1d(attention, self.kernel, stride=1, padding=padding)
        mean = avg_pool1d(attention, self.kernel, stride=1, padding=padding, count_include_pad=False)
        if not observed.padded:
            return mean
        valid = observed.valid_rows().float()
        share = avg_pool1d(valid, self.kernel, stride=1, padding=padding, count_include_pad=False)
        return mean / share.clamp(min=0.5 / self.kernel)

    def attention(self, observed: Observation) -> Tensor:
        """Each row's mean attention, before pooling, float32 `[B, K, T]`."""
        rows = observed.last_attention(self.window)  # [B, K, g, window, T]
        window = rows.shape[3]
        if window == 0:
            return rows.sum(dim=(2, 3))
        weights = _real_queries(observed, window).float()  # [B, window]
        if self.ramp:
            weights = weights * weights.cumsum(dim=-1)
        attention = (rows**self.power * weights[:, None, None, :, None]).sum(dim=3).mean(dim=2)
        # A row counts the weights of the queries from its own on; none if it is newer than all.
        weight_from = weights.flip(-1).cumsum(-1).flip(-1)
        weight_from = pad(weight_from, (0, 1)).clamp(min=1e-30)
        first_query = (observed.positions - observed.positions_of_queries()[-window]).clamp(0, window)
        weight = weight_from.gather(1, first_query.flatten(1)).view(first_query.shape)
        return (attention / weight) ** (1 / self.power)


def _real_queries(observed: Observation, count: int) -> Tensor:
    """Which of the last `count` queries are no padding, bool `[B, count]`.

    In a prompt those before its first token are; tokens after it that are not kept may still be asked.
    """
    if observed.query_valid is not None:
        return observed.query_valid[:, -count:]
    if observed.is_prompt:
        return (observed.valid.cumsum(dim=-1) > 0)[:, -count:]
    return torch.ones(observed.keys.shape[0], count, dtype=torch.bool, device=observed.keys.device)


@dataclass(frozen=True)
class LastQuery(Importance):
    """Attention from the last token of the prompt, averaged over all heads of the layer (TOVA, Oren et al. 2024).

    All KV heads of the layer get the same scores; of rows that not all of them hold, those that do have a say.
    """

    queries = 1

    def score(self, observed: Observation) -> Tensor:
        attention = observed.last_attention(1).sum(dim=3).mean(dim=2)  # [B, K, T]
        if observed.is_prompt:
            return attention.mean(dim=1, keepdim=True).expand(attention.shape)
        positions, index = torch.unique(observed.positions.long(), return_inverse=True)
        index, valid = index.flatten(1), observed.valid_rows().float()
        total, heads = attention.new_zeros(2, attention.shape[0], len(positions))
        total.scatter_add_(1, index, (attention * valid).flatten(1))
        heads.scatter_add_(1, index, valid.flatten(1))
        return (total / heads.clamp(min=1)).gather(1, index).view(attention.shape)
