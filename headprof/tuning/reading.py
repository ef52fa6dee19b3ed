"""Reading prompts, each head's rows ranked in the order in which its method would keep them.

Shapes: `H` query heads, `K` KV heads, `T` rows of a prompt, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from headprof.compression.cache.prompt_cache import PromptCache
from headprof.compression.cache.ranking_layer import RankingLayer
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import AttentionLayer, Observation, Tokens
from headprof.compression.observers import Observers
from headprof.compression.rows import Rows
from headprof.compression.session import attending_ragged, prefill
from headprof.models.loading import LoadedModel

States = tuple[Tensor, Tensor]
"""Keys and values, `[1, K, T, D]`."""


@dataclass(frozen=True)
class RankedRows:
    """One layer's rows of a prompt, each head's in the order in which it would keep them.

    Attributes:
        keys, values: `[K, T, D]`.
        positions: where in the prompt each row stands, int64 `[K, T]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, ranked: Tensor) -> RankedRows:
        """From rows in their own order and what each is worth, float `[K, T]`; of equal ones the earlier is better."""
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        index = order[..., None].expand(keys.shape)
        return cls(keys.gather(1, index), values.gather(1, index), order)

    def to(self, device: torch.device | str) -> RankedRows:
        """The same on a device."""
        return RankedRows(self.keys.to(device), self.values.to(device), self.positions.to(device))


class PromptReader:
    """Reads prompts; what several of them begin with is read once.

    Args:
        loaded: the model.
        method: whose importance ranks, and which says what every head keeps in any case.
    """

    def __init__(self, loaded: LoadedModel, method: Method):
        self._loaded, self._method = loaded, method
        self._begun: tuple[tuple[int, ...], list[States]] = ((), [])

    @torch.no_grad()
    def read(self, prompt: Sequence[int], observers: Observers, shared: int = 0) -> list[RankedRows]:
        """Read a prompt, and rank the rows of each layer.

        Args:
            prompt: token ids.
            observers: tokens after it that only judge; there may be none.
            shared: tokens that other prompts begin with too. They are read by themselves, so that what a prompt's rows
                are does not depend on which prompts have been read before.

        Raises:
            ModelError: the model's attention cannot be reached.
        """
        method, model = self._method, self._loaded.model
        if len(observers):
            method = method.for_observers(len(observers))
        begun = self._beginning(prompt, shared) if not len(observers) else None
        cache = _RankedCache(method, self._loaded.shape.num_layers, begun)
        cache.expect_observers(len(observers), observers.segments)
        ids = torch.tensor([[*prompt[cache.get_seq_length() :], *observers.ids]], device=self._loaded.device)
        with attending_ragged(model):
            prefill(model, ids, cache)
        return [layer.rows for layer in cache.layers]

    def _beginning(self, prompt: Sequence[int], shared: int) -> list[States] | None:
        """What the layers hold of the tokens that are shared, but for those whose queries may judge."""
        importance = self._method.importance
        if importance.queries is None or importance.norms:
            return None
        ids = tuple(prompt[: min(shared, len(prompt)) - importance.queries])
        if shared <= importance.queries or not ids:
            return None
        if self._begun[0] != ids:
            cache = DynamicCache()
            prefill(self._loaded.model, torch.tensor([ids], device=self._loaded.device), cache)
            layers: list[Any] = cache.layers
            self._begun = ids, [(layer.keys, layer.values) for layer in layers]
        return self._begun[1]


class _RankedLayer(RankingLayer):
    """A layer that keeps a prompt's rows, ranked as a method ranks them.

    Args:
        method: which ranks.
        layer_idx: the layer's number.
        begun: what it begins with, if that has been read before.
    """

    def __init__(self, method: Method, layer_idx: int, begun: States | None):
        super().__init__([method.importance], layer_idx)
        self._method, self._begun = method, begun
        self.rows: RankedRows | None = None
        self.seen = 0 if begun is None else begun[0].shape[2]

    def _gathered(self, key_states: Tensor, value_states: Tensor) -> States:
        if self._begun is None:
            return super()._gathered(key_states, value_states)
        self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self._begun, (key_states, value_states), strict=True))
        return keys, values

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tokens,
        layer: AttentionLayer,
        norms: Tensor | None = None,
    ) -> None:
        if self._begun is None:
            super().attended(query, key, value, tokens, layer, norms)
            return
        window, length, needed = layer.sliding_window, key.shape[2], self.queries_needed() or 0
        marked = torch.ones(1, length, dtype=torch.bool, device=key.device)
        known = Tokens(marked, [length], [length])
        if window is not None:
            known = known.last(length, window)
        queries = query[:, :, max(0, query.shape[2] - needed) :]
        rows, padded = Rows.of_prompt(key, value), known.padded
        self.filled(
            Observation(queries, rows, known.valid, layer, padded=padded, lengths=known.lengths, visible=known.visible)
        )
        self.forget_prompt()

    def filled(self, observed: Observation) -> None:
        super().filled(observed)
        ranked = self.ranked(self._method, None)[0]
        keys, values = (each[0, :, : self.seen] for each in (observed.keys, observed.values))
        self.rows = RankedRows.of(keys, values, ranked)


class _RankedCache(PromptCache):
    """Keeps a prompt's rows, ranked as a method ranks them."""

    def __init__(self, method: Method, num_layers: int, begun: Sequence[States] | None):
        parts = [None] * num_layers if begun is None else begun
        super().__init__([_RankedLayer(method, index, part) for index, part in enumerate(parts)])

    def _noted(self, ids: Tensor | None) -> None:
        """The ids say nothing here."""
