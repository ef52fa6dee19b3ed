"""The link between a cache and a model's attention, all of it.

Inside `attending(model)` this happens to each layer in a forward pass, in this order:

1. The model starts: with `new_cache` (that is `headprof.compressed`), `generate`, and a pre-hook of the model, put a
   fresh cache in the place of none, or of an empty one that Transformers has made. The cache notes the tokens. If its
   method ranks the rows of all layers together, the prompt is read once before, for their importance alone.
2. With `prefill_chunk`, the decoder layer's `forward` is one of ours: it runs the layer over the prompt's slices, one
   after the other, before the next layer begins. It announces the prompt to the cache (`expect`), and the masks that
   the model made for it once are pending ones, of which each slice gets its own part.
3. The attention module projects, rotates and calls `cache.update(keys, values, layer_idx)`. The cache's layer answers
   with keys that carry a mark, the layer itself (`mark`); for a prompt in slices these are all keys so far.
4. The module hands what it got to its attention function, which is one of ours around the model's own. By the mark on
   the keys it finds the layer:
   - none: another cache; the model's function does it all.
   - a layer on its way through a prompt: the model's function attends; then `layer.attended(...)` is given queries,
     keys, values, padding, and the attention layer, and once the prompt is whole it keeps what its method keeps. Where
     the prompt ends with segments that do not see one another, it attends in parts (`segments`).
   - a layer that holds rows: `ragged_attention` over those that it says these queries read (`readings`); then
     `layer.observe(...)` is given the queries.

In the first passes `LinkCheck` looks whether the model does so in every layer.

When the context ends, also by an exception, the model is exactly as it was. Of contexts that nest, the inner one says
which backend, chunk and new cache are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from headprof.compression.chunks import PendingMask, joined, sliced
from headprof.compression.decode_steps import check_step, with_decode_steps
from headprof.compression.forward_pass import ForwardPass, own_tokens, seeing_themselves
from headprof.compression.generate_call import refuse_continuous_batching, takes_tokens, with_our_caches
from headprof.compression.kernels.backends import check_backend, ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.link_check import LinkCheck
from headprof.compression.methods.observation import AttentionLayer, Tokens
from headprof.compression.segments import (
    SegmentMask,
    attend_in_parts,
    require_no_padding,
    require_positions,
    segment_positions,
)
from headprof.errors import CacheError, ModelError, UsageError
from headprof.models.attention_hook import AttentionFunction, wrap_attention
from headprof.models.changing import Change, Changes, changed
from headprof.models.decoder import find_decoder_layers, running_model
from headprof.models.rotary import Rotary, rotary_of
from headprof.models.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MarkedLayer(Protocol):
    """What the attention function asks of the cache layer that it finds by the mark."""

    is_initialized: bool
    """Whether it holds rows."""
    batch_size: int
    observers: int
    """Last tokens of the prompt that only observe the others."""
    segments: tuple[int, ...]
    """Tokens of each segment of these, if they are in segments that do not see one another."""

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, layer: AttentionLayer, norms: Tensor | None
    ) -> None:
        """A part of the prompt, or all of it, has been attended over."""
        ...

    def readings(self, query: Tensor, scaling: float) -> Iterator[tuple[Tensor, RaggedRows]]:
        """The newest tokens' queries, `[B, H, Q, D]`, in parts, each with the rows that it reads: its own the last.

        Each part is attended with before the next one is asked for.
        """
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


def attending(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
    new_cache: Callable[[], Cache] | None = None,
) -> AbstractContextManager[None]:
    """Link `model`'s attention to the caches of this package while the context lasts.

    Args:
        model: the model, or a wrapper around it (see `running_model`).
        backend: the attention over compressed rows, a name in `BACKENDS`, or `"auto"`.
        prefill_chunk: tokens that a layer runs over at a time, or `None` for all at once.
        step: how a decode step is run, a name in `STEPS`.
        new_cache: makes the cache that a forward pass begins with where it would begin with an empty one of
            Transformers', or `None` to leave that as it is.

    Raises:
        UsageError: the backend cannot be used here, or the chunk is not positive.
        ModelError: the model's attention or layers cannot be reached, or another thread holds the model.
    """
    check_backend(backend)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"A prefill chunk of {prefill_chunk} tokens cannot be run: give --prefill-chunk at least 1.")
    running = running_model(model)
    check_step(step, running.device)
    return changed(running, _Link(running, model, backend, prefill_chunk, step, new_cache))


@dataclass(eq=False)
class _Link:
    """A context's link between a model and caches; of several on one model only the last one is made."""

    model: PreTrainedModel
    given: Any
    backend: str
    prefill_chunk: int | None
    run_step: str
    new_cache: Callable[[], Cache] | None
    kind = "link"

    def make(self, changes: Changes, in_force: Sequence[Change]) -> None:
        links = [each for each in in_force if isinstance(each, _Link)]
        if any(link.model is not self.model for link in links):
            raise ModelError(
                f"This {type(self.model).__name__} has its configuration in common with a model whose cache is being "
                "compressed: give it a copy of its own."
            )
        if links[-1] is not self:
            return
        for link in links:
            _run_uncompiled(changes, link.given, self.model)
        if self.prefill_chunk is not None:
            _chunk_layers(changes, self.model, self.prefill_chunk)
        shard, rotaries = HeadShard.of_model(self.model), _Rotaries(self.model)
        check = LinkCheck(self.model, in_chunks=self.prefill_chunk is not None)
        now = ForwardPass(check)
        wrap_attention(
            changes,
            self.model,
            lambda base: _linked(base, self.backend, rotaries, check, now, shard),
            lambda make: _pending(make, now, self.prefill_chunk),
        )
        new_cache = next((link.new_cache for link in reversed(links) if link.new_cache), None)
        if forward := with_decode_steps(self.model, self.model.forward, now, self.run_step, self.backend):
            changes.set(vars(self.model), "forward", forward)
        _watch_starts(changes, self.model, new_cache, now)
        for hook in check.install():
            changes.hook(hook)


def _run_uncompiled(changes: Changes, given: Any, running: PreTrainedModel) -> None:
    """Run the code of a model that has been compiled: what is compiled may not see what is changed here."""
    while given is not running and "_orig_mod" in getattr(given, "_modules", {}):
        changes.set(vars(given), "forward", given._orig_mod.__call__)
        given = given._orig_mod
    for module in running.modules():
        if module._compiled_call_impl is not None:
            changes.set(vars(module), "_compiled_call_impl", None)
        own = vars(module).get("forward")
        if (plain := getattr(own, "_torchdynamo_orig_callable", None)) is not None:
            changes.set(vars(module), "forward", plain)


# Step 1.


def _watch_starts(changes: Changes, model: Any, new_cache: Callable[[], Cache] | None, now: ForwardPass) -> None:
    """Let `generate` and `forward` begin with our caches, and these note the tokens they are given."""
    if hasattr(model, "generate"):
        own_kind = getattr(model.generation_config, "cache_implementation", None)
        if own_kind is not None:
            changes.set(vars(model.generation_config), "cache_implementation", None)
        changes.set(vars(model), "generate", with_our_caches(model, model.generate, new_cache, own_kind))
    if hasattr(model, "init_continuous_batching"):
        changes.set(vars(model), "init_continuous_batching", refuse_continuous_batching)
    changes.hook(model.register_forward_pre_hook(_starting_with(model, new_cache, now), with_kwargs=True))
    changes.hook(model.register_forward_hook(now.ends, always_call=True))


def _starting_with(model: PreTrainedModel, new_cache: Callable[[], Cache] | None, now: ForwardPass) -> Callable:
    names = list(inspect.signature(model.forward).parameters)

    def start(_module, args, kwargs):
        if len(args) > 1:
            args, kwargs = (), kwargs | dict(zip(names, args, strict=False))
        cache = kwargs.get("past_key_values")
        if new_cache is not None and _begins_anew(cache) and _uses_cache(model, kwargs):
            kwargs["past_key_values"] = cache = new_cache()
        if takes_tokens(cache):
            ids = args[0] if args else kwargs.get("input_ids")
            cache.note_tokens(ids)
            read = kwargs.get("inputs_embeds") if ids is None else ids
            if read is not None and not cache.get_seq_length():
                now.begins(read, kwargs.get("attention_mask"), cache.segments)
                if cache.segments:
                    require_positions(model)
                    require_no_padding(kwargs.get("attention_mask"))
                    kwargs["position_ids"] = segment_positions(now.length, cache.segments, read.device)
                if cache.weighs_norms:
                    now.watch(model)
                if (ranking := cache.before_reading(read.shape[1])) is not None:
                    ranking.note_tokens(ids)
                    _read_before(model, ranking, names, args, kwargs)
                    cache.judged_by(ranking)
        return args, kwargs

    return start


@torch.no_grad()
def _read_before(model: PreTrainedModel, ranking: Cache, names: Sequence[str], args: Any, kwargs: dict) -> None:
    """Let a cache take from the prompt what others need to know before it is read for them."""
    given = {name: value for name, value in kwargs.items() if name != "labels"}
    if "logits_to_keep" in names:
        given["logits_to_keep"] = 1
    model.forward(*args, **(given | {"past_key_values": ranking, "use_cache": True}))


def _uses_cache(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    return getattr(model.config.get_text_config(decoder=True), "use_cache", True) if asked is None else asked


def _begins_anew(cache: Any) -> bool:
    """Whether there is no cache, or an empty one of Transformers' that is none of the user's own.

    Raises:
        CacheError: it is of a kind for which ours cannot stand.
    """
    if cache is None:
        return True
    if takes_tokens(cache) or getattr(cache, "_is_user_defined", False) or cache.get_seq_length():
        return False
    if type(cache).__name__ != "DynamicCache":
        raise CacheError(f"An empty {type(cache).__name__} inside `compressed` would not be compressed: leave it away.")
    return True


# Step 2.


def _chunk_layers(changes: Changes, model: PreTrainedModel, chunk: int) -> None:
    """Run `model`'s decoder layers over at most `chunk` tokens at a time."""
    layers = find_decoder_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} does not list its decoder layers, so its prompt cannot be run in chunks: leave "
            "--prefill-chunk away."
        )
    for layer in layers:
        changes.set(vars(layer), "forward", _in_chunks(layer.forward, chunk))


def _pending(make: Callable, now: ForwardPass, chunk: int | None) -> Callable:
    """What makes a model's masks, where these are made for slices or parts of a prompt."""

    def pending(**arguments):
        if now.segments:
            return SegmentMask(PendingMask(make, arguments))
        if chunk is not None and arguments["q_length"] > chunk:
            return PendingMask(make, arguments)
        return make(**arguments)

    return pending


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


# Step 4; step 3 is the cache's.


def _linked(
    base: AttentionFunction, backend: str, rotaries: _Rotaries, check: LinkCheck, now: ForwardPass, shard: HeadShard
) -> AttentionFunction:
    """The model's attention function `base`, linked to the cache layer whose mark the keys carry."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        if now.step is not None:
            return now.step.attend(query, key.shape[1], kwargs), None
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
            shard=shard,
        )
        if not cache_layer.is_initialized:
            if cache_layer.segments:
                parts = now.length - sum(cache_layer.segments), cache_layer.segments
                output = attend_in_parts(base, module, (query, key, value), attention_mask, parts, kwargs)
                weights = attention_mask = None  # there is no padding
            else:
                output, weights = base(module, query, key, value, attention_mask, **kwargs)
            tokens = now.tokens(attention_mask, query, key, layer.sliding_window)
            if cache_layer.observers and layer.sliding_window is not None:
                tokens = replace(tokens, own=own_tokens(attention_mask, query))
            cache_layer.attended(query, key, value, tokens, layer, now.norms)
            return output, weights
        valid = None
        if attention_mask is not None and query.shape[2] > 1:
            valid = _hide_padding(cache_layer, attention_mask, query.shape[2])
        how: dict[str, Any] = {
            "scaling": layer.scaling,
            "softcap": layer.softcap,
            "sliding_window": layer.sliding_window,
        }
        how |= {"sinks": kwargs.get("s_aux"), "backend": backend}
        outputs = [
            ragged_attention(part, rows, key.shape[1], **how)
            for part, rows in cache_layer.readings(query, layer.scaling)
        ]
        cache_layer.observe(query, valid, layer)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None

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


def _hide_padding(layer: MarkedLayer, mask: Tensor, num_new: int) -> Tensor | None:
    """Hide padding among the newest tokens: what does not even see itself; bool `[B, Q]`, `None` if there is none."""
    own = seeing_themselves(mask, num_new)
    if bool(own.all()):
        return None
    own = own.expand(layer.batch_size, num_new)
    layer.hide_newest(own)
    return own
