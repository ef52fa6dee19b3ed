"""The link between a cache and a model's attention, all of it.

Inside `attending(model)` this happens to each layer in a forward pass, in this order:

1. The model starts: with `new_cache` (that is `headprof.compressed`), a pre-hook puts a fresh cache in the place of
   none, or of an empty one that Transformers has made.
2. With `prefill_chunk`, the decoder layer's `forward` is one of ours: it runs the layer over the prompt's slices, one
   after the other, before the next layer begins. It announces the prompt to the cache (`expect`), and the masks that
   the model made for it once are pending ones, of which each slice gets its own part.
3. The attention module projects, rotates and calls `cache.update(keys, values, layer_idx)`. The cache's layer answers
   with keys that carry a mark, the layer itself (`mark`); for a prompt in slices these are all keys so far.
4. The module hands what it got to its attention function, which is one of ours around the model's own. By the mark on
   the keys it finds the layer:
   - none: another cache; the model's function does it all.
   - a layer on its way through a prompt: the model's function attends; then `layer.attended(...)` is given queries,
     keys, values, padding, and the attention layer, and once the prompt is whole it keeps what its method keeps.
   - a layer that holds rows: `ragged_attention` over them; then `layer.observe(...)` is given the queries.

In the first passes `LinkCheck` looks whether the model does so in every layer.

When the context ends, also by an exception, the model has its own attention, masks and `forward` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from headprof.compression.chunks import PendingMask, joined, sliced
from headprof.compression.kernels.backends import check_backend, ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.link_check import LinkCheck
from headprof.compression.methods.observation import AttentionLayer
from headprof.errors import ModelError, UsageError
from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.decoder import find_decoder_layers
from headprof.models.rotary import Rotary, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MarkedLayer(Protocol):
    """What the attention function asks of the cache layer that it finds by the mark."""

    is_initialized: bool
    """Whether it holds rows."""
    batch_size: int

    def attended(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, layer: AttentionLayer) -> None:
        """A part of the prompt, or all of it, has been attended over."""
        ...

    def rows_in_place(self) -> RaggedRows:
        """The rows it holds, the newest tokens' included."""
        ...

    def hide_newest(self, visible: Tensor) -> None:
        """Of the newest tokens only these are no padding, bool `[B, Q]`."""
        ...

    def observe(self, query: Tensor, valid: Tensor | None, layer: AttentionLayer) -> None:
        """The newest tokens have attended over the rows."""
        ...


def mark(keys: Tensor, layer: Any) -> Tensor:
    """The same keys, by which the attention function finds `layer`: a model passes them on to it untouched."""
    keys.head_cache_layer = layer  # type: ignore[attr-defined]
    return keys


def _marked(keys: Tensor) -> MarkedLayer | None:
    return getattr(keys, "head_cache_layer", None)


@contextmanager
def attending(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    new_cache: Callable[[], Cache] | None = None,
) -> Iterator[None]:
    """Link `model`'s attention to the caches of this package while the context lasts.

    Args:
        model: the model.
        backend: the attention over compressed rows, a name in `BACKENDS`, or `"auto"`.
        prefill_chunk: tokens that a layer runs over at a time, or `None` for all at once.
        new_cache: makes the cache that a forward pass begins with where it would begin with an empty one of
            Transformers', or `None` to leave that as it is.

    Raises:
        UsageError: the backend cannot be used here, or the chunk is not positive.
        ModelError: the model's attention or layers cannot be reached.
    """
    check_backend(backend)
    with ExitStack() as stack:
        wrap_mask = _same if prefill_chunk is None else stack.enter_context(_chunked_layers(model, prefill_chunk))
        rotaries, check = _Rotaries(model), LinkCheck(model, in_chunks=prefill_chunk is not None)
        stack.enter_context(wrapped_attention(model, lambda base: _linked(base, backend, rotaries, check), wrap_mask))
        if new_cache is not None:
            hook = model.register_forward_pre_hook(_starting_with(new_cache), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(check.installed())
        yield


# Step 1.


def _starting_with(new_cache: Callable[[], Cache]) -> Callable:
    def start(_module, args, kwargs):
        cache = kwargs.get("past_key_values")
        fresh = cache is None or (type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 0)
        if fresh and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = new_cache()
        return args, kwargs

    return start


# Step 2.


@contextmanager
def _chunked_layers(model: PreTrainedModel, chunk: int) -> Iterator[Callable[[Callable], Callable]]:
    """Run `model`'s decoder layers over at most `chunk` tokens at a time; yields what to wrap its mask function in."""
    if chunk < 1:
        raise UsageError(f"A prefill chunk of {chunk} tokens cannot be run: give --prefill-chunk at least 1.")
    layers = find_decoder_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} does not list its decoder layers, so its prompt cannot be run in chunks: leave "
            "--prefill-chunk away."
        )

    def wrap_mask(make: Callable) -> Callable:
        def pending(**arguments):
            return PendingMask(make, arguments) if arguments["q_length"] > chunk else make(**arguments)

        return pending

    try:
        for layer in layers:
            layer.forward = _in_chunks(layer.forward, chunk)
        yield wrap_mask
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _in_chunks(forward: Callable, chunk: int) -> Callable:
    """A decoder layer's `forward`, run over slices of its tokens that share one cache."""

    def run(hidden_states: Tensor, *args, **kwargs):
        tokens = hidden_states.shape[1]
        if tokens <= chunk:
            return forward(hidden_states, *args, **kwargs)
        cache: Any = kwargs.get("past_key_values")
        if hasattr(cache, "expect"):
            cache.expect(tokens)
        outputs = []
        step = tokens if cache is None else chunk  # without a cache no chunk could see those before it
        for start in range(0, tokens, step):
            part = sliced(((hidden_states, *args), kwargs), start, min(start + step, tokens), tokens)
            outputs.append(forward(*part[0], **part[1]))
        return joined(outputs)

    return run


def _same(make: Callable) -> Callable:
    return make


# Step 4; step 3 is the cache's.


def _linked(base: AttentionFunction, backend: str, rotaries: _Rotaries, check: LinkCheck) -> AttentionFunction:
    """The model's attention function `base`, linked to the cache layer whose mark the keys carry."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        if check.looking:
            check.attends(query, key, value, attention_mask, kwargs)
        cache_layer = _marked(key)
        if cache_layer is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        layer = AttentionLayer(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sliding_window=kwargs.get("sliding_window"),
            rotary=rotaries.of(module.layer_idx),
            module=module,
        )
        if not cache_layer.is_initialized:
            output, weights = base(module, query, key, value, attention_mask, **kwargs)
            cache_layer.attended(query, key, value, _valid_tokens(attention_mask, key), layer)
            return output, weights
        valid = None
        if attention_mask is not None and query.shape[2] > 1:
            valid = _hide_padding(cache_layer, attention_mask, query.shape[2])
        output = ragged_attention(
            query,
            cache_layer.rows_in_place(),
            key.shape[1],
            scaling=layer.scaling,
            softcap=layer.softcap,
            sliding_window=layer.sliding_window,
            sinks=kwargs.get("s_aux"),
            backend=backend,
        )
        cache_layer.observe(query, valid, layer)
        return output, None

    return attention


class _Rotaries:
    """The rotary embedding of each layer of a model, looked up once."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._found: dict[int, Rotary | None] = {}

    def of(self, layer_idx: int) -> Rotary | None:
        if layer_idx not in self._found:
            self._found[layer_idx] = rotary_of(self._model, layer_idx)
        return self._found[layer_idx]


def _valid_tokens(mask: Tensor | None, key: Tensor) -> Tensor:
    """Which prompt tokens are no padding, bool `[B, T]`, from the mask that the attention function got.

    A sliding layer's mask hides what its last query cannot see; later queries cannot see that either.
    """
    batch, _, num_tokens, _ = key.shape
    if mask is None:
        return torch.ones(batch, num_tokens, dtype=torch.bool, device=key.device)
    if mask.ndim == 2:
        return mask[:, :num_tokens].bool()
    last_row = mask[:, 0, -1, :num_tokens]
    return _visible(last_row).expand(batch, num_tokens)


def _hide_padding(layer: MarkedLayer, mask: Tensor, num_new: int) -> Tensor | None:
    """Hide padding among the newest tokens: what does not even see itself; bool `[B, Q]`, `None` if there is none."""
    newest = mask[..., -num_new:]
    own = newest.bool() if mask.ndim == 2 else _visible(newest[:, 0].diagonal(dim1=1, dim2=2))
    if bool(own.all()):
        return None
    own = own.expand(layer.batch_size, num_new)
    layer.hide_newest(own)
    return own


def _visible(mask: Tensor) -> Tensor:
    """Boolean from a boolean mask, or from one that is added to the logits."""
    return mask if mask.dtype == torch.bool else mask == 0
