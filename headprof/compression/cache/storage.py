"""Where the rows of one layer's heads lie: flat, every head's own number of them, with free space behind each head."""

from __future__ import annotations

from itertools import accumulate

import torch

from headprof.compression.kernels.append import append_rows
from headprof.compression.kernels.ragged_rows import RaggedRows, WorkPlan
from headprof.compression.rows import Rows, ragged_index

SLACK = 16
"""Rows of free space after each head, so that an appended token does not move the others."""


class RowStorage:
    """The rows of `N = B * K` heads, one head after the other, each with free space behind it.

    Attributes:
        rows: as they lie, free space included; their `lengths` are the sizes of the heads' rooms.
        appended: how many of each head's rows have come since they were last compressed.
    """

    def __init__(self, rows: Rows, slack: int = SLACK, appended: int = 0):
        """Lay out rows.

        Args:
            rows: of all heads, flat, without gaps.
            slack: rows of free space behind each head.
            appended: how many of each head's rows have come since they were last compressed.
        """
        self._kept, self.appended = [length - appended for length in rows.lengths], appended
        rooms = [length + slack for length in rows.lengths]
        starts = [0, *accumulate(rooms)]
        index, total = ragged_index(starts[:-1], rows.lengths, rows.keys.device), starts[-1]
        self.rows = rows.map(lambda each: each.new_zeros(total, *each.shape[1:]).index_copy_(0, index, each), rooms)
        self._measure(starts)

    def _measure(self, starts: list[int]) -> None:
        """Note where the heads' rows are, as appending and attention need it: on the device, without a way back."""
        lengths, rooms, device = self.lengths, self.rows.lengths, self.rows.keys.device
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        bounds = [bound for pair in zip(starts, ends, strict=False) for bound in pair] + starts[-1:]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
        self._next_positions = torch.zeros(len(lengths), dtype=torch.int32, device=device)
        self._plans: dict[str, WorkPlan] = {}
        self._longest = max(lengths)
        self._free = min(room - length for room, length in zip(rooms, lengths, strict=True))
        self._uniform = rooms[0] if len(set(rooms)) == len(set(lengths)) == 1 else 0

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `N` numbers."""
        return [length + self.appended for length in self._kept]

    @property
    def free(self) -> int:
        """Rows that can be appended to every head before all have to be laid out anew."""
        return self._free

    def in_place(self) -> RaggedRows:
        """What the heads hold now, for attention."""
        rows = self.rows
        return RaggedRows(
            rows.keys,
            rows.values,
            rows.positions,
            self._bounds,
            max(rows.lengths),
            self._uniform,
            rows.columns.get("bias"),
            rows.columns.get("received"),
            self._next_positions,
            self._longest,
            self._plans,
        )

    def compact(self) -> Rows:
        """What the heads hold now, copied together without gaps."""
        starts = [0, *accumulate(self.rows.lengths)][:-1]
        index = ragged_index(starts, self.lengths, self.rows.keys.device)
        return self.rows.map(lambda each: each[index], self.lengths)

    def padded_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each head's rows are, int64 `[N, longest]`, and which of these it has, bool `[N, longest]`.

        A shorter head's come last; those before them, which it does not have, repeat its first.
        """
        starts = self._bounds[0:-1:2, None].long()
        ends = self._bounds[1::2, None].long()
        index = ends + torch.arange(-self._longest, 0, device=ends.device)
        return index.maximum(starts), index >= starts

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, seen: int) -> None:
        """Give every head its rows of new tokens, for which there must be room.

        Args:
            key_states, value_states: `[B, K, Q, D]`.
            seen: tokens of the sequence before them.
        """
        self._next_positions.fill_(seen)
        append_rows(self.in_place(), key_states, value_states)
        self._count(key_states.shape[2])

    def drop_newest(self, count: int) -> None:
        """Forget the last rows of every head."""
        self._bounds[1::2] -= count
        self._count(-count)

    def _count(self, count: int) -> None:
        self.appended += count
        self._longest += count
        self._free -= count

    def hide_newest(self, visible: torch.Tensor) -> None:
        """Hide padding among the newest tokens from every query.

        Args:
            visible: false where one of the last `Q` tokens is padding, bool `[B, Q]`.
        """
        batch, count = visible.shape
        ends = self._bounds[1::2, None].long()
        index = ends - count + torch.arange(count, device=ends.device)
        hidden = ~visible.repeat_interleave(len(self._kept) // batch, dim=0)
        self._column("bias")[index[hidden]] = float("-inf")

    def add_received(self, index: torch.Tensor, paid: torch.Tensor) -> None:
        """Count attention that rows received, float32, at this index of the storage; both of one shape."""
        self._column("received").index_add_(0, index.flatten(), paid.flatten())

    def _column(self, name: str) -> torch.Tensor:
        """A column to write to, made if there is none."""
        self.rows = self.rows.with_columns({name: self.rows.column(name)})
        return self.rows.columns[name]
