"""A key/value cache in which every KV head holds its own number of rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_layer import PromptLayer, outside_context
from headprof.compression.cache.storage import SLACK
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.plan import CompressionPlan
from headprof.errors import CacheError


class FanOutLayer(PromptLayer):
    """The same layer of several caches, filled from one prefill; methods of one importance share what it says."""

    def __init__(self, layers: list[HeadCacheLayer]):
        super().__init__()
        self.layers = layers

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.is_initialized or any(layer.seen for layer in self.layers):
            raise CacheError("A fan-out cache takes one prompt: continue with one of the caches it filled.")
        return self.gather(key_states, value_states)

    def queries_needed(self) -> int | None:
        needed = [layer.queries_needed() for layer in self.layers]
        return None if None in needed else max(count for count in needed if count is not None)

    def filled(self, observed: Observation) -> None:
        assessed: dict[Importance, Assessment] = {}
        for layer in self.layers:
            importance = layer.schedule.importance
            if importance not in assessed:
                assessed[importance] = importance.assess(observed)
            layer.lazy_initialization(observed.keys, observed.values)
            layer.seen, layer.observers = self.seen, self.observers
            layer.compress(observed, assessed[importance])
            layer.forget_prompt()
        self.is_initialized = True


class PromptCache(Cache):
    """A cache whose layers are filled from a prompt as soon as they have attended over it."""

    layers: list[Any]  # of PromptLayer

    def __init__(self, layers: Sequence[PromptLayer]):
        super().__init__(layers=list(layers))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As Transformers' caches.

        Raises:
            CacheError: the layer before has not been compressed, so this package's attention is not in use.
        """
        before = self.layers[layer_idx - 1]
        if layer_idx and before.seen and not before.is_initialized:
            raise outside_context()
        return self.layers[layer_idx].update(key_states, value_states)

    def expect(self, prompt_tokens: int) -> None:
        """Announce a prompt that each layer will get in chunks."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.expected = prompt_tokens

    def expect_observers(self, tokens: int) -> None:
        """Announce that the last tokens of the coming prompt only observe those before them.

        So a document can be compressed by what questions about it would look at, before there is a question: let the
        model read the document and a stand-in for a question, and keep the document's tokens only.
        """
        for layer in self.layers:
            layer.observers = tokens


class HeadCache(PromptCache):
    """A Transformers cache that keeps of a prompt what a method and a budget allot to each KV head.

    Pass it as `past_key_values` inside `with headprof.compressed(model, ...)`; new tokens keep their true positions,
    since `get_seq_length` is the number of tokens seen.

    Args:
        plan: from `headprof.make_plan`, or what `headprof.compressed` yields.
        slack: rows of free space behind each head. When they are used up, the rows are laid out anew with half as much
            again, or with what is left of the buffer, so that long generations copy the cache seldom.
    """

    def __init__(self, plan: CompressionPlan, slack: int = SLACK):
        self.plan = plan
        super().__init__([HeadCacheLayer(index, plan, slack) for index in range(plan.shape.num_layers)])

    @classmethod
    def of_layers(cls, layers: Sequence[HeadCacheLayer]) -> HeadCache:
        """A cache of layers that are filled already."""
        cache = cls(layers[0].plan)
        cache.layers = list(layers)
        return cache

    @property
    def head_layers(self) -> list[HeadCacheLayer]:
        """The layers, by the name of their kind."""
        return self.layers

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on, for the same model."""
        self.plan = plan
        for layer in self.head_layers:
            layer.continue_with(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds; free space, positions and remembered queries included.

        Left out is where each head's rows begin and end, 16 bytes a head of each layer.
        """
        return sum(layer.nbytes for layer in self.head_layers)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows held by each head, int64 `[L, B, K]`."""
        return torch.stack([torch.tensor(layer.lengths).reshape(layer.batch_size, -1) for layer in self.head_layers])


def stack_caches(caches: Sequence[HeadCache]) -> HeadCache:
    """One cache with a batch entry for each entry of several caches of the same prompt, whatever their methods.

    One forward pass then continues them all.
    """
    return HeadCache.of_layers(
        [HeadCacheLayer.stacked(layers) for layers in zip(*(cache.head_layers for cache in caches), strict=True)]
    )


class FanOutCache(PromptCache):
    """Fills several caches from one prefill: the model runs over the prompt once for all of them."""

    def __init__(self, caches: list[HeadCache]):
        self.caches = caches
        super().__init__([FanOutLayer(list(layers)) for layers in zip(*(c.head_layers for c in caches), strict=True)])
