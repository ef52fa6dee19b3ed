"""Reading attention where it is needed: the few query rows that predict an answer, one layer at a time.

The model's own attention (SDPA, FlashAttention) does the forward pass; beside it, the chosen rows are computed once
more in float32 from the same queries and keys. Extra memory is `O(H * N * T)` for one layer: never `T x T`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from headprof.interface import AttentionFunction, wrapped_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RowSink = Callable[[int, torch.Tensor], None]
"""Takes a layer's number and its attention rows, float32 `[H, N, T]`."""


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of some queries to every key, in float32.

    Args:
        query: `[H, N, D]`, the queries wanted.
        key: `[K, T, D]`; query head `h` reads key head `h // (H // K)`.
        visible: which keys each query sees, bool `[N, T]`, or added to the logits, float `[N, T]`.
        scaling: factor on the logits.
        softcap: Gemma-2's bound on the logits, `cap * tanh(logits / cap)`.
        sinks: learned logits `[H]` that join the softmax and are dropped (gpt-oss).

    Returns:
        float32 `[H, N, T]`; each row sums to one (to less, with `sinks`).
    """
    num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    grouped = query.float().reshape(num_kv_heads, -1, head_dim)  # [K, g * N, D]
    logits = (grouped @ key.float().transpose(1, 2)).reshape(num_heads, num_queries, num_keys) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    boolean = visible.dtype == torch.bool
    logits = logits.masked_fill(~visible, float("-inf")) if boolean else logits + visible.float()
    if sinks is None:
        return logits.softmax(dim=-1)
    sink_column = sinks.float()[:, None, None].expand(num_heads, num_queries, 1)
    return torch.cat([logits, sink_column], dim=-1).softmax(dim=-1)[..., :-1]


def causal_visibility(query_positions: torch.Tensor, num_keys: int, sliding_window: int | None = None) -> torch.Tensor:
    """Which of `num_keys` keys each query sees under the causal mask (and a sliding window, itself included).

    Args:
        query_positions: place of each query among the keys, `[N]`.
        num_keys: `T`.
        sliding_window: number of last keys a query sees; `None` for all.

    Returns:
        bool `[N, T]`.
    """
    key_positions = torch.arange(num_keys, device=query_positions.device)
    visible = key_positions <= query_positions[:, None]
    if sliding_window is not None:
        visible &= key_positions > query_positions[:, None] - sliding_window
    return visible


class RowReader:
    """Hands chosen attention rows of a model's forward passes to a sink, for one sequence at a time (batch size 1).

    The cache must keep every token (a plain `DynamicCache()`), so that column `j` of a row is token `j` of the prompt.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.base = model.config.get_text_config()._attn_implementation
        self._request: tuple[torch.Tensor, RowSink] | None = None

    @contextmanager
    def installed(self) -> Iterator[RowReader]:
        """Wrap the model's attention while the context lasts; rows are read only inside `reading`."""
        with wrapped_attention(self.model, self._wrap):
            yield self

    @contextmanager
    def reading(self, rows: torch.Tensor, sink: RowSink) -> Iterator[None]:
        """Read the rows of the queries numbered `rows` (int64 `[N]`, from 0) of each forward pass in this context."""
        self._request = (rows, sink)
        try:
            yield
        finally:
            self._request = None

    def _wrap(self, base: AttentionFunction) -> AttentionFunction:
        def attention(module, query, key, value, attention_mask, **kwargs):
            output = base(module, query, key, value, attention_mask, **kwargs)
            if self._request is not None:
                rows, sink = self._request
                sink(module.layer_idx, self._rows(rows.to(query.device), query, key, attention_mask, kwargs))
            return output

        return attention

    @staticmethod
    def _rows(rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor, mask, kwargs: dict) -> torch.Tensor:
        num_keys = key.shape[2]
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            visible = mask[0, 0, rows, :num_keys]
        else:  # the base function applies causality by itself
            positions = rows + num_keys - query.shape[2]
            visible = causal_visibility(positions, num_keys, kwargs.get("sliding_window"))
        scaling = kwargs.get("scaling")
        return attention_rows(
            query[0, :, rows],
            key[0],
            visible,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
