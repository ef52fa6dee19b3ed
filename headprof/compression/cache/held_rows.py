"""What a layer holds while text is generated: its heads' rows, and the newest queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.storage import SLACK, RowStorage
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
    """

    storage: RowStorage
    num_kv_heads: int
    recent: RecentQueries = field(default_factory=RecentQueries)
    settled: int = 0

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `B * K` numbers."""
        return self.storage.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory; free space, positions and remembered queries included.

        Left out is where each head's rows begin and end, and such numbers of a few bytes a head (`RowStorage`).
        """
        tensors = [*self.storage.rows.tensors, *self.recent.tensors]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @property
    def removable(self) -> int:
        """How many of the newest tokens can be taken out again."""
        return self.storage.appended - self.settled

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
            padded=self.storage.is_ragged,
        )

    def of_sequences(self, chosen: Sequence[int], seen: int, slack: int = SLACK) -> HeldRows:
        """Those of these sequences of the batch, in this order; one may come more than once."""
        heads = [b * self.num_kv_heads + head for b in chosen for head in range(self.num_kv_heads)]
        self.recent.select(chosen)
        storage = RowStorage(
            self.storage.compact().of_heads(heads), seen, slack, self.storage.appended, hides=self.storage.hides
        )
        return HeldRows(storage, self.num_kv_heads, self.recent, self.settled)

    @classmethod
    def stacked(cls, parts: Sequence[HeldRows], batch_sizes: Sequence[int], seen: int, slack: int = SLACK) -> HeldRows:
        """Copies of several as a batch."""
        appended, hides = min(part.storage.appended for part in parts), any(part.storage.hides for part in parts)
        storage = RowStorage(
            Rows.joined([part.storage.compact() for part in parts]), seen, slack, appended, hides=hides
        )
        recent = RecentQueries.stacked([part.recent for part in parts], batch_sizes)
        settled = appended - min(part.removable for part in parts)
        return cls(storage, parts[0].num_kv_heads, recent, settled)
