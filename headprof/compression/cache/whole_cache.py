"""Caches of which each of several processes holds its own heads, as one of all heads, and the other way round.

So a document is the same file whoever made it, and any number of processes read it. In one process nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.plan import CompressionPlan
from headprof.compression.rows import Rows
from headprof.models.tensor_parallel import WHOLE, HeadShard


def whole_cache(cache: HeadCache) -> HeadCache | None:
    """The cache of all heads, on the CPU, in the first process; `None` in the others. All of them have to ask."""
    if cache.plan.shard.is_whole:
        return cache
    plan = replace(cache.plan, shard=WHOLE)
    found = [_whole_layer(layer, plan) for layer in cache.head_layers]
    layers = [layer for layer in found if layer is not None]
    return _cache_of(layers, cache) if layers else None


def own_cache(cache: HeadCache, shard: HeadShard) -> HeadCache:
    """Of a cache of all heads, those that this process has."""
    if shard.is_whole:
        return cache
    plan = replace(cache.plan, shard=shard)
    return _cache_of([_own_layer(layer, plan) for layer in cache.head_layers], cache)


def _cache_of(layers: Sequence[HeadCacheLayer], like: HeadCache) -> HeadCache:
    made = HeadCache.of_layers(layers)
    made.goes_on_protecting(like.protected)
    return made.with_tokens(like.token_ids)


@dataclass(frozen=True)
class _Held:
    """What a process holds of a layer, on the CPU: its heads' rows, the newest queries, and which are no padding."""

    rows: Rows
    queries: Tensor | None
    judges: Tensor | None

    @classmethod
    def of_layer(cls, layer: HeadCacheLayer) -> _Held:
        queries, judges = (None if part is None else part.cpu() for part in layer.held.recent.joined())
        return cls(layer.storage.compact().to("cpu"), queries, judges)


def _whole_layer(layer: HeadCacheLayer, plan: CompressionPlan) -> HeadCacheLayer | None:
    own, batch = layer.num_kv_heads, layer.batch_size
    parts = layer.plan.shard.collected(_Held.of_layer(layer))
    if parts is None:
        return None
    # What is joined has the heads of one process after those of another; a layer has those of one sequence together.
    order = [
        rank * batch * own + sequence * own + head
        for sequence in range(batch)
        for rank in range(len(parts))
        for head in range(own)
    ]
    rows = Rows.joined([part.rows for part in parts]).of_heads(order)
    queries = [part.queries for part in parts if part.queries is not None]
    recent = RecentQueries(torch.cat(queries, dim=1) if queries else None, parts[0].judges, layer.held.recent.layer)
    return _layer_of(layer, plan, rows, recent)


def _own_layer(layer: HeadCacheLayer, plan: CompressionPlan) -> HeadCacheLayer:
    shard, recent = plan.shard, layer.held.recent
    all_heads = torch.arange(layer.batch_size * layer.num_kv_heads).view(layer.batch_size, -1)
    queries, judges = recent.joined()
    own = RecentQueries(
        None if queries is None else shard.own(queries, dim=1), judges, replace(recent.layer, shard=shard)
    )
    return _layer_of(layer, plan, layer.storage.compact().of_heads(shard.own(all_heads).flatten().tolist()), own)


def _layer_of(layer: HeadCacheLayer, plan: CompressionPlan, rows: Rows, recent: RecentQueries) -> HeadCacheLayer:
    """A layer like another that holds rows of more heads, or of fewer."""
    made = HeadCacheLayer(layer.layer_idx, plan, layer.slack)
    made.batch_size, made.seen, made.head_dim, made.dtype = layer.batch_size, layer.seen, layer.head_dim, layer.dtype
    made.num_kv_heads, made.device = len(rows.known_lengths()) // layer.batch_size, rows.keys.device
    made.hold(rows, recent)
    made.storage.hides = layer.storage.hides
    made.schedule.padding = layer.schedule.padding
    made.schedule.resume(layer.schedule.left)
    return made
