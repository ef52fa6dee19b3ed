"""Rows in fewer dimensions: what they are in two bases, one for keys and one for values, that heads of a layer share.

After "Effectively Compress KV Heads for LLM" (Yu et al. 2024, arXiv 2406.07056). Shapes as in `shared_basis`; `R` is
the rank of keys, `S` that of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from headprof.compression.kernels.shared_basis import OF_HEADS, RowsInBases, of_layout, times_own


@dataclass(frozen=True)
class LowRankRows(RowsInBases):
    """Keys and values in a basis each.

    Attributes:
        low_keys, low_values: `[P, R]`, `[P, S]`.
        key_basis, value_basis: by which they are multiplied to be keys and values, `[M, R, D]`, `[M, S, D]`.
    """

    low_keys: Tensor
    low_values: Tensor
    key_basis: Tensor
    value_basis: Tensor

    OF_ROWS = ("low_keys", "low_values")
    OF_BASES = ("key_basis", "value_basis")

    @property
    def kind(self) -> tuple[object, ...]:
        ranks = self.key_basis.shape[1], self.value_basis.shape[1]
        return (type(self), self.first, *ranks, len(self.key_frequencies))

    @classmethod
    def projected(
        cls,
        keys: Tensor,
        values: Tensor,
        counts: Sequence[int],
        groups: Sequence[int],
        into: tuple[Tensor, Tensor],
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
            into: by which keys and values are multiplied to be packed, `[M, D, R]`, `[M, D, S]`.
            bases: of keys and values, as above.
            turning: `key_frequencies` and `key_partners`.
            first: rows of each head that come before them.
            dtype: in which all of this is held.
        """
        layout = of_layout(counts, groups, keys.device)
        heads = layout[OF_HEADS].long(), layout["before"], layout["most"]
        low_keys, low_values = (
            times_own(rows, matrices, *heads).to(dtype) for rows, matrices in ((keys, into[0]), (values, into[1]))
        )
        return cls(
            first,
            **layout,
            key_frequencies=turning[0],
            key_partners=turning[1],
            low_keys=low_keys,
            low_values=low_values,
            key_basis=bases[0].to(dtype),
            value_basis=bases[1].to(dtype),
        )

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int) -> Self:
        """Rows from their tensors, by the names that `parts` gives them; the host waits for `basis_of_head`."""
        groups = parts[OF_HEADS].tolist()
        own = {name: parts[name] for name in cls.part_names()}
        return cls(first, **{**own, **of_layout(counts, groups, own[OF_HEADS].device)})

    def at_start(self) -> tuple[Tensor, Tensor]:
        return self.times_own(self.low_keys, self.key_basis), self.times_own(self.low_values, self.value_basis)
