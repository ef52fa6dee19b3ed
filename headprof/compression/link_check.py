"""Whether a model's attention works on what its cache gave it: looked at in the first passes, and then no more.

A cache that holds its own rows serves a model only if each layer hands the keys and values that `cache.update` returns
to one call of its attention function, untouched. Some models attend twice, rebuild keys from something smaller, or lend
one layer's keys to others; the text would be wrong, in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.errors import ModelError
from headprof.models.decoder import decoder_of, sliding_windows
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

_BIASES = ("attention_bias", "position_bias", "alibi", "head_mask", "indices")
"""Arguments by which an attention function of some model would do something else than attention over its rows."""


@dataclass
class _Pass:
    """One forward pass that is looked at.

    Attributes:
        cache: the cache that it fills or continues.
        fills: whether it reads a prompt, rather than continuing one.
        given: what the cache returned last, until the attention function has had it: layer, keys, values.
        layers: of those that attended so far, how often.
        masks: the masks that were looked at.
    """

    cache: Any
    fills: bool
    given: tuple[int, Tensor, Tensor] | None = None
    layers: dict[int, int] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)


class LinkCheck:
    """Looks at the first pass that fills a cache, and at the first that continues one.

    Args:
        model: the model.
        in_chunks: whether a layer may be run several times in a pass, over slices of its tokens.
    """

    def __init__(self, model: PreTrainedModel, in_chunks: bool):
        self._name = type(model).__name__
        self._decoder = decoder_of(model)
        self._windows = sliding_windows(model.config)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._longest = longest or math.inf
        shape, shard = HeadShape.from_config(model.config), HeadShard.of_model(model)
        self._num_heads, self._num_kv_heads = shard.count(shape.num_heads), shard.count(shape.num_kv_heads)
        self._head_dim = shape.head_dim
        self._in_chunks = in_chunks
        self._left = {True, False}
        self._in_thread = local()
        self.looking = False
        """Whether a pass may be under way that is to be looked at."""

    @property
    def looks_at_steps(self) -> bool:
        """Whether a pass that continues a cache is still to be looked at."""
        return False in self._left

    @property
    def hooks_left(self) -> int:
        """Hooks of the decoder by which passes are looked at."""
        return len(self._hooks) if self._left else 0

    def install(self) -> Sequence[RemovableHandle]:
        """Look at the passes of the model's decoder until these hooks are removed, or there is nothing left to see."""
        before = self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = self._decoder.register_forward_hook(self._end, always_call=True)
        self._hooks = (before, after)
        return self._hooks

    def _stop(self) -> None:
        self.looking = False
        for hook in self._hooks:
            hook.remove()

    def _begin(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        if not hasattr(cache, "expect_observers") or not cache.layers:  # not one of this package's
            return
        fills = not cache.layers[0].is_initialized
        if fills in self._left and getattr(self._in_thread, "now", None) is None:
            self._in_thread.now = _Pass(cache, fills)
            self.looking = True
            cache.update = self._watched(cache.update)

    def _end(self, _module: Any, _args: Any, output: Any) -> None:
        now: _Pass | None = getattr(self._in_thread, "now", None)
        if now is None:
            return
        self._in_thread.now = None
        vars(now.cache).pop("update", None)
        if output is None:  # the pass ended in an error, which says more
            return
        self._check_taken(now)
        self._check_layers(now)
        self._left.discard(now.fills)
        self.looking = False
        if not self._left:
            self._stop()

    def _watched(self, update: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def watched(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
            now: _Pass | None = getattr(self._in_thread, "now", None)
            if now is None:
                return update(key_states, value_states, layer_idx, *args, **kwargs)
            self._check_taken(now)
            if layer_idx in now.layers and not self._in_chunks:
                raise self._refused(f"asks its cache for layer {layer_idx} more than once a pass")
            self._check_widths(layer_idx, key_states, value_states)
            keys, values = update(key_states, value_states, layer_idx, *args, **kwargs)
            now.given = (layer_idx, keys, values)
            return keys, values

        return watched

    def attends(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Look at a call of the attention function; to be called before it, while `looking`.

        Args:
            query, key, value, mask, options: what the function is given.

        Raises:
            ModelError: that is not what the cache returned last.
        """
        now: _Pass | None = getattr(self._in_thread, "now", None)
        if now is None:
            return
        if now.given is None:
            last = max(now.layers, default=None)
            raise self._refused(
                "attends to keys that did not come from the cache"
                if last is None
                else f"attends after layer {last} to keys that it has attended to already, or that are not the cache's"
            )
        layer, keys, values = now.given
        if key is not keys:
            raise self._refused(f"makes other keys of those that the cache returns (layer {layer})")
        if not _same(value, values):
            raise self._refused(f"makes other values of those that the cache returns (layer {layer})")
        if query.shape[1] != self._num_heads or query.shape[-1] != key.shape[-1]:
            raise self._refused(
                f"has {query.shape[1]} query heads of width {query.shape[-1]} in layer {layer} where its configuration "
                f"says {self._num_heads} of width {key.shape[-1]}"
            )
        self._check_window(layer, options)
        self._check_bias(now, layer, mask, options)
        now.given = None
        now.layers[layer] = now.layers.get(layer, 0) + 1

    def _check_taken(self, now: _Pass) -> None:
        if now.given is not None:
            raise self._refused(
                f"does not attend to what the cache returns by Transformers' interface ({now.given[0]})"
            )

    def _check_layers(self, now: _Pass) -> None:
        missing = sorted(set(range(len(now.cache.layers))) - set(now.layers))
        if missing:
            raise self._refused(
                f"keeps nothing of its own in {len(missing)} of its {len(now.cache.layers)} layers (the first is "
                f"{missing[0]})"
            )
        if len(set(now.layers.values())) > 1:
            raise self._refused("attends in some layers more often than in others")

    def _check_widths(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if keys.shape != values.shape:
            raise self._refused(f"has keys {_heads(keys)} but values {_heads(values)} in layer {layer}")
        if (keys.shape[1], keys.shape[-1]) != (self._num_kv_heads, self._head_dim):
            raise self._refused(
                f"has KV heads {_heads(keys)} in layer {layer} where its configuration says "
                f"{self._num_kv_heads} of width {self._head_dim}"
            )

    def _check_window(self, layer: int, options: dict[str, Any]) -> None:
        """Some models tell their mask alone of a window that all their layers have."""
        window = self._windows[layer]
        if window is not None and window < self._longest and options.get("sliding_window") is None:
            raise self._refused(f"does not tell its attention of its sliding window of {window} tokens (layer {layer})")

    def _check_bias(self, now: _Pass, layer: int, mask: Any, options: dict[str, Any]) -> None:
        """Rows are attended to without a mask, so that must not say more than what a query sees."""
        if any(options.get(name) is not None for name in _BIASES):
            raise self._refused(f"gives more than queries, keys and values to its attention (layer {layer})")
        if not isinstance(mask, Tensor) or not mask.is_floating_point() or any(mask is each for each in now.masks):
            return
        now.masks.append(mask)
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | hidden).all()):
            raise self._refused(f"adds a bias of its own to the attention (layer {layer})")

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"{self._name} {why}, so its cache cannot be compressed per head: choose a model whose layers attend once "
            "to keys and values of their own, such as Llama, Qwen or Mistral."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen alike."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


def _heads(states: Tensor) -> str:
    return f"{states.shape[1]} of width {states.shape[-1]}"
