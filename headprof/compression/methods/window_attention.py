"""Importance by the attention of the last queries: of a window of them, or of the very last.

Shapes: `B` sequences, `K` KV heads, `g` query heads per KV head, `T` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from headprof.compression.kernels.constants import constant
from headprof.compression.kernels.window_scores import WindowRequest, serves, window_scores
from headprof.compression.methods.class_sums import add_by_class
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Observation, per_head
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
        shared: average the scores over the KV heads of the layer too, as TOVA does: what some of them look at matters
            to all.
    """

    window: int = 16
    kernel: int = 7
    pooling: str = "max"
    power: float = 1.0
    ramp: bool = False
    shared: bool = False

    adds_up = True

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
        attention = self._of_heads(observed)
        return over_heads(attention, observed) if self.shared else attention

    def _of_heads(self, observed: Observation) -> Tensor:
        """`attention` with each KV head for itself."""
        window = min(self.window, observed.keys.shape[2] if observed.is_prompt else observed.queries.shape[2])
        if 0 < window <= observed.queries.shape[2] and serves(observed.queries):
            return self._by_kernel(observed, window)
        rows = observed.last_attention(self.window)  # [B, K, g, window, T]
        if window == 0:
            return rows.sum(dim=(2, 3))
        if observed.whole_and_causal:
            return self._of_whole(rows)
        weights, shares = self._weights(observed, window)
        attention = (rows**self.power * weights[:, None, None, :, None]).sum(dim=3).mean(dim=2)
        first_query = (observed.positions - observed.positions_of_queries()[-window]).clamp(0, window)
        share = shares.expand(len(attention), -1).gather(1, first_query.flatten(1)).view(first_query.shape)
        return (attention / share) ** (1 / self.power)

    def _by_kernel(self, observed: Observation, window: int) -> Tensor:
        weights, shares = self._weights(observed, window)
        prompt, layer = observed.is_prompt, observed.layer
        return window_scores(
            WindowRequest(
                observed.queries[:, :, -window:],
                observed.keys,
                weights,
                shares,
                layer.scaling,
                layer.softcap,
                layer.sliding_window,
                self.power,
                valid=per_head(observed.valid) if observed.padded else None,
                positions=None if prompt else observed.positions,
                query_positions=None if prompt else observed.positions_of_queries()[-window:],
                bias=observed.rows.columns.get("bias"),
            )
        )

    def _weights(self, observed: Observation, window: int) -> tuple[Tensor, Tensor]:
        """How much each observing query counts, and it and all later ones, as `WindowRequest` has them."""
        real = _real_queries(observed, window)
        if real is None:
            device = observed.queries.device
            return _weights(window, self.ramp, device)[None], _shares(window, self.ramp, device)[None]
        weights = real.float()
        if self.ramp:
            weights = weights * weights.cumsum(dim=-1)
        # A row counts the weights of the queries from its own on; none if it is newer than all.
        return weights, pad(weights.flip(-1).cumsum(-1).flip(-1), (0, 1)).clamp(min=1e-30)

    def _of_whole(self, rows: Tensor) -> Tensor:
        """`attention` of a prompt without padding, from that of its queries, `[B, K, g, window, T]`, overwritten."""
        if self.power != 1:
            rows = rows.pow_(self.power)
        if self.ramp:
            rows = rows.mul_(_weights(rows.shape[3], True, rows.device)[:, None])
        attention = rows.sum(dim=3).mean(dim=2)
        attention = attention.div_(_shares_of_prompt(rows.shape[4], rows.shape[3], self.ramp, rows.device))
        return attention if self.power == 1 else attention.pow_(1 / self.power)


def _ranks(window: int, ramp: bool) -> tuple[float, ...]:
    return tuple(range(1, window + 1)) if ramp else (1.0,) * window


def _weights(window: int, ramp: bool, device: torch.device) -> Tensor:
    """How much each query of a window counts where none is padding, float32 `[window]`."""
    return constant(_ranks(window, ramp), device)


def _shares(window: int, ramp: bool, device: torch.device) -> Tensor:
    """What each of these and all later ones count together, and next to nothing for none, float32 `[window + 1]`."""
    sums = accumulate(reversed(_ranks(window, ramp)))
    return constant((*reversed(list(sums)), 1e-30), device)


@lru_cache(maxsize=16)
def _shares_of_prompt(num_tokens: int, window: int, ramp: bool, device: torch.device) -> Tensor:
    """What the queries that see each token of a prompt count together, float32 `[T]`."""
    with torch.inference_mode(mode=False):
        shares = _shares(window, ramp, device)
        return torch.cat([shares[:1].expand(num_tokens - window), shares[:-1]])


def _real_queries(observed: Observation, count: int) -> Tensor | None:
    """Which of the last `count` queries are no padding, bool `[B, count]`; `None` if all are.

    In a prompt those before its first token are; tokens after it that are not kept may still be asked.
    """
    if observed.query_valid is not None:
        return observed.query_valid[:, -count:]
    if observed.is_prompt and observed.padded:
        return (observed.valid.cumsum(dim=-1) > 0)[:, -count:]
    return None


@dataclass(frozen=True)
class LastQuery(Importance):
    """Attention from the last token of the prompt, averaged over all heads of the layer (TOVA, Oren et al. 2024).

    All KV heads of the layer get the same scores; of rows that not all of them hold, those that do have a say.
    """

    queries = 1
    adds_up = True

    def score(self, observed: Observation) -> Tensor:
        return over_heads(_LAST.attention(observed), observed)


def over_heads(scores: Tensor, observed: Observation) -> Tensor:
    """Each row's mean score over the KV heads that hold its token, the same for all of them, float32 `[B, K, T]`.

    Args:
        scores: of each head, `[B, K, T]`, zero where there is no row; so is what is returned.
        observed: the rows.
    """
    shard = observed.layer.shard
    if observed.is_prompt:
        return shard.together(scores, dim=1).mean(dim=1, keepdim=True).expand(scores.shape)
    of_all = (shard.rows_together(each) for each in (scores, observed.positions, observed.valid_rows().float()))
    return shard.own(_over_held(*of_all), dim=1)[..., : scores.shape[2]]


def _over_held(scores: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """`over_heads` of held rows, from their scores, their positions, and one where there is a row, `[B, K, T]` each."""
    index = _numbered(positions.flatten(1))
    said = torch.stack([scores * valid, valid], dim=-1).flatten(1, 2)
    total, heads = add_by_class(said.new_zeros(said.shape), index, said).unbind(dim=-1)
    return (total / heads.clamp(min=1)).gather(1, index).view(scores.shape) * valid


_LAST = WindowAttention(window=1, kernel=1)


def _numbered(positions: Tensor) -> Tensor:
    """The number of each position among those of its sequence, in ascending order, int64; of `[B, N]` as many."""
    ascending, order = positions.sort(dim=1)
    number = (ascending.diff(dim=1, prepend=ascending[:, :1]) != 0).cumsum(dim=1)
    return torch.empty_like(number).scatter_(1, order, number)
