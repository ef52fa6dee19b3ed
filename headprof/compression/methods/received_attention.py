"""Importance by the attention that rows have received from all queries, alone or beside that of the last.

Shapes: `B` sequences, `K` KV heads, `T` rows, `N` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.column_sums import column_sums
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.methods.window_attention import WindowAttention, over_heads
from headprof.errors import UsageError


@dataclass(frozen=True)
class Accumulated(Importance):
    """Attention summed over all queries so far, averaged over the group (H2O, Zhang et al. 2023).

    Attributes:
        shared: average it over the KV heads of the layer too (PrefixKV, Wang et al. 2024), so that they keep the same
            rows.
    """

    shared: bool = False

    queries = None
    at_hand = 0
    adds_up = True

    def score(self, observed: Observation) -> Tensor:
        return self.assess(observed).importance

    def assess(self, observed: Observation) -> Assessment:
        received = received_attention(observed)
        judged = over_heads(received, observed) if self.shared else received
        return Assessment(judged, columns={"received": received})


def received_attention(observed: Observation, samples: int = 0, last: int = 0) -> Tensor:
    """Attention that each row has received from all queries so far, averaged over the group, float32 `[B, K, T]`.

    Args:
        observed: a prompt, with all its queries, or held rows with the queries that came since they were last scored.
        samples: of a prompt's queries count about so many, evenly spaced, each for those that it stands for; 0 for all.
        last: so many of the last queries count in any case.
    """
    key = ("received", samples, last)
    if key not in observed.shared:
        observed.shared[key] = _received_attention(observed, samples, last)
    return observed.shared[key]


def _received_attention(observed: Observation, samples: int, last: int) -> Tensor:
    if not observed.is_prompt:
        paid = observed.last_attention(observed.queries.shape[2]).sum(dim=3).mean(dim=2)
        before = observed.rows.columns.get("received")
        return paid if before is None else paid + before
    num_tokens = observed.keys.shape[2]
    asked = _asked_queries(num_tokens, samples, last, observed.keys.device)
    return column_sums(
        observed.queries if asked.weights is None else observed.queries[:, :, asked.positions],
        observed.keys,
        asked.positions,
        observed.valid if observed.padded else None,
        on_host=asked.on_host,
        plans=asked.plans,
        scaling=observed.layer.scaling,
        softcap=observed.layer.softcap,
        sliding_window=observed.layer.sliding_window,
        weights=asked.weights,
    )


@dataclass(frozen=True)
class _AskedQueries:
    """Which queries of a prompt are asked.

    Attributes:
        positions: theirs, int64 `[N]`, on the device.
        weights: how many each stands for, float32 `[N]`, on the device; `None` where all are asked.
        on_host: the positions again.
        plans: what `column_sums` makes of them.
    """

    positions: Tensor
    weights: Tensor | None
    on_host: Sequence[int]
    plans: dict[Any, Tensor] = field(default_factory=dict)


@lru_cache(maxsize=8)
def _asked_queries(num_tokens: int, samples: int, last: int, device: torch.device) -> _AskedQueries:
    """`sampled_queries` on a device, once for all layers; nothing waits for it."""
    with torch.inference_mode(mode=False):
        positions, weights = sampled_queries(num_tokens, samples, last)
        if len(positions) == num_tokens:
            return _AskedQueries(torch.arange(num_tokens, device=device), None, range(num_tokens))
        on_host = positions.tolist()
        positions, weights = (each.to(device, non_blocking=True) for each in (positions, weights))
        return _AskedQueries(positions, weights, on_host)


def sampled_queries(num_tokens: int, samples: int, last: int) -> tuple[Tensor, Tensor]:
    """Positions of the queries of a prompt that are asked, int64 `[N]`, and how many each stands for, float32 `[N]`.

    The last `last` are all asked; of those before them every `stride`-th, for the `stride` that end with it.
    """
    before = max(0, num_tokens - last)
    stride = -(-before // samples) if samples else 1
    if stride <= 1:
        return torch.arange(num_tokens), torch.ones(num_tokens)
    spaced = torch.arange(before - 1, -1, -stride).flip(0)
    stands_for = torch.diff(spaced, prepend=torch.tensor([-1]))
    positions = torch.cat([spaced, torch.arange(before, num_tokens)])
    return positions, torch.cat([stands_for, torch.ones(num_tokens - before, dtype=torch.int64)]).float()


@dataclass(frozen=True)
class GlobalLocal(WindowAttention):
    """Attention from the whole prompt and from its end together (EMS, Li et al. 2024, "Global-Local Importance").

    A token's global score is the mean attention from all queries from its own on; a sum would favor early tokens, which
    more queries see. Its local score is `WindowAttention`'s. The global scores are rescaled to the local ones' mean
    over a head's tokens before the two are joined. While text is generated, the window is that of the queries since the
    rows were last scored.

    Attributes:
        combine: how they are joined: the paper's `"max"`, `"sum"`, `"product"` (geometric mean), or `"global"` or
            `"local"` for one alone.
        balance: factor on the global score before they are joined.
        samples: queries of the prompt that the global score asks, evenly spaced beside all of the window; 0 for all.
        recency: exponent on the share of the sequence from which a token is seen: 0 for the mean, 1 for H2O's sum.
        emphasis: rows that merge are weighed by their mean attention from all queries, and so many times that from the
            window. Without it, what only the window looks at, such as the answer to a question, is drowned in a
            cluster by what the whole text looks at. With one score alone, rows are weighed by that one.
    """

    combine: str = "max"
    balance: float = 1.0
    samples: int = 1024
    recency: float = 0.0
    emphasis: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine not in ("max", "sum", "product", "global", "local"):
            raise UsageError(
                f"Global and local scores cannot be joined by {self.combine!r}: choose max, sum, product, global or "
                "local."
            )
        if self.balance <= 0:
            raise UsageError(f"A balance of {self.balance} leaves no global score: give more than 0, or combine=local.")
        if self.emphasis < 0:
            raise UsageError(f"An emphasis of {self.emphasis} would weigh rows below nothing: give 0 or more.")
        if self.samples < 0:
            raise UsageError(f"There are no {self.samples} queries to ask: give samples of at least 1, or 0 for all.")

    @property
    def queries(self) -> int | None:  # type: ignore[override]
        return None

    @property
    def at_hand(self) -> int:
        return self.window

    def score(self, observed: Observation) -> Tensor:
        return self.assess(observed).importance

    def assess(self, observed: Observation) -> Assessment:
        received = received_attention(observed, self.samples, self.window)
        valid = observed.valid_rows() if observed.padded else None
        seen = observed.num_seen
        seen_from = _seen_from(observed)
        whole = received / seen_from
        local = self.attention(observed)
        recent = whole * (seen_from / seen) ** self.recency if self.recency else whole
        joined = self._joined(recent, self.pooled(local, observed), valid)
        alone = {"global": whole, "local": local}
        weights = alone[self.combine] if self.combine in alone else whole + self.emphasis * local
        return Assessment(joined, weights, {"received": received})

    def _joined(self, whole: Tensor, local: Tensor, valid: Tensor | None) -> Tensor:
        if self.combine == "global":
            return whole
        if self.combine == "local":
            return local
        whole = whole * (self.balance * _mean(local, valid) / _mean(whole, valid).clamp(min=1e-30))
        if self.combine == "max":
            return torch.maximum(whole, local)
        return whole + local if self.combine == "sum" else (whole * local).sqrt()


def _seen_from(observed: Observation) -> Tensor:
    """Of how many tokens each row has been seen, float32 `[B, K, T]`, or `[T]` for a prompt."""
    if observed.is_prompt and observed.num_seen == observed.keys.shape[2]:
        return _seen_in_prompt(observed.num_seen, observed.keys.device)
    return (observed.num_seen - observed.positions).clamp(min=1).float()


@lru_cache(maxsize=16)
def _seen_in_prompt(num_tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.arange(num_tokens, 0, -1, device=device).float()


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of each head's valid entries, of all if that is `None`, `[B, K, 1]`."""
    if valid is None:
        return values.sum(dim=-1, keepdim=True) / values.shape[-1]
    return (values * valid).sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp(min=1)
