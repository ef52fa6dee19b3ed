"""The newest queries of a layer, kept until its rows are scored by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headprof.compression.methods.observation import AttentionLayer

_ROOM = 32
"""Queries that there is room for at first, where nothing says how many will be remembered."""


class RecentQueries:
    """The newest queries of a layer, by which its rows are scored next.

    They lie in a ring that stays where it is, and the device knows where the next one goes; so one query can be written
    without the host saying where (`write`), as a captured decode step has to.

    Attributes:
        layer: how the layer attends.
    """

    def __init__(self, query: Tensor | None = None, valid: Tensor | None = None, layer: AttentionLayer | None = None):
        """Remember some queries.

        Args:
            query: in order, `[B, H, N, D]`; `None` for none.
            valid: which are no padding, bool `[B, N]`; `None` for all.
            layer: how the layer attends.
        """
        self.layer = AttentionLayer(scaling=1.0) if layer is None else layer
        self._ring: Tensor | None = None  # [B, H, room, D]
        self._valid: Tensor | None = None  # bool [B, room], once there has been padding
        self._count = self._next = 0
        if query is not None and query.shape[2]:
            self.add(query, valid, 1)

    def __len__(self) -> int:
        return self._count

    @property
    def tensors(self) -> list[Tensor]:
        """All that is remembered, as it lies in memory."""
        return [each for each in (self._ring, self._valid) if each is not None]

    @property
    def room(self) -> int:
        """How many queries fit."""
        return 0 if self._ring is None else self._ring.shape[2]

    def add(self, query: Tensor, valid: Tensor | None, needed: int | None, usual: int = _ROOM) -> None:
        """Take newer ones, and forget those before the last `needed`, if it is a number.

        Args:
            query: `[B, H, Q, D]`.
            valid: false for padding, bool `[B, Q]`; `None` if there is none.
            needed: how many are remembered at most when the last of these has been taken; `None` for all.
            usual: how many there is room for at least, where all are remembered.
        """
        count = query.shape[2]
        kept = needed
        if needed is not None and count > 1:  # of these, some may be taken out again
            kept = count if count >= needed else needed + count - 1
        if self._ring is None:
            self._lay_out(query, max(usual, count) if kept is None else kept)
        elif kept is None:
            self.reserve(self._count + count)
        elif self.room != kept:
            self._resize(kept)
        self._fill(query, valid, kept)

    def _fill(self, query: Tensor, valid: Tensor | None, kept: int | None = None) -> None:
        """Write queries for which there is room, and count them; at most `kept` are remembered then."""
        if valid is not None and self._valid is None:
            with torch.inference_mode(False):
                self._valid = torch.ones(len(query), self.room, dtype=torch.bool, device=query.device)
        self.write(query, valid)
        self.note(query.shape[2], kept)

    def _lay_out(self, like: Tensor, room: int) -> None:
        batch, heads, _, head_dim = like.shape
        with torch.inference_mode(False):
            self._ring = torch.zeros(batch, heads, room, head_dim, dtype=like.dtype, device=like.device)
            self._slot = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._next = 0

    def reserve(self, room: int) -> None:
        """Have room for so many queries, if there are any; all move if there was less."""
        if self._ring is not None and self.room < room:
            self._resize(max(room, self.room + self.room // 2))

    def _resize(self, room: int) -> None:
        """Have room for so many queries, and keep as many of the newest."""
        query, valid = self.part(max(0, self._count - room), self._count)
        assert self._ring is not None
        self._lay_out(self._ring, room)
        self._valid, self._count = None, 0
        if query is not None:
            self._fill(query, valid)

    def write(self, query: Tensor, valid: Tensor | None = None) -> None:
        """Write queries `[B, H, Q, D]` where the next ones go, for which there must be room; `note` must follow.

        Nothing of this depends on a number that the host knows.
        """
        assert self._ring is not None
        count, room = query.shape[2], self.room
        index = self._slot if count == 1 else (self._slot + torch.arange(count, device=query.device)) % room
        self._ring.index_copy_(2, index, query)
        if self._valid is not None:
            known = torch.ones_like(self._valid[:, :count]) if valid is None else valid
            self._valid.index_copy_(1, index, known)
        self._slot.add_(count).remainder_(room)

    def for_writing(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The ring, where the next query goes in it, int64 `[1]`, and which are no padding; for `write` by hand."""
        return self._ring, None if self._ring is None else self._slot, self._valid

    def goes_by(self, slot: Tensor) -> None:
        """Look for the place of the next query here from now on, where it is the same."""
        self._slot = slot

    def note(self, count: int, needed: int | None) -> None:
        """Count queries that have been written."""
        self._count = min(self._count + count, self.room if needed is None else needed)
        self._next = (self._next + count) % self.room

    def take_back(self, count: int) -> None:
        """Forget the newest ones, so that others are written in their place."""
        count = min(count, self._count)
        if count:
            self._count -= count
            self._next = (self._next - count) % self.room
            self._slot.sub_(count).remainder_(self.room)

    def joined(self) -> tuple[Tensor | None, Tensor | None]:
        """All queries, `[B, H, N, D]`, and which are no padding, bool `[B, N]`; `None` if none, or all."""
        return self.part(0, self._count)

    def part(self, first: int, end: int) -> tuple[Tensor | None, Tensor | None]:
        """Queries number `first` to before `end`, and which of them are no padding, as `joined`."""
        if self._ring is None or first >= end:
            return None, None
        valid = None if self._valid is None else self._stretch(self._valid, 1, first, end)
        return self._stretch(self._ring, 2, first, end), valid

    def _stretch(self, ring: Tensor, dim: int, first: int, end: int) -> Tensor:
        start = (self._next - self._count + first) % self.room
        before = min(end - first, self.room - start)
        if before == end - first:
            return ring.narrow(dim, start, before)
        return torch.cat([ring.narrow(dim, start, before), ring.narrow(dim, 0, end - first - before)], dim=dim)

    def keep_last(self, count: int) -> None:
        """Forget all but the last `count`."""
        self._count = min(self._count, count)

    def forget(self) -> None:
        """Forget all."""
        self._count = 0

    def released(self) -> RecentQueries:
        """None remembered, and no memory for them."""
        return RecentQueries(layer=self.layer)

    def select(self, sequences: Sequence[int]) -> None:
        """Keep those of these sequences of the batch, in this order."""
        index = torch.tensor(sequences)
        if self._ring is not None:
            self._ring = self._ring[index.to(self._ring.device)]
        if self._valid is not None:
            self._valid = self._valid[index.to(self._valid.device)]

    @classmethod
    def stacked(cls, parts: Sequence[RecentQueries], batch_sizes: Sequence[int]) -> RecentQueries:
        """Those of several as a batch; where one remembers fewer than another, padding comes before them."""
        most = max(len(part) for part in parts)
        if most == 0:
            return cls(layer=parts[0].layer)
        longest = next(part for part in parts if len(part) == most)
        like = longest.tensors[0]
        shape = (sum(batch_sizes), like.shape[1], most, like.shape[3])
        queries, valid = like.new_zeros(shape), like.new_zeros(shape[0], most, dtype=torch.bool)
        start = 0
        for part, size in zip(parts, batch_sizes, strict=True):
            query, counts = part.joined()
            if query is not None:
                queries[start : start + size, :, most - len(part) :] = query
                valid[start : start + size, most - len(part) :] = True if counts is None else counts
            start += size
        return cls(queries, valid, longest.layer)
