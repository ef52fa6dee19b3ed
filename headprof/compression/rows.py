"""Rows: the keys and values that the heads of a layer hold, and what else is known of each.

Shapes: `B` sequences, `K` KV heads, `T` rows of each head, `D` head dimension. A head is one (sequence, KV head) pair,
`b * K + k`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows, ragged_index


@dataclass(frozen=True)
class Column:
    """How a column behaves.

    Attributes:
        fill: what a row has of which nothing is known.
        summed: whether a merged row has the sum of the rows it stands for; else it has its centre's.
    """

    fill: float = 0.0
    summed: bool = False


COLUMNS: Mapping[str, Column] = {"bias": Column(), "received": Column(summed=True)}
"""What may be known of a row beside its key, value and position, by name.

- `bias`: added to the attention logits: the log mass of a merged row; -inf hides a row.
- `received`: the attention that the row has received from all queries so far, averaged over the group.
"""


@dataclass(frozen=True)
class HeadCounts:
    """How many rows each head of a layer keeps, as far as the host must know it.

    Attributes:
        counts: of each head, int64 `[B, K]`, on the device.
        most: no head has more; a bound that the host knows without looking.
        total: of all heads together.
        lengths: the same as `counts`, `B * K` numbers, or `None` where the host does not know them.
    """

    counts: Tensor
    most: int
    total: int
    lengths: Sequence[int] | None = None

    @classmethod
    def of(cls, counts: Tensor, device: torch.device | str) -> HeadCounts:
        """Counts that the host has, int64 `[B, K]` on the CPU, for a device; nothing waits for it."""
        lengths = counts.flatten().tolist()
        return cls(counts.to(device, non_blocking=True), max(lengths), sum(lengths), lengths)

    @classmethod
    def looked_up(cls, counts: Tensor) -> HeadCounts:
        """Counts that only the device has, int64 `[B, K]`, for which the host waits."""
        lengths = counts.flatten().tolist()
        return cls(counts, max(lengths), sum(lengths), lengths)


@dataclass(frozen=True)
class Rows:
    """The rows of a layer's heads: a block with as many for each head, or flat, with each head's own number.

    Attributes:
        keys, values: `[B, K, T, D]` in a block; flat `[rows, D]`, one head after the other, where some are packed
            those of the others alone.
        positions: each row's position in the sequence, int `[B, K, T]` or int32 `[rows]`.
        lengths: rows of each head, `B * K` numbers; empty in a block, `None` if the host does not know them.
        columns: what else is known of each row, by names of `COLUMNS`: float32 `[B, K, T]` or `[rows]`.
        counts: the same as `lengths` on the device, int64 `[B * K]`, where rows have just been chosen.
        packed: of flat rows those that are held in another form (see `packed_rows`), or `None`; where there are some
            the host knows `lengths`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Sequence[int] | None = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None
    packed: PackedRows | None = None

    @classmethod
    def of_prompt(cls, keys: Tensor, values: Tensor) -> Rows:
        """The block of a whole prompt, `[B, K, T, D]` each: row `t` of every head is token `t`."""
        positions = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
        return cls(keys, values, positions.expand(keys.shape[:3]))

    def map(self, change: Callable[[Tensor], Tensor], lengths: Sequence[int] | None = ()) -> Rows:
        """The same change made to keys, values, positions and every column; `lengths` of what comes of it.

        None of the rows may be packed.
        """
        assert self.packed is None
        columns = {name: change(column) for name, column in self.columns.items()}
        return Rows(change(self.keys), change(self.values), change(self.positions), lengths, columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> Rows:
        """These rows with more columns, or others in the place of those of the same names."""
        return replace(self, columns={**self.columns, **columns})

    def without(self, name: str) -> Rows:
        """These rows without a column, if they have it."""
        columns = {other: column for other, column in self.columns.items() if other != name}
        return replace(self, columns=columns)

    def kept(self, kept: Tensor, counts: HeadCounts) -> Rows:
        """Of a block the marked rows, flat; `kept` is bool `[B, K, T]`, with `counts` marked in each head."""
        return self.at(marked(kept, counts.total), counts)

    def at(self, places: tuple[Tensor, ...], counts: HeadCounts) -> Rows:
        """Of a block the rows at these indices, as `marked` gives them, flat."""
        rows = self.map(lambda each: each[places], counts.lengths)
        return replace(rows, positions=rows.positions.int(), counts=counts.counts.flatten())

    def known_lengths(self) -> Sequence[int]:
        """Rows of each head, for which the host waits where it does not know them."""
        if self.lengths is not None:
            return self.lengths
        assert self.counts is not None
        return self.counts.tolist()

    def to(self, device: torch.device | str) -> Rows:
        """These rows on a device."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            positions=self.positions.to(device),
            columns={name: column.to(device) for name, column in self.columns.items()},
            counts=None if self.counts is None else self.counts.to(device),
            packed=None if self.packed is None else self.packed.to(device),
        )

    def of_heads(self, heads: Sequence[int]) -> Rows:
        """Of flat rows those of these heads, in this order; a head may come more than once."""
        held = self.known_lengths()
        lengths = [held[head] for head in heads]
        index = _of_heads(held, heads, self.keys.device)
        if self.packed is None:
            return self.map(lambda each: each[index], lengths)
        own = _of_heads(self._unpacked_lengths(), heads, self.keys.device)
        columns = {name: column[index] for name, column in self.columns.items()}
        packed = self.packed.of_heads(heads)
        return Rows(self.keys[own], self.values[own], self.positions[index], lengths, columns, packed=packed)

    def unpacked(self) -> Rows:
        """Flat rows with all keys and values at hand: copies, where some are packed."""
        if self.packed is None:
            return self
        starts = torch.tensor([0, *accumulate(self.known_lengths())][:-1], device=self.keys.device)
        keys, values = self.packed.among(self.keys, self.values, self.positions, starts)
        return replace(self, keys=keys, values=values, packed=None)

    def _unpacked_lengths(self) -> list[int]:
        """Of each head, how many rows are not packed."""
        packed = [0] * len(self.known_lengths()) if self.packed is None else self.packed.counts
        return [length - count for length, count in zip(self.known_lengths(), packed, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The heads of several flat rows, in order; a column that some of them lack is filled.

        Where rows are packed in different ways, none of them is packed in what comes of it.
        """
        if len({part.packed.kind for part in parts if part.packed is not None}) > 1:
            parts = [part.unpacked() for part in parts]
        names = [name for name in COLUMNS if any(name in part.columns for part in parts)]
        whole = [part.with_columns({name: part.column(name) for name in names}) for part in parts]
        return cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.positions for part in parts]),
            [length for part in parts for length in part.known_lengths()],
            {name: torch.cat([part.columns[name] for part in whole]) for name in names},
            packed=_joined_packed(parts),
        )

    def column(self, name: str) -> Tensor:
        """The column of this name, or a new one of its fill, float32."""
        found = self.columns.get(name)
        if found is not None:
            return found
        return torch.full(self.positions.shape, COLUMNS[name].fill, dtype=torch.float32, device=self.keys.device)

    @property
    def tensors(self) -> list[Tensor]:
        """All that these rows are made of."""
        packed = [] if self.packed is None else self.packed.tensors
        return [self.keys, self.values, self.positions, *self.columns.values(), *packed]


def marked(kept: Tensor, total: int) -> tuple[Tensor, ...]:
    """Where entries are true, in order: an index of each dimension, int64 `[total]`.

    Args:
        kept: bool, of any shape.
        total: how many are true, so that nobody has to look.
    """
    if kept.device.type in ("cpu", "cuda"):
        return torch.nonzero_static(kept, size=total).unbind(1)
    return kept.nonzero(as_tuple=True)


def _of_heads(lengths: Sequence[int], heads: Sequence[int], device: torch.device) -> Tensor:
    """Where the rows of these heads are, if all heads have so many, one head after the other: int64."""
    starts = [0, *accumulate(lengths)]
    return ragged_index([starts[head] for head in heads], [lengths[head] for head in heads], device)


def _joined_packed(parts: Sequence[Rows]) -> PackedRows | None:
    """The packed rows of several flat rows, which are of one kind, as one; `None` if there are none."""
    first = next((part.packed for part in parts if part.packed is not None), None)
    if first is None:
        return None
    return first.joined_with([len(part.known_lengths()) if part.packed is None else part.packed for part in parts])
