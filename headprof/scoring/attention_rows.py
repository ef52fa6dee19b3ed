"""Reading attention where it is needed: the few query rows that predict an answer, of as many layers at once as fit.

The model's own attention (SDPA, FlashAttention) does the forward pass; beside it, the chosen rows are computed once
more in float32 from the same queries and keys. Extra memory is `O(l * B * H * N * T)` for a block of `l` layers (see
`layer_blocks`), and for one layer at a time where the context is long: never `T x T`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.errors import ModelError
from headprof.models.attention_hook import AttentionFunction, eager_attention, wrapped_attention
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard
from headprof.scoring.layer_blocks import Attended, LayerBlocks, in_parts, stacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Attention rows of a run of layers, and what they attend to.

    Attributes:
        layers: numbers of the `l` layers, one after the other.
        columns: which of the rows that were asked for, `n` of them.
        rows: float32 `[l, B, H, n, T]`.
        values: float32 `[l, B, K, T, D]`.
    """

    layers: range
    columns: slice
    rows: Tensor
    values: Tensor


RowSink = Callable[[RowBlock], None]


def attention_rows(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of some queries to every key, in float32.

    Args:
        query: `[..., H, N, D]`, the queries wanted.
        key: `[..., K, T, D]`; query head `h` reads key head `h // (H // K)`.
        visible: which keys each query sees, bool `[..., N, T]`, or added to the logits, float `[..., N, T]`; what
            stands in front may be broadcast.
        scaling: factor on the logits.
        softcap: Gemma-2's bound on the logits, `cap * tanh(logits / cap)`.
        sinks: learned logits `[..., H]` that join the softmax and are dropped (gpt-oss).

    Returns:
        float32 `[..., H, N, T]`; each row sums to one (to less, with `sinks`).
    """
    (*outer, num_heads, num_queries, head_dim), num_kv_heads, num_keys = query.shape, key.shape[-3], key.shape[-2]
    grouped = query.float().reshape(*outer, num_kv_heads, -1, head_dim)  # [..., K, g * N, D]
    logits = (grouped @ key.float().transpose(-1, -2)).view(*outer, num_heads, num_queries, num_keys)
    logits.mul_(scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible.dtype == torch.bool:
        logits.masked_fill_(~visible.unsqueeze(-3), float("-inf"))
    else:
        logits.add_(visible.float().unsqueeze(-3))
    if sinks is None:
        return logits.softmax(dim=-1)
    sink_column = sinks.float()[..., None, None].expand(*outer, num_heads, num_queries, 1)
    return torch.cat([logits, sink_column], dim=-1).softmax(dim=-1)[..., :-1]


def causal_visibility(query_positions: Tensor, num_keys: int, sliding_window: int | None = None) -> Tensor:
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
    """Hands chosen attention rows of a model's forward passes to a sink, block by block of layers.

    The cache must keep every token (a plain `DynamicCache()`), so that column `j` of a row is token `j` of the prompt.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.base = model.config.get_text_config()._attn_implementation
        shape = HeadShape.from_config(model.config)
        self._num_layers, self._num_heads = shape.num_layers, HeadShard.of_model(model).count(shape.num_heads)
        self._blocks: LayerBlocks | None = None
        self._layers: Counter[int] = Counter()  # how often each has been read

    @contextmanager
    def installed(self) -> Iterator[RowReader]:
        """Wrap the model's attention while the context lasts; rows are read only inside `reading`."""
        with wrapped_attention(self.model, self._wrap):
            yield self

    @contextmanager
    def reading(self, rows: Tensor, sink: RowSink, *, most_bytes: int | None = None, beside: int = 0) -> Iterator[None]:
        """Read rows of the forward pass in this context, so that few are held at once.

        Args:
            rows: numbers of the queries, from 0, the same in all sequences, int64 `[N]`.
            sink: called for each block of layers, and for each part of its rows where not all fit.
            most_bytes: what a block may take; `None` for `block_bytes`.
            beside: bytes of that which the sink takes for each layer.

        Raises:
            ModelError: the layers do not attend once each, with as many heads as the configuration says.
        """
        place = _as_slice(rows)

        def work(layers: Sequence[Attended], most: int) -> None:
            _hand_on(layers, most, place, sink)

        self._blocks = LayerBlocks(len(rows), work, most_bytes, beside)
        self._layers.clear()
        try:
            yield
            self._blocks.finish()
        finally:
            self._blocks = None
        if self._layers and (len(self._layers) < self._num_layers or len(set(self._layers.values())) > 1):
            raise self._refused(f"attends {self._layers.total()} times in {self._num_layers} layers")

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} {why}, so its heads cannot be scored: choose a model whose layers attend "
            "once each, such as Llama, Qwen or Mistral."
        )

    def _wrap(self, base: AttentionFunction) -> AttentionFunction:
        def attention(module, query, key, value, attention_mask, **kwargs):
            function = base
            if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and self.base == "flash_attention_2":
                # It cannot serve the mask of several questions side by side; SDPA can, but knows no extras.
                extras = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
                function = eager_attention if extras else ALL_ATTENTION_FUNCTIONS["sdpa"]
            output = function(module, query, key, value, attention_mask, **kwargs)
            if self._blocks is not None:
                self._take(Attended.of(module.layer_idx, query, key, value, attention_mask, kwargs))
            return output

        return attention

    def _take(self, layer: Attended) -> None:
        assert self._blocks is not None
        heads = layer.query.shape[1]
        if heads != self._num_heads or layer.query.shape[-1] != layer.key.shape[-1]:
            raise self._refused(f"has {heads} query heads in layer {layer.layer} instead of {self._num_heads}")
        self._layers[layer.layer] += 1
        self._blocks.take(layer)


def _as_slice(rows: Tensor) -> slice | Tensor:
    """Rows that follow one another as a slice, which copies nothing."""
    first = int(rows[0])
    return slice(first, first + len(rows)) if torch.equal(rows, torch.arange(first, first + len(rows))) else rows


def _hand_on(layers: Sequence[Attended], most: int, place: slice | Tensor, sink: RowSink) -> None:
    """Compute the rows of a block, and hand them on, at most `most` at once."""
    first, numbers = layers[0], range(layers[0].layer, layers[-1].layer + 1)
    if isinstance(place, Tensor):
        place = place.to(first.query.device, non_blocking=True)
    queries = stacked([each.query[:, :, place] for each in layers])
    visible = _visible(layers, place)
    keys, values = (stacked(each).float() for each in zip(*((e.key, e.value) for e in layers), strict=True))
    sinks = None if first.sinks is None else stacked([e.sinks for e in layers if e.sinks is not None])[:, None]
    for part in in_parts(queries.shape[3], most):
        rows = attention_rows(
            queries[..., part, :],
            keys,
            visible[..., part, :],
            scaling=first.scaling,
            softcap=first.softcap,
            sinks=sinks,
        )
        sink(RowBlock(numbers, part, rows, values))


def _visible(layers: Sequence[Attended], place: slice | Tensor) -> Tensor:
    """What the rows see: `[l or 1, B or 1, N, T]`, or `[N, T]`."""
    first, num_keys = layers[0], layers[0].key.shape[2]
    if first.mask is not None:
        masks = [each.mask for each in layers if each.mask is not None]
        if all(each is masks[0] for each in masks):
            masks = masks[:1]
        return stacked([each[:, 0, place, :num_keys] for each in masks])
    tokens = torch.arange(num_keys - first.query.shape[2], num_keys, device=first.query.device)
    return causal_visibility(tokens[place], num_keys, first.window)  # the base function applies causality by itself
