"""Kept rows in fewer dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headprof.compression.kernels.low_rank_rows import LowRankRows
from headprof.compression.methods.directions import leading_directions
from headprof.compression.methods.shared_basis import Packing, SharedBasis
from headprof.errors import UsageError


@dataclass(frozen=True)
class LowRank(SharedBasis):
    """Keys and values in a basis each ("Effectively Compress KV Heads for LLM", Yu et al. 2024).

    arXiv 2406.07056, section 3: what the KV heads of a layer cache lies near a space of few dimensions. There the basis
    comes from calibration texts and goes into the weights, which are trained on. Here nothing is trained or calibrated:
    it is that of the packed rows themselves, and is held with them. When a head is compressed again, all that it keeps
    is packed anew.

    Attributes:
        key_rank, value_rank: rank of a basis, as a share of the head dimension; above 0, at most 1.
    """

    name: ClassVar[str] = "lowrank"
    key_rank: float = 0.375
    value_rank: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.key_rank <= 1 and 0 < self.value_rank <= 1):
            raise UsageError("Rows are held in some of their dimensions: give key_rank and value_rank above 0, to 1.")

    def _ranks(self, head_dim: int) -> tuple[int, int]:
        """Of keys and of values."""
        return max(1, round(self.key_rank * head_dim)), max(1, round(self.value_rank * head_dim))

    def _basis_numbers(self, head_dim: int) -> int:
        return sum(self._ranks(head_dim)) * head_dim

    def _packed_bytes(self, count: int, head_dim: int, bytes_per_element: int) -> int:
        return count * sum(self._ranks(head_dim)) * bytes_per_element

    def _packed_in(self, num_bytes: float, head_dim: int, bytes_per_element: int) -> int:
        return int(num_bytes // self._packed_bytes(1, head_dim, bytes_per_element))

    def _packed(self, packing: Packing) -> LowRankRows:
        key_rank, value_rank = self._ranks(packing.keys.shape[1])
        weights = packing.key_weights
        scaled = packing.grams(packing.keys) * weights[:, :, None] * weights[:, None]
        of_keys = leading_directions(scaled, key_rank)
        of_values = leading_directions(packing.grams(packing.values), value_rank)
        return LowRankRows.projected(
            packing.keys,
            packing.values,
            packing.sharing.counts,
            packing.sharing.groups,
            ((of_keys * weights[:, None]).transpose(1, 2), of_values.transpose(1, 2)),
            (of_keys / weights[:, None], of_values),
            packing.turning,
            first=packing.first,
            dtype=packing.dtype,
        )
