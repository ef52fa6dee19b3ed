"""Kept rows as latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headprof.compression.kernels.codes import num_groups
from headprof.compression.kernels.latent_rows import LatentRows
from headprof.compression.methods.directions import leading_directions
from headprof.compression.methods.shared_basis import Packing, SharedBasis
from headprof.errors import UsageError


@dataclass(frozen=True)
class Latent(SharedBasis):
    """One latent for key and value, in few bits (after "Lossless KV Cache Compression to 2%", Yang et al. 2024).

    arXiv 2410.15252 (CLLA) trains a model whose layers, in groups, share one latent of each token, and holds it in 4
    bits. Of that the latent of key and value together and its bits are kept here, without training: the latent is what
    the packed rows are in their own leading singular vectors. It is not shared over layers, nor over heads, since each
    keeps other tokens; the basis is shared by heads.

    Attributes:
        rank: of the latent, as a share of the dimensions of key and value together; above 0, at most 1.
        keys: how many times as much a share of keys' squares that is left out counts as one of values'. Most of a key
            is alike in all of them, so that a small share of it may be all that tells them apart.
        bits: of a number of the latent: 8, 4 or 2.
        group_size: rows of a head that share the scales of their latents.
    """

    name: ClassVar[str] = "latent"
    rank: float = 0.75
    keys: float = 10.0
    bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rank <= 1:
            raise UsageError("A latent has some of the dimensions of key and value: give rank above 0, to 1.")
        if not 0 < self.keys < float("inf"):
            raise UsageError("Both keys and values count: give keys a number above 0.")
        if self.bits not in (2, 4, 8) or self.group_size < 1:
            raise UsageError(
                "Latents are held in 8, 4 or 2 bits, in groups: give bits of these, and group_size at least 1."
            )

    def _packed_in(self, num_bytes: float, head_dim: int, bytes_per_element: int) -> int:
        rank = self._rank(head_dim)
        num_bytes -= _SCALES * rank  # of a last group that is not full
        return int(num_bytes // (rank * self.bits / 8 + _SCALES * rank / self.group_size))

    def _rank(self, head_dim: int) -> int:
        """Such that codes fill whole bytes."""
        step = 8 // self.bits
        return max(step, round(2 * self.rank * head_dim / step) * step)

    def _basis_numbers(self, head_dim: int) -> int:
        return 2 * head_dim * self._rank(head_dim)

    def _packed_bytes(self, count: int, head_dim: int, bytes_per_element: int) -> int:
        rank = self._rank(head_dim)
        return count * (rank * self.bits // 8) + num_groups([count], self.group_size)[0] * _SCALES * rank

    def _packed(self, packing: Packing) -> LatentRows:
        rows = torch.cat([packing.keys, packing.values.float()], dim=1)
        return LatentRows.projected(
            rows,
            packing.sharing.counts,
            packing.sharing.groups,
            self._bases(packing, rows),
            packing.turning,
            first=packing.first,
            bits=self.bits,
            group_size=self.group_size,
            dtype=packing.dtype,
        )

    def _bases(self, packing: Packing, rows: Tensor) -> tuple[Tensor, Tensor]:
        """By which rows `[P, 2 * D]` become latents and these rows again, `[M, 2 * D, R]` and `[M, R, 2 * D]`."""
        weights = torch.cat([packing.key_weights, torch.ones_like(packing.key_weights)], dim=1)  # [M, 2 * D]
        products = packing.grams(rows) * weights[:, :, None] * weights[:, None]
        squares = products.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(dim=2)  # of keys, of values
        mean = squares * (len(packing.sharing.bases) / len(rows))
        mean[:, 0] /= self.keys
        sizes = mean.clamp(min=torch.finfo(torch.float32).tiny).sqrt().repeat_interleave(rows.shape[1] // 2, dim=1)
        directions = leading_directions(products / sizes[:, :, None] / sizes[:, None], self._rank(rows.shape[1] // 2))
        scales = (weights / sizes)[:, None].float()
        return (directions * scales).transpose(1, 2), directions / scales


_SCALES = 4
"""Bytes of a scale and a zero of a channel of a group."""
