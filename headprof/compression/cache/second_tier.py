"""Rows that a layer's heads have evicted, kept on the host in clusters, and brought back as queries call for them.

Of a head's rows in the layer's storage the first ones, its *slots*, hold copies of what has been brought back; behind
them lie the rows that stay, and those of new tokens. So attention reads all of them as one ragged request. The rows of
the second tier themselves are never changed: copies of a cache share them, and those of a document on disk stay in the
file's memory map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from headprof.compression.cache.storage import RowStorage
from headprof.compression.kernels.packed_rows import ragged_index
from headprof.compression.methods.clustering import cluster_keys
from headprof.compression.methods.recall import Recall, attention_shares, rows_of_nearest
from headprof.compression.rows import Rows

_NOWHERE = -(2**30)
"""Position of a slot for which there is no row: behind any sliding window."""


@dataclass(frozen=True)
class HostRows:
    """Rows on the host, flat: those of a cluster beside each other, the newest first.

    Attributes:
        keys, values: `[R, D]`.
        positions: int32 `[R]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.positions


@dataclass(frozen=True)
class Clusters:
    """Where the clusters of each head lie, and what stands for them; on the layer's device.

    Attributes:
        centroids: mean keys, `[N, C, D]`.
        starts: first row of each among all rows of the tier, int64 `[N, C]`.
        sizes: rows of each, int64 `[N, C]`; 0 where a head has no more.
    """

    centroids: Tensor
    starts: Tensor
    sizes: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.centroids, self.starts, self.sizes

    def of_heads(self, heads: Tensor) -> Clusters:
        return Clusters(*(each[heads.to(each.device)] for each in self.tensors))

    def beside(self, others: Clusters) -> Clusters:
        """These and more of the same heads."""
        return Clusters(*(torch.cat(pair, dim=1) for pair in zip(self.tensors, others.tensors, strict=True)))


@dataclass
class SecondTier:
    """The evicted rows of some heads of a layer.

    Attributes:
        recall: how they are brought back.
        clusters: of each of the `N` heads.
        parts: the rows, one part after the other; none is ever changed.
        slots: rows that each head may bring back, `N` numbers; no more than it has here.
        window: tokens that the layer's queries see, or `None` for all.
        first_head: of the layer's heads, the first that is meant.
        stale: whether nothing has been brought back into the slots yet.
    """

    recall: Recall
    clusters: Clusters
    parts: tuple[HostRows, ...]
    slots: Sequence[int]
    window: int | None = None
    first_head: int = 0
    stale: bool = True

    @property
    def num_heads(self) -> int:
        return len(self.slots)

    @property
    def device_bytes(self) -> int:
        """Bytes beside the layer's rows on its device: what stands for the clusters."""
        return sum(each.nbytes for each in self.clusters.tensors)

    @property
    def host_bytes(self) -> int:
        """Bytes of the rows on the host, or in the memory map of a file."""
        return sum(each.nbytes for part in self.parts for each in part.tensors)

    @property
    def counts(self) -> list[int]:
        """Rows that each head has here."""
        return self.clusters.sizes.sum(dim=-1).tolist()

    def is_due(self, position: int) -> bool:
        """Whether rows are chosen anew by the query at this position."""
        return self.stale or position % self.recall.recall_every == 0

    def bring_back(self, query: Tensor, scaling: float, position: int, storage: RowStorage) -> None:
        """Fill the slots with the rows that a token's queries call for.

        Args:
            query: of this tier's heads, `[N, g, D]`.
            scaling: factor on the logits.
            position: of the token.
            storage: the layer's rows, with the slots.
        """
        self.stale = False
        if not any(self.slots):
            return
        rows, there = self._chosen(query, scaling, position)
        heads, ranks = self._places
        wanted, known = rows[heads, ranks], there[heads, ranks]
        keys, values, positions = self._rows_at(wanted, pinned=query.is_cuda)
        positions.masked_fill_(~known, _NOWHERE)
        device = query.device
        places = storage.starts[(heads + self.first_head).to(device)] + ranks.to(device)
        storage.overwrite(places, *(each.to(device, non_blocking=True) for each in (keys, values, positions)))

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Of each slot the head of this tier, and the number among its head's rows, int64; on the host."""
        heads = torch.arange(self.num_heads).repeat_interleave(torch.tensor(self.slots))
        return heads, ragged_index([0] * self.num_heads, self.slots, torch.device("cpu"))

    def _chosen(self, query: Tensor, scaling: float, position: int) -> tuple[Tensor, Tensor]:
        """Rows for the slots of each head, int64 `[N, most slots]`, and which of them there are; on the host."""
        sizes = self._seen_sizes(position)
        most = max(self.slots)
        scores = attention_shares(query, self.clusters.centroids, sizes > 0, scaling)
        width = min(most * self.recall.recall_among, self._longest)
        rows, there = rows_of_nearest(scores, self.clusters.starts, sizes, self._looked_at, width)
        rows, there = rows.cpu(), there.cpu()
        if self.recall.recall_among == 1:
            return rows, there
        keys = _taken([part.tensors[:1] for part in self.parts], rows.flatten())[0].view(*rows.shape, -1)
        best = attention_shares(query.cpu(), keys, there, scaling).topk(most, dim=-1).indices
        return rows.gather(1, best), there.gather(1, best)

    @cached_property
    def _longest(self) -> int:
        """Most rows that one head has here."""
        return max(self.counts)

    @cached_property
    def _looked_at(self) -> Tensor:
        """How many rows each head looks at for its slots, int64 `[N]`."""
        looked_at = torch.tensor(self.slots) * self.recall.recall_among
        return looked_at.to(self.clusters.sizes.device)

    def _seen_sizes(self, position: int) -> Tensor:
        """Rows of each cluster that a token at this position can see, int64 `[N, C]`: the first ones of it."""
        if self.window is None:
            return self.clusters.sizes
        seen = (self._positions > position - self.window).long().cumsum(0)
        before = torch.cat([seen.new_zeros(1), seen]).to(self.clusters.sizes.device)
        starts = self.clusters.starts
        return before[starts + self.clusters.sizes] - before[starts]

    @cached_property
    def _positions(self) -> Tensor:
        """Of all rows, int32."""
        return torch.cat([part.positions for part in self.parts])

    def _rows_at(self, index: Tensor, pinned: bool = False) -> list[Tensor]:
        """Copies of keys, values and positions of these rows, int64 `[M]`, on the host."""
        return _taken([part.tensors for part in self.parts], index, pinned)

    def of_heads(self, heads: Sequence[int], first_head: int) -> SecondTier:
        """The tier of these heads, in this order, for heads of a layer from `first_head` on; rows are shared."""
        slots = [self.slots[head] for head in heads]
        return replace(self, clusters=self.clusters.of_heads(torch.tensor(heads)), slots=slots, first_head=first_head)

    def in_order(self) -> HostRows:
        """All rows in the order of heads and their clusters, without those that no head has."""
        starts, sizes = self.clusters.starts.flatten().tolist(), self.clusters.sizes.flatten().tolist()
        return HostRows(*self._rows_at(ragged_index(starts, sizes, torch.device("cpu"))))


def joined_tiers(tiers: Sequence[SecondTier]) -> SecondTier | None:
    """The tiers of consecutive heads, all brought back alike, as one; `None` if there are none."""
    if len(tiers) < 2:
        return tiers[0] if tiers else None
    most = max(tier.clusters.sizes.shape[1] for tier in tiers)
    parts: list[HostRows] = []
    wider = []
    for tier in tiers:
        room = (0, most - tier.clusters.sizes.shape[1])
        starts = pad(tier.clusters.starts + sum(map(len, parts)), room)
        wider.append((pad(tier.clusters.centroids, (0, 0, *room)), starts, pad(tier.clusters.sizes, room)))
        parts += tier.parts
    clusters = Clusters(*(torch.cat(each) for each in zip(*wider, strict=True)))
    slots = [count for tier in tiers for count in tier.slots]
    return replace(tiers[0], clusters=clusters, parts=tuple(parts), slots=slots)


def _taken(parts: Sequence[Sequence[Tensor]], index: Tensor, pinned: bool = False) -> list[Tensor]:
    """Rows of several parts as if they were one: a copy of each of their tensors.

    Args:
        parts: of each part the same tensors, `[R, ...]`.
        index: rows, int64 `[M]`.
        pinned: whether a CUDA device is to fetch them.
    """
    found = [torch.empty(len(index), *each.shape[1:], dtype=each.dtype, pin_memory=pinned) for each in parts[0]]
    if len(parts) == 1:
        return [torch.index_select(each, 0, index, out=copy) for each, copy in zip(parts[0], found, strict=True)]
    start = 0
    for part in parts:
        own = ((index >= start) & (index < start + len(part[0]))).nonzero().flatten()
        if len(own):
            there = index[own] - start
            for each, copy in zip(part, found, strict=True):
                copy.index_copy_(0, own, each.index_select(0, there))
        start += len(part[0])
    return found


def evicted_rows(
    recall: Recall, rows: Rows, gone: Tensor, slots: Sequence[int], window: int | None, before: SecondTier | None
) -> SecondTier:
    """The second tier of a layer once more rows have been evicted, which are clustered by themselves.

    Args:
        recall: how rows are brought back.
        rows: a block, `[B, K, T, ...]`.
        gone: which of these are evicted, bool `[B, K, T]`.
        slots: rows that each head may bring back from now on, as far as there are so many, `B * K` numbers.
        window: tokens that the layer's queries see, or `None`.
        before: the tier so far, or `None`.
    """
    keys, values, positions = (each.flatten(0, 1) for each in (rows.keys, rows.values, rows.positions))
    found = cluster_keys(keys, gone.flatten(0, 1), recall.cluster, recall.cluster_iterations, recall.cluster_seed)
    index = _by_cluster(found.labels, found.sizes.shape[1])
    part = HostRows(*(each.flatten(0, 1)[index].cpu() for each in (keys, values, positions.int())))
    known = () if before is None else before.parts
    sizes = found.sizes
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(sizes.shape) + sum(map(len, known))
    clusters = Clusters(found.centroids.to(keys.dtype), starts, sizes)
    if before is not None:
        clusters = before.clusters.beside(clusters)
    tier = SecondTier(recall, clusters, _joined([*known, part]), slots, window)
    return replace(tier, slots=[min(pair) for pair in zip(slots, tier.counts, strict=True)])


def _by_cluster(labels: Tensor, clusters: int) -> Tensor:
    """Where the rows of each head's clusters are in `[N, T]`, in order, the last row of a cluster first; int64."""
    heads, tokens = labels.shape
    number = labels + torch.arange(heads, device=labels.device)[:, None] * (clusters + 1)
    newest_first = torch.arange(tokens - 1, -1, -1, device=labels.device)
    order = (number * tokens + newest_first).flatten().argsort()
    return order[(labels.flatten() < clusters)[order]]


def _joined(parts: Sequence[HostRows]) -> tuple[HostRows, ...]:
    """The same rows in few parts: one that is no longer than the next is joined with it, so that copies stay seldom."""
    parts = list(parts)
    while len(parts) > 1 and len(parts[-2]) <= len(parts[-1]):
        last, other = parts.pop(), parts.pop()
        parts.append(HostRows(*(torch.cat(pair) for pair in zip(other.tensors, last.tensors, strict=True))))
    return tuple(parts)


def with_slots(rows: Rows, slots: Sequence[int]) -> Rows:
    """Flat rows with empty slots before those of each head."""
    lengths = rows.known_lengths()
    wider = [length + count for length, count in zip(lengths, slots, strict=True)]
    starts = [0, *accumulate(wider)][:-1]
    firsts = [start + count for start, count in zip(starts, slots, strict=True)]
    index = ragged_index(firsts, lengths, rows.keys.device)
    total = sum(wider)

    def spread(each: Tensor) -> Tensor:
        return each.new_zeros(total, *each.shape[1:]).index_copy_(0, index, each)

    return rows.map(spread, wider)


def without_slots(rows: Rows, slots: Sequence[int]) -> Rows:
    """Flat rows without the slots before those of each head."""
    lengths = rows.known_lengths()
    starts = [0, *accumulate(lengths)][:-1]
    kept = [length - count for length, count in zip(lengths, slots, strict=True)]
    firsts = [start + count for start, count in zip(starts, slots, strict=True)]
    index = ragged_index(firsts, kept, rows.keys.device)
    return rows.map(lambda each: each[index], kept)
