"""Importance by the attention with which a text is repeated.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `N` queries, `T` rows.
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
from headprof.compression.segments import Part, parts_of
from headprof.errors import UsageError
from headprof.models.output_projection import output_weights, projected_norms


@dataclass(frozen=True)
class Reconstruction(Importance):
    """The largest attention that any observing query of the group pays to a token (KVzip, Kim et al. 2025).

    "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416. Where a document is
    compressed before there is a question, the observers are "Repeat the previous context exactly." and the document
    once more, read in the same prefill: what is looked at in order to repeat the document is what answers questions
    about it. Each of them attends to the document and to the observers up to itself, as the model does. A document of
    more than `segment` tokens is repeated in parts of about one length; each is asked for by itself, sees the document
    and nothing of the other parts, and of what they pay to a token the largest counts. (The paper lets a part judge its
    own stretch of the document alone; here each judges all of it.) Where nothing is repeated, the last `window` queries
    judge: of a prompt that ends with its question, and while text is generated, when they are those since.

    With `norms` attention is what it adds to the hidden state (KVzip+, Jegou and Jeblick 2026, arXiv 2601.07891): what
    query `j` of head `h` pays to token `i` is multiplied by `|v_i W_h|`, `W_h` being the head's part of the output
    projection, and divided by `|x_j|`, the norm of what the attention module was given for `j`. While text is generated
    the latter is not known, and all queries count alike.

    The paper ranks the tokens of all heads of all layers together; so does the method `kvzip`, which reads a document
    twice for it (`GlobalBudget`). `adakv-kvzip` ranks those of each layer (`AdaptiveBudget`), which is compressed as
    soon as it has attended, and `headkv-kvzip` has a profile's budgets.

    Attributes:
        window: number of observing queries; of a document that is repeated it is all observers.
        segment: most tokens of a document that are repeated at once.
        norms: whether the norms of values and hidden states count.
    """

    window: int = 16
    segment: int = 2048
    norms: bool = False

    asks_for_repetition = True
    adds_up = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"A window of {self.window} queries judges nothing: give a --window of at least 1.")
        if self.segment < 1:
            raise UsageError(f"Segments of {self.segment} tokens repeat nothing: give segment at least 1.")

    @property
    def has_scale(self) -> bool:
        return not self.norms

    @property
    def queries(self) -> int:
        return self.window

    def score(self, observed: Observation) -> Tensor:
        if observed.is_prompt:
            return self._of_prompt(observed)
        attention = observed.last_attention(self.window)  # [B, K, g, N, T]
        if not attention.shape[3]:
            return attention.new_zeros(observed.keys.shape[:3])
        return self._of_groups(attention.amax(dim=3).flatten(1, 2), observed) if self.norms else attention.amax((2, 3))

    def _of_prompt(self, observed: Observation) -> Tensor:
        batch, num_kv_heads, tokens, _ = observed.keys.shape
        count, document = min(self.window, tokens), tokens - sum(observed.segments)
        heads = observed.queries.shape[1] if self.norms else num_kv_heads
        largest = observed.keys.new_zeros(batch, heads, tokens, dtype=torch.float32)
        for part in parts_of(tokens - count, tokens, document, observed.segments):
            paid = self._paid(observed, part, part.seen(observed.keys, document), count)[:, :, :document]
            rows = largest[:, :, : paid.shape[2]]
            torch.maximum(rows, paid, out=rows)
        return self._of_groups(largest, observed) if self.norms else largest

    def _paid(self, observed: Observation, part: Part, keys: Tensor, count: int) -> Tensor:
        """The most that queries of one part of the last `count` pay to each key: float32 `[B, K, keys]`.

        With `norms` what each head pays, divided by the norms of the queries' hidden states, `[B, H, keys]`.
        """
        padded, valid = observed.padded, observed.valid
        if observed.attended is not None:  # the observers attend to each other too
            padded, valid = observed.attended.padded, observed.attended.valid
        before = max(0, observed.queries.shape[2] - count)
        held = slice(before + part.queries.start, before + part.queries.stop)
        asked = _last_queries(part.stop, part.stop - part.start, keys.device)
        given = observed.queries[:, :, held], keys, valid if padded and not observed.segments else None
        how: dict[str, Any] = {
            "positions": asked.positions,
            "on_host": asked.on_host,
            "plans": asked.plans,
            "scaling": observed.layer.scaling,
            "softcap": observed.layer.softcap,
            "sliding_window": observed.layer.sliding_window,
        }
        if not self.norms:
            return column_maxima(given[0], keys, valid=given[2], **how)
        norms = observed.query_norms
        return _of_each_head(*given, None if norms is None else norms[:, held], how)

    def _of_groups(self, of_heads: Tensor, observed: Observation) -> Tensor:
        """The largest of each group, `[B, K, T]`, from what each head pays, `[B, H, T]`, by the norms of the values."""
        module = observed.layer.module
        assert module is not None  # as whatever has queries
        norms = projected_norms(observed.values, output_weights(module, of_heads.shape[1]))
        return (of_heads * norms).unflatten(1, (observed.keys.shape[1], -1)).amax(dim=2)


def _of_each_head(
    query: Tensor, key: Tensor, valid: Tensor | None, norms: Tensor | None, how: dict[str, Any]
) -> Tensor:
    """`column_maxima` of each query head by itself, `[B, H, T]`, each query divided by its norm, `[B, N]`."""
    group = query.shape[1] // key.shape[1]
    of_heads = key.new_empty(*key.shape[:2], group, key.shape[2], dtype=torch.float32)
    for b, sequence in enumerate(zip(query.split(1), key.split(1), strict=True)):
        how = how | {"weights": None if norms is None else norms[b].clamp(min=_SMALLEST_NORM).reciprocal()}
        for head in range(group):
            heads = sequence[0][:, head::group]
            own = None if valid is None else valid[b : b + 1]
            of_heads[b, :, head] = column_maxima(heads, sequence[1], valid=own, **how)[0]
    return of_heads.flatten(1, 2)


_SMALLEST_NORM = 1e-6
"""Of a hidden state; nothing that a model has normalized is as small, but padding may be."""


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
