"""Rows as one latent for key and value, in codes of few bits, in a basis that heads of a layer share.

After "Lossless KV Cache Compression to 2%" (CLLA; Yang et al. 2024, arXiv 2410.15252). Shapes as in `shared_basis`; `R`
is the rank of the latent, `G` the number of groups of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from headprof.compression.kernels.codes import num_groups, packed_by_channel, unpacked_by_channel
from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before
from headprof.compression.kernels.shared_basis import OF_HEADS, TURNING, RowsInBases, of_layout, times_own


@dataclass(frozen=True)
class LatentRows(RowsInBases):
    """A latent of each row, whose channels are held in codes as keys are in `quantised_rows`.

    Attributes:
        bits: of a code.
        group_size: rows of a head that have the scales of their channels in common.
        groups_before: groups of all heads before each, then of all: int32 `[N + 1]`, on the device.
        latent_codes: uint8 `[P, R * bits / 8]`.
        latent_scales: scale and zero of each group's channels, float16 `[G, 2, R]`.
        latent_basis: by which a latent is multiplied to be key and value, `[M, R, 2 * D]`.
    """

    bits: int
    group_size: int
    groups_before: Tensor
    latent_codes: Tensor
    latent_scales: Tensor
    latent_basis: Tensor

    OF_ROWS = ("latent_codes",)
    OF_BASES = ("latent_basis",)

    @classmethod
    def part_names(cls) -> tuple[str, ...]:
        return (*cls.OF_ROWS, "latent_scales", *cls.OF_BASES, OF_HEADS, *TURNING)

    @property
    def kind(self) -> tuple[object, ...]:
        rank = self.latent_basis.shape[1]
        return (type(self), self.first, rank, self.bits, self.group_size, len(self.key_frequencies))

    @classmethod
    def projected(
        cls,
        rows: Tensor,
        counts: Sequence[int],
        groups: Sequence[int],
        bases: tuple[Tensor, Tensor],
        turning: tuple[Tensor, Tensor],
        *,
        first: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
    ) -> Self:
        """Rows packed, as near as the bases and the codes allow.

        Args:
            rows: keys, turned back, and values side by side, head by head, `[P, 2 * D]`.
            counts: how many of them each head has, `N` numbers.
            groups: which bases each head has, `N` numbers.
            bases: by which rows are multiplied to be latents, `[M, 2 * D, R]`, and latents to be rows, as above.
            turning: `key_frequencies` and `key_partners`.
            first: rows of each head that come before them.
            bits, group_size: as above; `R * bits` is a multiple of 8.
            dtype: in which the basis is held.
        """
        layout = of_layout(counts, groups, rows.device)
        latents = times_own(rows, bases[0], layout[OF_HEADS].long(), layout["before"], layout["most"])
        codes, scales = packed_by_channel(latents, counts, bits=bits, group_size=group_size)
        return cls(
            first,
            **layout,
            key_frequencies=turning[0],
            key_partners=turning[1],
            bits=bits,
            group_size=group_size,
            groups_before=sums_before(num_groups(counts, group_size), rows.device),
            latent_codes=codes,
            latent_scales=scales,
            latent_basis=bases[1].to(dtype),
        )

    @classmethod
    def of_parts(
        cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int, bits: int, group_size: int
    ) -> Self:
        """Rows from their tensors, by the names that `parts` gives them; the host waits for `basis_of_head`."""
        device = parts[OF_HEADS].device
        own: dict[str, Any] = {name: parts[name] for name in cls.part_names()}
        own |= of_layout(counts, parts[OF_HEADS].tolist(), device)
        own["groups_before"] = sums_before(num_groups(counts, group_size), device)
        return cls(first, bits=bits, group_size=group_size, **own)

    def at_start(self) -> tuple[Tensor, Tensor]:
        scales = self.latent_scales, self.before, self.groups_before
        latents = unpacked_by_channel(self.latent_codes, *scales, bits=self.bits, group_size=self.group_size)
        keys, values = self.times_own(latents, self.latent_basis).chunk(2, dim=1)
        return keys, values

    def of_heads(self, heads: Sequence[int]) -> Self:
        groups = num_groups(self.counts, self.group_size)
        starts = [0, *accumulate(groups)]
        own = ragged_index([starts[head] for head in heads], [groups[head] for head in heads], self.before.device)
        return super().of_heads(heads)._with_scales(self.latent_scales[own])

    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        scales = torch.cat([each.latent_scales for each in parts if isinstance(each, LatentRows)])
        return super().joined_with(parts)._with_scales(scales)

    def _with_scales(self, scales: Tensor) -> Self:
        before = sums_before(num_groups(self.counts, self.group_size), scales.device)
        return replace(self, latent_scales=scales, groups_before=before)
