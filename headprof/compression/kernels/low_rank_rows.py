"""Rows as what they are in bases of fewer dimensions, one for keys and one for values, that heads of a layer share.

After "Effectively Compress KV Heads for LLM" (Yu et al. 2024, arXiv 2406.07056). Shapes as in `shared_basis`; `R` is
the rank of keys, `S` that of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before
from headprof.compression.kernels.shared_basis import bases_of, times_own, turned

_ROWS, _BASES = ("low_keys", "low_values"), ("key_basis", "value_basis")
PARTS = (*_ROWS, *_BASES, "basis_of_head", "key_frequencies", "key_partners")
"""The tensors of `LowRankRows` by their names."""


@dataclass(frozen=True)
class LowRankRows(PackedRows):
    """Keys, as they were before they were turned to their positions, and values, each in a basis.

    Attributes:
        groups: which bases each head has, `N` numbers; empty in a kernel's hands.
        most: no head has more packed rows.
        low_keys, low_values: `[P, R]`, `[P, S]`.
        key_basis, value_basis: orthonormal rows, `[M, R, D]`, `[M, S, D]`.
        basis_of_head: the same as `groups`, int32 `[N]`.
        key_frequencies, key_partners: how keys are turned (see `shared_basis.turned`), float32 and int16 `[D]`; empty
            where they are packed as they are.
    """

    groups: Sequence[int]
    most: int
    low_keys: Tensor
    low_values: Tensor
    key_basis: Tensor
    value_basis: Tensor
    basis_of_head: Tensor
    key_frequencies: Tensor
    key_partners: Tensor

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        return len(self.low_keys)

    @property
    def kind(self) -> tuple[object, ...]:
        ranks = self.key_basis.shape[1], self.value_basis.shape[1]
        return (type(self), self.first, *ranks, len(self.key_frequencies))

    @property
    def layout(self) -> object:
        return list(self.counts), list(self.groups)

    @classmethod
    def projected(
        cls,
        keys: Tensor,
        values: Tensor,
        counts: Sequence[int],
        groups: Sequence[int],
        bases: tuple[Tensor, Tensor],
        turning: tuple[Tensor, Tensor],
        *,
        first: int,
        dtype: torch.dtype,
    ) -> Self:
        """Rows packed, as near as the bases allow.

        Args:
            keys, values: of the rows, head by head, `[P, D]`; keys turned back.
            counts: how many of them each head has, `N` numbers.
            groups: which bases each head has, `N` numbers.
            bases: of keys and values, as above.
            turning: frequencies and partners, as above.
            first: rows of each head that come before them.
            dtype: in which all of this is held.
        """
        before, most = sums_before(counts, keys.device), max(counts)
        own = torch.tensor(groups, dtype=torch.int32).to(keys.device, non_blocking=True)
        key_basis, value_basis = (basis.to(dtype) for basis in bases)
        low_keys, low_values = (
            times_own(rows, basis[own.long()].transpose(1, 2), before, most).to(dtype)
            for rows, basis in ((keys, key_basis), (values, value_basis))
        )
        numbers = first, before, list(counts), list(groups), most
        return cls(*numbers, low_keys, low_values, key_basis, value_basis, own, *turning)

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int) -> Self:
        """Rows from their tensors, by the names that `parts` gives them; the host waits for `basis_of_head`."""
        return cls._with(parts, counts, parts["basis_of_head"].tolist(), first)

    @classmethod
    def _with(cls, parts: Mapping[str, Tensor], counts: Sequence[int], groups: Sequence[int], first: int) -> Self:
        before = sums_before(counts, parts["low_keys"].device)
        return cls(first, before, list(counts), list(groups), max(counts), *(parts[name] for name in PARTS))

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys as they were before they were turned, and values, `[P, D]` each."""
        own = self.basis_of_head.long()
        keys = times_own(self.low_keys, self.key_basis[own], self.before, self.most)
        values = times_own(self.low_values, self.value_basis[own], self.before, self.most)
        return keys.to(dtype), values.to(dtype)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self.unpacked(torch.float32)
        return turned(keys, positions, self.key_frequencies, self.key_partners).to(dtype), values.to(dtype)

    def of_heads(self, heads: Sequence[int]) -> Self:
        counts, starts = [self.counts[head] for head in heads], [0, *accumulate(self.counts)]
        rows = ragged_index([starts[head] for head in heads], counts, self.before.device)
        needed, groups = bases_of(self.groups, self.counts, heads)
        bases = torch.tensor(needed).to(rows.device, non_blocking=True)
        parts = dict(self.parts)
        parts |= {name: parts[name][rows] for name in _ROWS} | {name: parts[name][bases] for name in _BASES}
        return self._of_groups(parts, counts, groups)

    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        packed = [each for each in parts if isinstance(each, LowRankRows)]
        counts = [count for each in parts for count in ([0] * each if isinstance(each, int) else each.counts)]
        groups: list[int] = []
        bases = 0
        for each in parts:
            if isinstance(each, LowRankRows):
                groups += [bases + group for group in each.groups]
                bases += len(each.key_basis)
            else:
                groups += [0] * (each if isinstance(each, int) else len(each.counts))
        joined = {name: torch.cat([each.parts[name] for each in packed]) for name in (*_ROWS, *_BASES)}
        return self._of_groups({**self.parts, **joined}, counts, groups)

    def _of_groups(self, parts: Mapping[str, Tensor], counts: Sequence[int], groups: Sequence[int]) -> Self:
        own = torch.tensor(groups, dtype=torch.int32).to(self.before.device, non_blocking=True)
        return self._with({**parts, "basis_of_head": own}, counts, groups, self.first)
