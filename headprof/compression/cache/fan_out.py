"""Several caches filled from one prefill."""

from __future__ import annotations

import torch

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_cache import PromptCache, RankingCache
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.cache.ranking_layer import RankingLayer, most_queries
from headprof.compression.methods.importance import Importance, assessed
from headprof.compression.methods.observation import Assessment, Observation
from headprof.errors import CacheError


class FanOutLayer(PromptLayer):
    """The same layer of several caches, filled from one prefill; methods of one importance share what it says.

    Args:
        layers: of the caches.
        ranking: of a cache that takes no more than what its importances say of the prompt, if there is one.
    """

    def __init__(self, layers: list[HeadCacheLayer], ranking: RankingLayer | None = None):
        super().__init__()
        self.layers = layers
        self.ranking = ranking

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.is_initialized or any(layer.seen for layer in self.layers):
            raise CacheError("A fan-out cache takes one prompt: continue with one of the caches it filled.")
        return self.gather(key_states, value_states)

    @property
    def weighs_norms(self) -> bool:
        return any(layer.weighs_norms for layer in self._taking)

    @property
    def _taking(self) -> list[PromptLayer]:
        return [*self.layers, *([] if self.ranking is None else [self.ranking])]

    def queries_needed(self) -> int | None:
        return most_queries(layer.queries_needed() for layer in self._taking)

    def filled(self, observed: Observation) -> None:
        said: dict[Importance, Assessment] = {}

        def says(importance: Importance) -> Assessment:
            if importance not in said:
                said[importance] = assessed(importance, observed)
            return said[importance]

        for layer in self.layers:
            verdict = layer.verdict
            layer.lazy_initialization(observed.keys, observed.values)
            layer.seen, layer.observers = self.seen, self.observers
            layer.compress(observed, says(layer.schedule.importance) if verdict is None else verdict.assessment)
            layer.forget_prompt()
        if self.ranking is not None:
            known = {importance: says(own) for importance, own in self.ranking.asked.items()}
            self.ranking.take(observed, known, self.seen, self.observers)
        self.is_initialized = True


class FanOutCache(PromptCache):
    """Fills several caches from one prefill: the model runs over the prompt once for all of them.

    Args:
        caches: to be filled; at least one, or a `ranking`.
        ranking: what takes from the same prefill what others need to know before the prompt is read to fill them.
    """

    def __init__(self, caches: list[HeadCache], ranking: RankingCache | None = None):
        self.caches = caches
        taking: list[RankingLayer | None] = [None] * len(caches[0].layers) if ranking is None else ranking.layers
        of_caches = [[cache.head_layers[index] for cache in caches] for index in range(len(taking))]
        super().__init__([FanOutLayer(own, other) for own, other in zip(of_caches, taking, strict=True)])

    def before_reading(self, prompt_tokens: int) -> RankingCache | None:
        if self.layers[0].observers:
            return None
        ranked = [cache for cache in self.caches if cache.is_ranked_first(prompt_tokens)]
        importances = dict.fromkeys(cache.plan.method.importance for cache in ranked)
        return RankingCache([*importances], len(self.layers)) if ranked else None

    def judged_by(self, ranking: RankingCache) -> None:
        for cache in self.caches:
            if cache.is_ranked_first(ranking.get_seq_length()):
                cache.judged_by(ranking)

    def _noted(self, ids: torch.Tensor | None) -> None:
        super()._noted(ids)
        for cache in self.caches:
            cache._noted(ids)
