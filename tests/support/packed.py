"""Rows of which some are packed, made of rows that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.kernels.ragged_rows import RaggedRows


def packed_in(
    rows: RaggedRows, counts: Sequence[int], *, first: int = 1, bits: int = 4, group_size: int = 8
) -> RaggedRows:
    """The same storage with so many rows of each head quantised, after its `first`."""
    starts, keep = rows.bounds[:-1:2].tolist(), torch.ones(rows.size, dtype=torch.bool)
    for start, count in zip(starts, counts, strict=True):
        keep[start + first : start + first + count] = False
    given = rows.keys[~keep], rows.values[~keep], counts
    packed = QuantisedRows.quantised(*given, first=first, bits=bits, group_size=group_size)
    return replace(rows, keys=rows.keys[keep], values=rows.values[keep], packed=packed, plans={})
