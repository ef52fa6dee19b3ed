"""Reading attention where it is needed: the few query rows that predict an answer, one layer at a time.

The model's own attention (SDPA, FlashAttention) does the forward pass; beside it, the chosen rows are computed once
more in float32 from the same queries and keys. Extra memory is `O(H * N * T)` for one layer: never `T x T`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.errors import ModelError
from headprof.models.attention_hook import AttentionFunction, eager_attention, wrapped_attention
from headprof.models.shape import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RowSink = Callable[[int, int, torch.Tensor, torch.Tensor], None]
"""Takes a layer's number, that of a part of the rows asked for, these attention rows, float32 `[H, N, T]`, and the
layer's values, float32 `[K, T, D]`."""

_MOST_BYTES = 1 << 28
"""Of attention rows that are held at once."""


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
        query_positions: position of each query among the keys, `[N]`.
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
        self._shape = HeadShape.from_config(model.config)
        self._request: tuple[Sequence[torch.Tensor], RowSink] | None = None
        self._layers: Counter[int] = Counter()  # how often each has been read

    @contextmanager
    def installed(self) -> Iterator[RowReader]:
        """Wrap the model's attention while the context lasts; rows are read only inside `reading`."""
        with wrapped_attention(self.model, self._wrap):
            yield self

    @contextmanager
    def reading(self, parts: Sequence[torch.Tensor], sink: RowSink) -> Iterator[None]:
        """Read rows of each forward pass in this context, part by part, so that few are held at once.

        Args:
            parts: numbers of the queries of each part, from 0, int64 `[N]`.
            sink: called for each part in every layer.

        Raises:
            ModelError: the layers do not attend once each, with as many heads as the configuration says.
        """
        self._request = (parts, sink)
        self._layers.clear()
        try:
            yield
        finally:
            self._request = None
        if self._layers and (len(self._layers) < self._shape.num_layers or len(set(self._layers.values())) > 1):
            raise self._refused(f"attends {self._layers.total()} times in {self._shape.num_layers} layers")

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} {why}, so its heads cannot be scored: choose a model whose layers attend "
            "once each, such as Llama, Qwen or Mistral."
        )

    def _wrap(self, base: AttentionFunction) -> AttentionFunction:
        def attention(module, query, key, value, attention_mask, **kwargs):
            masked = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
            function = base
            if masked and self.base == "flash_attention_2":
                # It cannot serve the mask of several questions side by side; SDPA can, but knows no extras.
                extras = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
                function = eager_attention if extras else ALL_ATTENTION_FUNCTIONS["sdpa"]
            output = function(module, query, key, value, attention_mask, **kwargs)
            if self._request is not None:
                self._read(module.layer_idx, query, key, value, attention_mask if masked else None, kwargs)
            return output

        return attention

    def _read(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs,
    ) -> None:
        assert self._request is not None
        parts, sink = self._request
        if query.shape[1] != self._shape.num_heads or query.shape[-1] != key.shape[-1]:
            raise self._refused(f"has {query.shape[1]} query heads in layer {layer} instead of {self._shape.num_heads}")
        self._layers[layer] += 1
        num_keys, scaling = key.shape[2], kwargs.get("scaling")
        keys, values = key[0].float(), value[0].float()  # once, not for each part
        most = max(1, _MOST_BYTES // (4 * query.shape[1] * num_keys))
        for numbers in _joined([len(part) for part in parts], most):
            rows = torch.cat([parts[number] for number in numbers]).to(query.device)
            if mask is not None:
                visible = mask[0, 0, rows, :num_keys]
            else:  # the base function applies causality by itself
                positions = rows + num_keys - query.shape[2]
                visible = causal_visibility(positions, num_keys, kwargs.get("sliding_window"))
            attention = attention_rows(
                query[0, :, rows],
                keys,
                visible,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
            for number, part in zip(numbers, attention.split([len(parts[n]) for n in numbers], dim=1), strict=True):
                sink(layer, number, part, values)


def _joined(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive numbers of parts that have at most `most` rows together; a larger part stands alone."""
    numbers: list[int] = []
    for number, size in enumerate(sizes):
        if numbers and sum(sizes[n] for n in numbers) + size > most:
            yield numbers
            numbers = []
        numbers.append(number)
    if numbers:
        yield numbers
