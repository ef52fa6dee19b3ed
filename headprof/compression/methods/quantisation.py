"""Kept rows in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.representation import Representation, apart
from headprof.compression.rows import Rows
from headprof.errors import UsageError


@dataclass(frozen=True)
class _Quantised(Representation):
    """Rows in fewer bits ("More Tokens, Lower Precision", Zhang et al. 2024).

    arXiv 2412.12706: of equal memory, several times the rows in 4 bits serve better than fewer rows in 16. The layout
    is KIVI's (see `kernels.quantised_rows`): keys per channel in groups of a head's rows that follow one another,
    values per row, scales and zeros in 16 bits. A head's first and newest rows stay as they are, and so does a last
    group of so few rows that its scales would take what it saves. When a head is compressed again, all that it keeps is
    quantised anew.

    Attributes:
        group_size: rows of a head that share the scales of their keys.
        residual: newest rows of a head that stay as they are, if that is more than the method's `keep_last`.
    """

    bits: ClassVar[int]
    group_size: int = 32
    residual: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"A group of {self.group_size} rows has none to quantise: give group_size at least 1.")
        if self.residual < 0:
            raise UsageError(f"A head has no {self.residual} newest rows: give residual at least 0.")

    def hold(self, rows: Rows, observed: Observation, *, first: int, newest: int) -> Rows:
        lengths, device, (_, head_dim) = rows.known_lengths(), rows.keys.device, rows.keys.shape
        kept = first + max(newest, self.residual)
        least = self._least(head_dim, rows.keys.element_size())
        counts = [self._packed(length - kept, least) for length in lengths]
        if not any(counts):
            return rows
        packed, others = apart(lengths, counts, first, device)
        quantised = QuantisedRows.quantised(
            rows.keys[packed], rows.values[packed], counts, first=first, bits=self.bits, group_size=self.group_size
        )
        return replace(rows, keys=rows.keys[others], values=rows.values[others], lengths=lengths, packed=quantised)

    def fault(self, head_dim: int) -> str | None:
        if head_dim * self.bits % 8:
            return f"codes of {self.bits} bits for {head_dim} channels fill no whole bytes"
        return None

    def rows_in(self, num_bytes: float, in_full: int, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> int:
        each, scales = 2 * head_dim * bytes_per_element, _KEY_SCALES * head_dim
        plainly, in_full = int(num_bytes // each), in_full + self.residual
        left = num_bytes - in_full * each - scales  # of a last group that is not full
        packed = int(left // (self._packed_bytes(head_dim) + scales / self.group_size))
        return max(plainly, in_full + packed)

    def _packed_bytes(self, head_dim: int) -> int:
        """What a quantised row takes, without the scales of its key."""
        return 2 * head_dim * self.bits // 8 + _VALUE_SCALES

    def _least(self, head_dim: int, bytes_per_element: int) -> int:
        """Rows that a group must have for the scales of its keys not to take what it saves."""
        saved = 2 * head_dim * bytes_per_element - self._packed_bytes(head_dim)
        return _KEY_SCALES * head_dim // saved + 1 if saved > 0 else self.group_size + 1

    def _packed(self, count: int, least: int) -> int:
        """Of so many rows of a head that may be quantised those that are, the first of them."""
        if count < 1 or least > self.group_size:
            return 0
        rest = count % self.group_size
        return count if rest >= least else count - rest


_KEY_SCALES, _VALUE_SCALES = 4, 4
"""Bytes of a scale and a zero: of each channel of a group, of each row."""


@dataclass(frozen=True)
class Int8(_Quantised):
    """Rows in 8 bits (see `_Quantised`)."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4(_Quantised):
    """Rows in 4 bits (see `_Quantised`)."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Int2(_Quantised):
    """Rows in 2 bits (see `_Quantised`): a warning, since most of what they say is lost."""

    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2
