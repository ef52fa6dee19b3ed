"""Where the rows of one layer's heads lie: flat, every head's own number of them, with free space behind each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from headprof.compression.kernels.append import append_rows
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.rows import Rows

SLACK = 16
"""Rows of free space after each head, so that an appended token does not move the others."""


class RowStorage:
    """The rows of `N = B * K` heads, one head after the other, each with free space behind it.

    Where a head's rows begin and end, and the position of its next token, is known to the device, so tokens are
    appended and attended to without a word from the host; and rows that have been compressed again take the place of
    those before them (`replace`). So no buffer moves while text is generated, and a decode step can be captured.

    Attributes:
        rows: as they lie, free space included.
        appended: how many of each head's rows have come since they were last compressed.
        hides: whether some rows may be hidden, as padding.
    """

    def __init__(
        self,
        rows: Rows,
        seen: int | Sequence[int],
        slack: int = SLACK,
        appended: int = 0,
        *,
        hides: bool = False,
        rooms: Sequence[int] = (),
    ):
        """Lay out rows.

        Args:
            rows: of all heads, flat, without gaps.
            seen: tokens of the sequence so far; of each head's, `N` numbers, where they have not all as many.
            slack: rows of free space behind each head.
            appended: how many of each head's rows have come since they were last compressed.
            hides: whether some rows may be hidden.
            rooms: rows that there is to be room for in each head, `N` numbers, where that is more.
        """
        counts = _counts(rows)
        heads, device = len(counts), rows.keys.device
        self._rooms: list[int] | None = None  # of each head; `None` where only the device knows
        if rows.lengths is not None:
            self._rooms = [length + slack for length in rows.lengths]
            if rooms:
                self._rooms = [max(pair) for pair in zip(self._rooms, rooms, strict=True)]
        total = len(rows.keys) + heads * slack if self._rooms is None else sum(self._rooms)
        with torch.inference_mode(False):
            self.rows = _room_for(rows, total)
            self._bounds = torch.full((2 * heads + 1,), total, dtype=torch.int32, device=device)
            if isinstance(seen, int):
                self._next_positions = torch.full((heads,), seen, dtype=torch.int32, device=device)
            else:
                self._next_positions = torch.tensor(seen, dtype=torch.int32).to(device, non_blocking=True)
        if self._rooms is not None:
            starts = torch.tensor([0, *accumulate(self._rooms)][:-1], dtype=torch.int32)
            self._bounds[0:-1:2] = starts.to(device, non_blocking=True)
        self._longest = total if self._rooms is None else max(self._rooms)
        self._plans: dict = {}
        self.hides = hides
        self._put(rows, counts, appended)

    def _put(self, rows: Rows, counts: Tensor, appended: int) -> None:
        """Write rows, flat and without gaps, over what is held; rooms that are not known get equal free space."""
        heads, before, size = len(counts), counts.cumsum(0) - counts, len(rows.positions)
        slack = (len(self.rows.positions) - size) // heads
        if self._rooms is None:
            self._bounds[0:-1:2] = before + torch.arange(heads, device=counts.device) * slack
        starts = self._bounds[0:-1:2]
        self._bounds[1::2] = starts + counts
        index = _shifted(starts - before, counts, size)
        own = self._of_unpacked(index, starts, before, counts, len(rows.keys))
        self.rows.keys.index_copy_(0, own, rows.keys)
        self.rows.values.index_copy_(0, own, rows.values)
        self.rows.positions.index_copy_(0, index, rows.positions)
        for name, column in self.rows.columns.items():
            column.index_copy_(0, index, rows.column(name))
        self._kept = None if rows.lengths is None else [length - appended for length in rows.lengths]
        self._sum, self.appended = size - heads * appended, appended
        self._uniform = 0
        if self._rooms is None or self._kept is None:
            self._slack = slack + appended
        else:
            self._slack = min(room - length for room, length in zip(self._rooms, self._kept, strict=True))
            self._uniform = self._rooms[0] if len(set(self._rooms)) == len(set(self._kept)) == 1 else 0

    def replace(self, rows: Rows, slack: int) -> bool:
        """Hold other rows in the same place, if they fit there with so much free space behind each head.

        Args:
            rows: of as many heads, flat, without gaps, just compressed.
            slack: rows of free space that there have to be at least.

        Returns:
            Whether they fit, and would not leave most of the place empty; if not, nothing has changed.
        """
        counts = _counts(rows)
        if len(counts) != self.num_heads or set(rows.columns) - set(self.rows.columns):
            return False
        spare = len(self.rows.positions) - len(rows.positions) - slack * len(counts)
        if not 0 <= spare <= max(slack, SLACK) * len(counts):
            return False
        if self._rooms is not None and (
            rows.lengths is None
            or any(length + slack > room for length, room in zip(rows.lengths, self._rooms, strict=True))
        ):
            return False
        if not (rows.packed is None if self.rows.packed is None else self.rows.packed.take(rows.packed)):
            return False
        self._put(rows, counts, 0)
        self.hides = False
        for plan in self._plans.values():
            plan.refresh()
        return True

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `N` numbers; read from the device where only that knows them."""
        if self._kept is None:
            self._kept = [length - self.appended for length in self.counts.tolist()]
        return [length + self.appended for length in self._kept]

    @property
    def is_ragged(self) -> bool:
        """Whether heads may hold unequal numbers of rows, or hidden ones."""
        return self.hides or self._kept is None or len(set(self._kept)) > 1

    @property
    def counts(self) -> Tensor:
        """Rows that each head holds, int64 `[N]`."""
        return (self._bounds[1::2] - self._bounds[0:-1:2]).long()

    @property
    def starts(self) -> Tensor:
        """Where each head's rows begin, int64 `[N]`."""
        return self._bounds[0:-1:2].long()

    @property
    def total(self) -> int:
        """Rows that all heads hold together."""
        return self._sum + self.appended * self.num_heads

    def sums(self, num_kv_heads: int) -> list[int]:
        """Rows that the heads of each sequence hold together, `B` numbers."""
        if self.num_heads == num_kv_heads:
            return [self.total]
        lengths = self.lengths
        return [sum(lengths[start : start + num_kv_heads]) for start in range(0, len(lengths), num_kv_heads)]

    @property
    def num_heads(self) -> int:
        return len(self._next_positions)

    @property
    def free(self) -> int:
        """Rows that can be appended to every head before all have to be laid out anew."""
        return self._slack - self.appended

    @property
    def in_use(self) -> int | None:
        """Most rows that one head holds; `None` where only the device knows."""
        if self._kept is None and self._bounds.device.type != "cpu":
            return None
        return max(self.lengths)

    def has_room(self, slack: int, rooms: Sequence[int]) -> bool:
        """Whether so many rows can be appended to every head, and each head can hold that many."""
        if slack > self.free or not rooms:
            return slack <= self.free
        return self._rooms is not None and all(one >= two for one, two in zip(self._rooms, rooms, strict=True))

    @property
    def _most(self) -> int:
        """Most rows that one head holds, or more."""
        return self.total if self.in_use is None else self.in_use

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
            next_positions=self._next_positions,
            received=rows.columns.get("received"),
            in_use=self.in_use,
            packed=rows.packed,
            plans=self._plans,
        )

    def compact(self) -> Rows:
        """What the heads hold now, copied together without gaps."""
        counts, starts = self.counts, self._bounds[0:-1:2]
        before = counts.cumsum(0) - counts
        index = _shifted(starts - before, counts, self.total)
        packed = self.rows.packed
        own = self._of_unpacked(index, starts, before, counts, self.total - (0 if packed is None else packed.total))
        return Rows(
            self.rows.keys[own],
            self.rows.values[own],
            self.rows.positions[index],
            None if self._kept is None else self.lengths,
            {name: column[index] for name, column in self.rows.columns.items()},
            counts,
            packed,
        )

    def _of_unpacked(self, index: Tensor, starts: Tensor, before: Tensor, counts: Tensor, total: int) -> Tensor:
        """Where the `total` rows lie that are not packed, among their like.

        Args:
            index: where all rows lie, which it is if none is packed.
            starts, before, counts: of each head, where it begins, rows of the heads before it and its own, `[N]`.
        """
        packed = self.rows.packed
        if packed is None:
            return index
        # Of both what lies before a head is less by what is packed, and so is what it holds.
        return _shifted(starts - before, counts - packed.per_head, total)

    def unpacked(self) -> Rows:
        """The rows as they lie, with all keys and values at hand."""
        held = self.in_place().unpacked()
        return replace(self.rows, keys=held.keys, values=held.values, packed=None)

    def padded_index(self) -> tuple[Tensor, Tensor]:
        """Where each head's rows are, int64 `[N, longest]`, and which of these it has, bool `[N, longest]`.

        A shorter head's come last; those before them, which it does not have, repeat its first.
        """
        starts, ends = self._bounds[0:-1:2, None].long(), self._bounds[1::2, None].long()
        index = ends + torch.arange(-self._most, 0, device=ends.device)
        return index.maximum(starts), index >= starts

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Give every head its rows of new tokens, `[B, K, Q, D]`, for which there must be room; `note` must follow.

        Nothing of this depends on a number that the host knows.
        """
        append_rows(self.in_place(), key_states, value_states)

    def overwrite(self, index: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put other rows, none of them packed, in the place of those at this index of the storage, int64 `[M]`."""
        self.rows.keys.index_copy_(0, index, keys)
        self.rows.values.index_copy_(0, index, values)
        self.rows.positions.index_copy_(0, index, positions)

    def note(self, count: int) -> None:
        """Count rows that have been appended to every head."""
        self.appended += count

    def drop_newest(self, count: int) -> None:
        """Forget the last rows of every head."""
        self.appended -= count
        self._bounds[1::2] -= count
        self._next_positions -= count

    def hide_newest(self, visible: Tensor) -> None:
        """Hide padding among the newest tokens from every query.

        Args:
            visible: false where one of the last `Q` tokens is padding, bool `[B, Q]`.
        """
        batch, count = visible.shape
        index = self._bounds[1::2, None].long() - count + torch.arange(count, device=visible.device)
        self.hides = True
        hidden = ~visible.repeat_interleave(self.num_heads // batch, dim=0)
        self._column("bias")[index[hidden]] = float("-inf")

    def add_received(self, index: Tensor, paid: Tensor) -> None:
        """Count attention that rows received, float32, at this index of the storage; both of one shape."""
        self._column("received").index_add_(0, index.flatten(), paid.flatten())

    def _column(self, name: str) -> Tensor:
        """A column to write to, made if there is none."""
        if name not in self.rows.columns:
            with torch.inference_mode(False):
                self.rows = self.rows.with_columns({name: self.rows.column(name)})
        return self.rows.columns[name]


def _room_for(rows: Rows, total: int) -> Rows:
    """Zeros in the place of rows, for so many in all; but what is packed, which is copied."""
    packed = None if rows.packed is None else rows.packed.lasting()
    own = total if packed is None else total - packed.total
    return Rows(
        rows.keys.new_zeros(own, *rows.keys.shape[1:]),
        rows.values.new_zeros(own, *rows.values.shape[1:]),
        rows.positions.new_zeros(total),
        columns={name: column.new_zeros(total) for name, column in rows.columns.items()},
        packed=packed,
    )


def _shifted(shifts: Tensor, counts: Tensor, total: int) -> Tensor:
    """Numbers from 0, of which each head's `counts` are moved on by its own shift, int64 `[total]`."""
    index = torch.arange(total, device=counts.device)
    return index + shifts.repeat_interleave(counts, output_size=total)


def _counts(rows: Rows) -> Tensor:
    """Rows of each head, int64 `[N]`."""
    return torch.tensor(rows.lengths, device=rows.keys.device) if rows.counts is None else rows.counts
