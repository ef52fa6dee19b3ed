"""Rows that a head holds in another form than the model's own numbers, beside those that it holds as they came.

Of each head some rows that follow one another are packed: those after its `first` rows, with others after them, to
which new ones are appended. A storage of rows counts them all, so that positions, biases and bounds are as ever; its
keys and values are those of the others alone, in the same order and with the same free space. Shapes as in
`ragged_rows`; `P` is the number of packed rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows(ABC):
    """The packed rows of `N` heads, one head after the other, without free space. They stay as they are.

    Attributes:
        first: rows of each head that come before its packed ones.
        before: packed rows of all heads before each, then of all: int32 `[N + 1]`, on the device.
        counts: packed rows of each head, `N` numbers; empty in a kernel's hands, where only the device knows.
    """

    first: int
    before: Tensor
    counts: Sequence[int]

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Tensor]:
        """The tensors that hold the rows, by the names that they have in a file."""

    @property
    @abstractmethod
    def total(self) -> int:
        """`P`."""

    @property
    @abstractmethod
    def kind(self) -> tuple[object, ...]:
        """What has to be the same for rows of several to be held as one."""

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, `[P, D]` each."""

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of rows at these positions, int32 `[P]`, as the model made them: `[P, D]` each."""
        return self.unpacked(dtype)

    @abstractmethod
    def of_heads(self, heads: Sequence[int]) -> Self:
        """Those of these heads, in this order; a head may come more than once."""

    @abstractmethod
    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        """Those of several, of this kind, as one; a number stands for so many heads without packed rows."""

    @property
    def layout(self) -> object:
        """What the host knows of where rows are, which is the same where others take their place."""
        return list(self.counts)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the rows are made of, without `before`."""
        return list(self.parts.values())

    @property
    def per_head(self) -> Tensor:
        """Packed rows of each head, int64 `[N]`."""
        return self.before.diff().long()

    @property
    def appended_behind(self) -> Tensor:
        """By how many rows the keys and values of a head's newest rows lie before where its bounds say, int32 `[N]`."""
        return self.before[1:]

    def index(self, starts: Tensor) -> Tensor:
        """Which rows of a storage are packed, int64 `[P]`, if heads begin at these, `[N]`."""
        shift = (starts + self.first - self.before[:-1]).repeat_interleave(self.per_head, output_size=self.total)
        return torch.arange(self.total, device=shift.device) + shift

    def among(self, keys: Tensor, values: Tensor, positions: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """All rows of a storage, `[rows, D]` each, in the dtype of the others.

        Args:
            keys, values: of the rows that are not packed, `[rows - P, D]`.
            positions: of all rows, int32 `[rows]`.
            starts: first row of each head, `[N]`.
        """
        index = self.index(starts)
        plain = torch.ones(len(keys) + self.total, dtype=torch.bool, device=keys.device).index_fill_(0, index, False)
        known = plain.device.type in ("cpu", "cuda")  # where nobody has to look how many there are
        others = (torch.nonzero_static(plain, size=len(keys)) if known else plain.nonzero()).squeeze(1)
        whole = [each.new_empty(len(plain), each.shape[1]).index_copy_(0, others, each) for each in (keys, values)]
        own_keys, own_values = self.at(positions[index], keys.dtype)
        return whole[0].index_copy_(0, index, own_keys), whole[1].index_copy_(0, index, own_values)

    def to(self, device: torch.device | str) -> Self:
        """The same rows on a device."""
        moved: dict[str, Any] = {name: each.to(device) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **moved)

    def lasting(self) -> Self:
        """Copies, that may be written to in any mode of torch."""
        with torch.inference_mode(False):
            copies: dict[str, Any] = {
                name: each.clone() for name, each in vars(self).items() if isinstance(each, Tensor)
            }
        return replace(self, **copies)

    def take(self, others: PackedRows | None) -> bool:
        """Hold other rows in the same tensors, if they are laid out alike; otherwise nothing is changed."""
        if others is None or others.kind != self.kind or others.layout != self.layout:
            return False
        for own, new in zip(self.tensors, others.tensors, strict=True):
            own.copy_(new)
        return True


def sums_before(counts: Sequence[int], device: torch.device) -> Tensor:
    """The sum of all numbers before each, then of all, int32 `[len(counts) + 1]`."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device, non_blocking=True)


def ragged_index(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """`start, start + 1, ...` for each head, one head after the other, int64 `[sum(lengths)]`."""
    counts = torch.tensor(lengths)
    shifts = torch.tensor(starts) - (counts.cumsum(0) - counts)
    index = torch.arange(sum(lengths)) + shifts.repeat_interleave(counts)
    return index.to(device, non_blocking=True)
