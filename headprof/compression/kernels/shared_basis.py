"""Rows that are held by what they are in a basis, which heads of a layer share: what is common to their kinds.

Shapes as in `packed_rows`; `M` is the number of bases.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before

OF_HEADS, TURNING = "basis_of_head", ("key_frequencies", "key_partners")
"""Names in a file of what says which basis each head has, and of how keys are turned."""


@dataclass(frozen=True)
class RowsInBases(PackedRows):
    """Rows in bases. Keys are packed as they were before they were turned to their positions.

    Attributes:
        groups: which bases each head has, `N` numbers; empty in a kernel's hands.
        most: no head has more packed rows.
        basis_of_head: the same as `groups`, int32 `[N]`.
        key_frequencies, key_partners: how keys are turned (see `turned`), float32 and int16 `[D]`; empty where they are
            packed as they are.
    """

    groups: Sequence[int]
    most: int
    basis_of_head: Tensor
    key_frequencies: Tensor
    key_partners: Tensor

    OF_ROWS: ClassVar[tuple[str, ...]]
    """Names of the tensors that have an entry for each row."""
    OF_BASES: ClassVar[tuple[str, ...]]
    """Names of those that have an entry for each basis."""

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {name: getattr(self, name) for name in self.part_names()}

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        """The names of `parts`, first of what holds the rows."""
        return (*cls.OF_ROWS, *cls.OF_BASES, OF_HEADS, *TURNING)

    @property
    def total(self) -> int:
        return len(getattr(self, self.OF_ROWS[0]))

    @property
    def num_bases(self) -> int:
        """`M`."""
        return len(getattr(self, self.OF_BASES[0]))

    @property
    def layout(self) -> object:
        return list(self.counts), list(self.groups)

    @abstractmethod
    def at_start(self) -> tuple[Tensor, Tensor]:
        """Keys as they were before they were turned, and values, float32 `[P, D]` each."""

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in a dtype: only `at` knows the positions to which keys are turned."""
        keys, values = self.at_start()
        return keys.to(dtype), values.to(dtype)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self.at_start()
        return turned(keys, positions, self.key_frequencies, self.key_partners).to(dtype), values.to(dtype)

    def times_own(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Each row, `[P, C]`, times the matrix of its head's basis, `[M, C, E]`: float32 `[P, E]`."""
        return times_own(rows, matrices, self.basis_of_head.long(), self.before, self.most)

    def of_heads(self, heads: Sequence[int]) -> Self:
        counts, starts = [self.counts[head] for head in heads], [0, *accumulate(self.counts)]
        rows = ragged_index([starts[head] for head in heads], counts, self.before.device)
        # A head without packed rows needs no basis, but there is always one.
        needed = list(dict.fromkeys(self.groups[head] for head in heads if self.counts[head])) or [0]
        groups = [needed.index(self.groups[head]) if self.counts[head] else 0 for head in heads]
        bases = torch.tensor(needed).to(rows.device, non_blocking=True)
        parts = {name: getattr(self, name)[rows] for name in self.OF_ROWS}
        parts |= {name: getattr(self, name)[bases] for name in self.OF_BASES}
        return self._laid_out(parts, counts, groups)

    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        packed = [each for each in parts if isinstance(each, RowsInBases)]
        counts: list[int] = []
        groups: list[int] = []
        bases = 0
        for each in parts:
            if isinstance(each, RowsInBases):
                counts += each.counts
                groups += [bases + group for group in each.groups]
                bases += each.num_bases
            elif isinstance(each, int):
                counts += [0] * each
                groups += [0] * each
        joined = {name: torch.cat([each.parts[name] for each in packed]) for name in (*self.OF_ROWS, *self.OF_BASES)}
        return self._laid_out(joined, counts, groups)

    def _laid_out(self, parts: Mapping[str, Tensor], counts: Sequence[int], groups: Sequence[int]) -> Self:
        """Rows of this kind, turned in this way, in these tensors."""
        own: dict[str, Any] = {**parts, **of_layout(counts, groups, self.before.device)}
        return replace(self, **own)


def of_layout(counts: Sequence[int], groups: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What `RowsInBases` says of heads with so many packed rows and these bases, by its names."""
    return {
        "before": sums_before(counts, device),
        "counts": list(counts),
        "groups": list(groups),
        "most": max(counts),
        OF_HEADS: torch.tensor(groups, dtype=torch.int32).to(device, non_blocking=True),
    }


def times_own(rows: Tensor, matrices: Tensor, own: Tensor, before: Tensor, most: int) -> Tensor:
    """Each row times the matrix of its head, in float32, `[P, E]`; the host need not know how many each head has.

    Args:
        rows: `[P, C]`, head by head.
        matrices: `[M, C, E]`.
        own: which of these each head has, int64 `[N]`.
        before: rows of all heads before each, then of all, int32 `[N + 1]`.
        most: no head has more of them.
    """
    total, starts = len(rows), before[:-1].long()
    padded = (starts[:, None] + torch.arange(most, device=rows.device)).clamp(max=max(0, total - 1))
    products = rows[padded].float() @ matrices[own].float()  # [N, most, E]
    shifts = torch.arange(len(starts), device=rows.device) * most - starts
    index = torch.arange(total, device=rows.device)
    index = index + shifts.repeat_interleave(before.diff().long(), output_size=total)
    return products.flatten(0, 1)[index]


def turned(keys: Tensor, positions: Tensor, frequencies: Tensor, partners: Tensor) -> Tensor:
    """Keys turned to these positions, or back by as many that are negative (see `models.rotary.Turning`): float32.

    Args:
        keys: `[P, D]`.
        positions: int `[P]`.
        frequencies: float32 `[D]`; empty where keys are not turned.
        partners: int `[D]`, or empty.
    """
    keys = keys.float()
    if not len(frequencies):
        return keys
    angles = positions[:, None].float() * frequencies
    return keys * angles.cos() - keys[:, partners.long()] * angles.sin()
