"""Where the rows of one layer's heads lie: flat, every head's own number of them, with free space behind each head."""

from __future__ import annotations

from itertools import accumulate

import torch

from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.rows import COLUMNS, Rows, ragged_index

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
        lengths = rows.known_lengths()
        self._kept, self.appended = [length - appended for length in lengths], appended
        rooms = [length + slack for length in lengths]
        starts = [0, *accumulate(rooms)]
        index, total = ragged_index(starts[:-1], lengths, rows.keys.device), starts[-1]
        self.rows = rows.map(lambda each: each.new_zeros(total, *each.shape[1:]).index_copy_(0, index, each), rooms)
        self._measure(starts)

    def _measure(self, starts: list[int]) -> None:
        """Note where the heads' rows are, as appending and attention need it: on the device, without a way back."""
        lengths, rooms, device = self.lengths, self.rows.known_lengths(), self.rows.keys.device
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        bounds = [bound for pair in zip(starts, ends, strict=False) for bound in pair] + starts[-1:]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
        self._ends = torch.tensor(ends, device=device)
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
            self._longest,
            self._uniform,
            rows.columns.get("bias"),
        )

    def compact(self) -> Rows:
        """What the heads hold now, copied together without gaps."""
        starts = [0, *accumulate(self.rows.known_lengths())][:-1]
        index = ragged_index(starts, self.lengths, self.rows.keys.device)
        return self.rows.map(lambda each: each[index], self.lengths)

    def padded_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each head's rows are, int64 `[N, longest]`, and which of these it has, bool `[N, longest]`.

        A shorter head's come last; those before them, which it does not have, repeat its first.
        """
        starts = self._bounds[0:-1:2, None].long()
        index = self._ends[:, None] + torch.arange(-self._longest, 0, device=self._ends.device)
        return index.maximum(starts), index >= starts

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, seen: int) -> None:
        """Give every head its rows of new tokens, for which there must be room.

        Args:
            key_states, value_states: `[B, K, Q, D]`.
            seen: tokens of the sequence before them.
        """
        rows, count = self.rows, key_states.shape[2]
        if count == 1:
            index = self._ends
            rows.positions.index_fill_(0, index, seen)
        else:
            new = torch.arange(count, device=rows.keys.device)
            index = (self._ends[:, None] + new).flatten()
            rows.positions.index_copy_(0, index, (seen + new).int().repeat(len(self._kept)))
        rows.keys.index_copy_(0, index, key_states.reshape(len(index), -1))
        rows.values.index_copy_(0, index, value_states.reshape(len(index), -1))
        for name, column in rows.columns.items():
            column.index_fill_(0, index, COLUMNS[name].fill)
        self._advance(count)

    def drop_newest(self, count: int) -> None:
        """Forget the last rows of every head."""
        self._advance(-count)

    def _advance(self, count: int) -> None:
        self.appended += count
        self._longest += count
        self._free -= count
        self._ends += count
        self._bounds[1::2] += count

    def hide_newest(self, visible: torch.Tensor) -> None:
        """Hide padding among the newest tokens from every query.

        Args:
            visible: false where one of the last `Q` tokens is padding, bool `[B, Q]`.
        """
        batch, count = visible.shape
        index = self._ends[:, None] - count + torch.arange(count, device=self._ends.device)
        hidden = ~visible.repeat_interleave(len(self._kept) // batch, dim=0)
        self._column("bias")[index[hidden]] = float("-inf")

    def add_received(self, index: torch.Tensor, paid: torch.Tensor) -> None:
        """Count attention that rows received, float32, at this index of the storage; both of one shape."""
        self._column("received").index_add_(0, index.flatten(), paid.flatten())

    def _column(self, name: str) -> torch.Tensor:
        """A column to write to, made if there is none."""
        self.rows = self.rows.with_columns({name: self.rows.column(name)})
        return self.rows.columns[name]
