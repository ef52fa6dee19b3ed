"""Importance by the attention with which a text is repeated.

Shapes: `B` sequences, `K` KV heads, `g` query heads per KV head, `N` queries, `T` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.column_sums import column_maxima
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Observation
from headprof.errors import UsageError


@dataclass(frozen=True)
class Reconstruction(Importance):
    """The largest attention that any observing query of the group pays to a token (KVzip, Kim et al. 2025).

    "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416, without its factor of
    norms (KVzip+). Where a document is compressed before there is a question, the observers are "Repeat the previous
    context exactly." and the document once more, read in the same prefill: what is looked at in order to repeat the
    document is what answers questions about it. Each of them attends to the document and to the observers up to itself,
    as the model does. Where nothing is repeated, the last `window` queries judge: of a prompt that ends with its
    question, and while text is generated, when they are those since.

    The paper ranks the tokens of all heads of all layers together; so does the method `kvzip`, which reads a document
    twice for it (`GlobalBudget`). `adakv-kvzip` ranks those of each layer (`AdaptiveBudget`), which is compressed as
    soon as it has attended, and `headkv-kvzip` has a profile's budgets.

    Attributes:
        window: number of observing queries; of a document that is repeated it is all observers.
    """

    window: int = 16

    asks_for_repetition = True
    has_scale = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"A window of {self.window} queries judges nothing: give a --window of at least 1.")

    @property
    def queries(self) -> int:
        return self.window

    def score(self, observed: Observation) -> Tensor:
        if observed.is_prompt:
            return self._of_prompt(observed)
        attention = observed.last_attention(self.window)  # [B, K, g, N, T]
        if not attention.shape[3]:
            return attention.new_zeros(observed.keys.shape[:3])
        return attention.amax(dim=(2, 3))

    def _of_prompt(self, observed: Observation) -> Tensor:
        num_tokens = observed.keys.shape[2]
        asked = _last_queries(num_tokens, min(self.window, num_tokens), observed.keys.device)
        count, held = len(asked.on_host), observed.queries.shape[2]
        padded, valid = observed.padded, observed.valid
        if observed.attended is not None:  # the observers attend to each other too
            padded, valid = observed.attended.padded, observed.attended.valid
        return column_maxima(
            observed.queries[:, :, max(0, held - count) :],
            observed.keys,
            asked.positions,
            valid if padded else None,
            on_host=asked.on_host,
            plans=asked.plans,
            scaling=observed.layer.scaling,
            softcap=observed.layer.softcap,
            sliding_window=observed.layer.sliding_window,
        )


@dataclass(frozen=True)
class _LastQueries:
    """The last queries of a prompt: their positions on the device, int64 `[N]`, and on the host.

    `plans` has what `column_maxima` makes of them.
    """

    positions: Tensor
    on_host: range
    plans: dict[Any, Tensor] = field(default_factory=dict)


@lru_cache(maxsize=8)
def _last_queries(num_tokens: int, count: int, device: torch.device) -> _LastQueries:
    """Made once for all layers."""
    with torch.inference_mode(mode=False):
        positions = torch.arange(num_tokens - count, num_tokens, device=device)
        return _LastQueries(positions, range(num_tokens - count, num_tokens))
