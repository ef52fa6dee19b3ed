"""What a layer holds while text is generated: its heads' rows, and the newest queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.second_tier import SecondTier
from headprof.compression.cache.storage import SLACK, RowStorage
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.received_attention import received_attention
from headprof.compression.rows import Rows

FOLD = 16
"""Queries that are remembered, beyond those that must be at hand, before what they paid is added to the rows."""


@dataclass
class HeldRows:
    """The rows of a layer's heads, and the newest queries.

    Attributes:
        storage: where the rows lie.
        num_kv_heads: `K`.
        recent: the queries since the rows were compressed, as far as the next compression needs them.
        settled: appended rows that cannot be taken out, since what their queries paid has been folded into others.
        tiers: what heads have evicted and may bring back, where they may: of a stack of caches each cache's own.
    """

    storage: RowStorage
    num_kv_heads: int
    recent: RecentQueries = field(default_factory=RecentQueries)
    settled: int = 0
    tiers: tuple[SecondTier, ...] = ()

    @property
    def slots(self) -> list[int]:
        """Of each head's rows, how many of the first are copies of rows in a second tier, `B * K` numbers."""
        slots = [0] * self.storage.num_heads
        for tier in self.tiers:
            slots[tier.first_head : tier.first_head + tier.num_heads] = tier.slots
        return slots

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `B * K` numbers."""
        return self.storage.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory; free space, positions, remembered queries and what stands for clusters included.

        Left out is where each head's rows begin and end, and such numbers of a few bytes a head (`RowStorage`).
        """
        tensors = [*self.storage.rows.tensors, *self.recent.tensors]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) + sum(t.device_bytes for t in self.tiers)

    @property
    def removable(self) -> int:
        """How many of the newest tokens can be taken out again."""
        return self.storage.appended - self.settled

    def readings(self, query: Tensor, scaling: float, seen: int) -> Iterator[tuple[Tensor, RaggedRows]]:
        """The newest tokens' queries in parts, each with the rows that it reads (see `MarkedLayer` of `hook`).

        Where rows are brought back, each token reads those that it calls for.

        Args:
            query: `[B, H, Q, D]`, of tokens whose rows have been appended.
            scaling: factor on the logits.
            seen: tokens of the sequence, these included.
        """
        if not self.tiers:
            yield query, self.storage.in_place()
            return
        count, start = query.shape[2], 0
        by_head = query.unflatten(1, (self.num_kv_heads, -1)).flatten(0, 1)  # [N, g, Q, D]
        while start < count:
            self._bring_back(by_head[:, :, start], scaling, seen - count + start)
            end = start + 1
            while end < count and not any(tier.is_due(seen - count + end) for tier in self.tiers):
                end += 1
            yield query[:, :, start:end], self.storage.in_place().without_newest(count - end)
            start = end

    def _bring_back(self, query: Tensor, scaling: float, position: int) -> None:
        """Fill the slots with what a token's queries, `[N, g, D]`, call for, as far as that is due."""
        for tier in self.tiers:
            if tier.is_due(position):
                own = query[tier.first_head : tier.first_head + tier.num_heads]
                tier.bring_back(own, scaling, position, self.storage)

    def widen(self, slack: int, seen: int, rooms: Sequence[int] = ()) -> None:
        """Lay the rows out anew, with so many rows of free space behind each head, and at least such rooms."""
        held = self.storage
        self.storage = RowStorage(held.compact(), seen, slack, held.appended, hides=held.hides, rooms=rooms)

    def drop_newest(self, count: int) -> None:
        """Forget the last `count` tokens; at most `removable`."""
        self.storage.drop_newest(count)
        self.recent.take_back(count)

    def fold(self, at_hand: int, seen: int) -> None:
        """Add what remembered queries paid to the rows that received it, and forget all but the last `at_hand`.

        The sums at the next compression are the same: rows that come later are hidden from these queries, and none
        goes before it. Those of the newest tokens stay until more come, so that these can still be taken out.
        """
        if len(self.recent) < at_hand + FOLD:
            return
        older = self.recent.part(0, len(self.recent) - at_hand)
        self.recent.keep_last(at_hand)
        index, own = self.storage.padded_index()
        observed = self._observed(index, own, older, seen - at_hand)
        observed = replace(observed, rows=observed.rows.without("received"))
        self.storage.add_received(index, received_attention(observed).view(index.shape))
        self.settled = self.storage.appended

    def observed(self, seen: int) -> Observation:
        """The rows as the remembered queries see them, when the sequence has `seen` tokens."""
        return self._observed(*self.storage.padded_index(), self.recent.joined(), seen)

    def _observed(
        self, index: Tensor, own: Tensor, queries: tuple[Tensor | None, Tensor | None], seen: int
    ) -> Observation:
        """A block with as many rows for each head as the longest has; hidden ones count as padding.

        Args:
            index, own: of the storage, `[N, longest]` (see `RowStorage.padded_index`).
            queries: that observe them, and which of these are no padding (see `RecentQueries.joined`).
            seen: tokens of the sequence up to the last of these queries.
        """
        if self.tiers:  # what has been brought back is a copy of what is kept elsewhere
            slots = torch.tensor(self.slots, device=index.device)
            own = own & (index >= (self.storage.starts + slots)[:, None])
        shape = (-1, self.num_kv_heads, index.shape[1])
        rows = self.storage.unpacked().map(lambda each: each[index].view(*shape, *each.shape[1:]))
        valid = own.view(shape)
        if "bias" in rows.columns:
            bias = rows.columns["bias"]
            valid = valid & (bias > float("-inf"))
            rows = rows.with_columns({"bias": bias.masked_fill(~valid, 0.0)})
        query, query_valid = queries
        if query is None:
            query = rows.keys[:, :, :0]
        return Observation(
            query,
            rows,
            valid,
            self.recent.layer,
            is_prompt=False,
            query_positions=torch.arange(seen - query.shape[2], seen, device=index.device),
            query_valid=query_valid,
            seen=seen,
            padded=self.storage.is_ragged or bool(self.tiers),
        )

    def of_sequences(self, chosen: Sequence[int], seen: int, slack: int = SLACK) -> HeldRows:
        """Those of these sequences of the batch, in this order; one may come more than once."""
        heads = [b * self.num_kv_heads + head for b in chosen for head in range(self.num_kv_heads)]
        self.recent.select(chosen)
        storage = RowStorage(
            self.storage.compact().of_heads(heads), seen, slack, self.storage.appended, hides=self.storage.hides
        )
        return HeldRows(storage, self.num_kv_heads, self.recent, self.settled, self._tiers_of(chosen))

    def _tiers_of(self, chosen: Sequence[int]) -> tuple[SecondTier, ...]:
        """The second tiers of these sequences; neighbours of one tier stay together."""
        if len(self.tiers) == 1 and self.tiers[0].num_heads == self.storage.num_heads:
            heads = [b * self.num_kv_heads + head for b in chosen for head in range(self.num_kv_heads)]
            return (self.tiers[0].of_heads(heads, 0),)
        found = []
        for number, b in enumerate(chosen):
            first = b * self.num_kv_heads
            for tier in self.tiers:
                if 0 <= (own := first - tier.first_head) < tier.num_heads:
                    found.append(tier.of_heads(range(own, own + self.num_kv_heads), number * self.num_kv_heads))
        return tuple(found)

    @classmethod
    def stacked(cls, parts: Sequence[HeldRows], batch_sizes: Sequence[int], seen: int, slack: int = SLACK) -> HeldRows:
        """Copies of several as a batch."""
        appended, hides = min(part.storage.appended for part in parts), any(part.storage.hides for part in parts)
        storage = RowStorage(
            Rows.joined([part.storage.compact() for part in parts]), seen, slack, appended, hides=hides
        )
        recent = RecentQueries.stacked([part.recent for part in parts], batch_sizes)
        settled = appended - min(part.removable for part in parts)
        tiers, first = [], 0
        for part in parts:
            tiers += [replace(tier, first_head=tier.first_head + first) for tier in part.tiers]
            first += part.storage.num_heads
        return cls(storage, parts[0].num_kv_heads, recent, settled, tuple(tiers))
