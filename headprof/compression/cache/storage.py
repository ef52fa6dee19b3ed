"""The rows that one layer's heads hold: flat, every head's own number of them, with free space behind each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from headprof.compression.kernels.ragged_rows import RaggedRows

SLACK = 16
"""Rows of free space after each head, so that an appended token does not move the others."""


@dataclass(frozen=True)
class CompactRows:
    """The rows that a layer's heads hold, one head after the other without gaps.

    Attributes:
        keys, values: `[rows, D]`.
        positions: each row's place in the sequence, int32 `[rows]`.
        lengths: rows of each head, `B * K` numbers.
        bias: added to the attention logits, float32 `[rows]`, or none.
        received: attention that each row has received so far, float32 `[rows]`, or none (see `Judgement.received`).
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    bias: torch.Tensor | None = None
    received: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[CompactRows]) -> CompactRows:
        """The heads of several, in order."""

        def together(name: str) -> torch.Tensor | None:
            given = [getattr(part, name) for part in parts]
            if all(each is None for each in given):
                return None
            zeros = [part.keys.new_zeros(len(part.keys), dtype=torch.float32) for part in parts]
            return torch.cat([zero if each is None else each for each, zero in zip(given, zeros, strict=True)])

        return cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.positions for part in parts]),
            [length for part in parts for length in part.lengths],
            together("bias"),
            together("received"),
        )

    def of_heads(self, heads: Sequence[int]) -> CompactRows:
        """The rows of these heads, in this order; a head may come more than once."""
        starts = [0, *accumulate(self.lengths)]
        lengths = [self.lengths[head] for head in heads]
        rows = _places([starts[head] for head in heads], lengths, self.keys.device)
        return CompactRows(
            self.keys[rows], self.values[rows], self.positions[rows], lengths, *_some(rows, self.bias, self.received)
        )


def _places(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`start, start + 1, ...` for each head, one head after the other, int64."""
    counts = torch.tensor(lengths)
    shifts = torch.tensor(starts) - (counts.cumsum(0) - counts)
    places = torch.arange(sum(lengths)) + shifts.repeat_interleave(counts)
    return places.to(device)


def _some(rows: torch.Tensor, *columns: torch.Tensor | None) -> list[torch.Tensor | None]:
    """These rows of each column that there is."""
    return [None if column is None else column[rows] for column in columns]


class RowStorage:
    """Flat rows `[rows, D]` of `N = B * K` heads, one head after the other, each with free space behind it.

    Attributes:
        keys, values: `[rows, D]`, free space included, as in the columns below.
        positions: each row's place in the sequence, int32 `[rows]`.
        bias: added to the attention logits, float32 `[rows]`, -inf for hidden rows; or none.
        received: attention that each row has received so far, float32 `[rows]`, or none.
        appended: how many of each head's rows have come since they were last compressed.
    """

    def __init__(self, rows: CompactRows, slack: int = SLACK, appended: int = 0):
        """Lay out rows.

        Args:
            rows: of all heads.
            slack: rows of free space behind each head.
            appended: how many of each head's rows have come since they were last compressed.
        """
        lengths, device = rows.lengths, rows.keys.device
        self._kept, self.appended = [length - appended for length in lengths], appended
        self._capacities = [length + slack for length in lengths]
        starts = [0, *accumulate(self._capacities)]
        places, total = _places(starts[:-1], lengths, device), starts[-1]
        self.keys = rows.keys.new_zeros(total, rows.keys.shape[-1]).index_copy_(0, places, rows.keys)
        self.values = rows.values.new_zeros(total, rows.values.shape[-1]).index_copy_(0, places, rows.values)
        self.positions = rows.positions.new_zeros(total).index_copy_(0, places, rows.positions)
        self.bias, self.received = (
            None if column is None else column.new_zeros(total).index_copy_(0, places, column)
            for column in (rows.bias, rows.received)
        )
        self._measure(starts)

    def _measure(self, starts: list[int]) -> None:
        """Note where the heads' rows are, as appending and attention need it: on the device, without a way back."""
        lengths, device = self.lengths, self.keys.device
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        bounds = [bound for pair in zip(starts, ends, strict=False) for bound in pair] + starts[-1:]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
        self._ends = torch.tensor(ends, device=device)
        self._longest = max(lengths)
        self._room = min(room - length for room, length in zip(self._capacities, lengths, strict=True))
        self._uniform = self._capacities[0] if len(set(self._capacities)) == len(set(lengths)) == 1 else 0

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `N` numbers."""
        return [length + self.appended for length in self._kept]

    @property
    def room(self) -> int:
        """Rows that can be appended to every head before all have to be laid out anew."""
        return self._room

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that grows with the rows."""
        columns = (self.keys, self.values, self.positions, self.bias, self.received)
        return [column for column in columns if column is not None]

    def in_place(self) -> RaggedRows:
        """What the heads hold now, for attention."""
        return RaggedRows(self.keys, self.values, self.positions, self._bounds, self._longest, self._uniform, self.bias)

    def compact(self) -> CompactRows:
        """What the heads hold now, copied together."""
        used = _places([0, *accumulate(self._capacities)][:-1], self.lengths, self.keys.device)
        extras = _some(used, self.bias, self.received)
        return CompactRows(self.keys[used], self.values[used], self.positions[used], self.lengths, *extras)

    def padded_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each head's rows are, int64 `[N, longest]`, and which of these it has, bool `[N, longest]`.

        A shorter head's come last; those before them, which it does not have, repeat its first.
        """
        starts = self._bounds[0:-1:2, None].long()
        places = self._ends[:, None] + torch.arange(-self._longest, 0, device=self.keys.device)
        return places.maximum(starts), places >= starts

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, seen: int) -> None:
        """Give every head its rows of new tokens, for which there must be room.

        Args:
            key_states, value_states: `[B, K, Q, D]`.
            seen: tokens of the sequence before them.
        """
        count = key_states.shape[2]
        if count == 1:
            places = self._ends
            self.positions.index_fill_(0, places, seen)
        else:
            new = torch.arange(count, device=self.keys.device)
            places = (self._ends[:, None] + new).flatten()
            self.positions.index_copy_(0, places, (seen + new).int().repeat(len(self._kept)))
        self.keys.index_copy_(0, places, key_states.reshape(len(places), -1))
        self.values.index_copy_(0, places, value_states.reshape(len(places), -1))
        for column in (self.bias, self.received):
            if column is not None:
                column.index_fill_(0, places, 0.0)
        self._advance(count)

    def drop_newest(self, count: int) -> None:
        """Forget the last rows of every head."""
        self._advance(-count)

    def _advance(self, count: int) -> None:
        self.appended += count
        self._longest += count
        self._room -= count
        self._ends += count
        self._bounds[1::2] += count

    def hide_newest(self, visible: torch.Tensor) -> None:
        """Hide padding among the newest tokens from every query.

        Args:
            visible: false where one of the last `Q` tokens is padding, bool `[B, Q]`.
        """
        if self.bias is None:
            self.bias = self.keys.new_zeros(len(self.keys), dtype=torch.float32)
        batch, count = visible.shape
        places = self._ends[:, None] - count + torch.arange(count, device=self.keys.device)
        hidden = ~visible.repeat_interleave(len(self._kept) // batch, dim=0)
        self.bias[places[hidden]] = float("-inf")

    def add_received(self, places: torch.Tensor, paid: torch.Tensor) -> None:
        """Count attention that rows received, float32, at these places of the storage; both of one shape."""
        if self.received is None:
            self.received = self.keys.new_zeros(len(self.keys), dtype=torch.float32)
        self.received.index_add_(0, places.flatten(), paid.flatten())
