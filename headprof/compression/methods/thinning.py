"""Kept rows whose keys have fewer channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from headprof.compression.kernels.thinned_rows import ThinnedRows
from headprof.compression.methods.class_sums import add_by_class
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.query_squares import query_squares
from headprof.compression.methods.representation import Representation, apart
from headprof.compression.rows import Rows
from headprof.errors import UsageError


@dataclass(frozen=True)
class Thin(Representation):
    """Keys without the channels that queries make least of (ThinK, Xu et al. 2024, arXiv 2407.21018, section 3).

    Each KV head drops a share of its key channels, those of the least `mean(q ** 2) * mean(k ** 2)`, over the newest
    queries of its group and over the rows that lose them. Values stay whole, as do a head's first and newest rows. When
    a head is compressed again, channels that its rows have lost count as 0. Without a query at hand keys alone decide.

    Attributes:
        dropped: share of the key channels that go; above 0 and below 1.
        judges: newest queries that are asked.
        residual: newest rows of a head that stay whole, if that is more than the method's `keep_last`.
    """

    name: ClassVar[str] = "thin"
    dropped: float = 0.4
    judges: int = 32
    residual: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.dropped < 1:
            raise UsageError(f"A share of {self.dropped} of the channels cannot go: give dropped above 0 and below 1.")
        if self.judges < 1 or self.residual < 0:
            raise UsageError("Channels are judged by queries: give judges at least 1, and residual at least 0.")

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.judges

    def hold(self, rows: Rows, observed: Observation, *, first: int, newest: int) -> Rows:
        lengths, head_dim, element = rows.known_lengths(), rows.keys.shape[1], rows.keys.element_size()
        left = self._left(head_dim)
        least = _CHANNEL * left // ((head_dim - left) * element) + 1 if left < head_dim else max(lengths) + 1
        free = [length - first - max(newest, self.residual) for length in lengths]
        counts = [count if count >= least else 0 for count in free]
        if not any(counts):
            return rows
        packed, others = apart(lengths, counts, first, rows.keys.device)
        keys = rows.keys[packed]
        channels = self._channels(keys, counts, observed, left)
        thinned = ThinnedRows.thinned(keys, rows.values[packed], counts, channels, first=first)
        return replace(rows, keys=rows.keys[others], values=rows.values[others], lengths=lengths, packed=thinned)

    def rows_in(self, num_bytes: float, in_full: int, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> int:
        left, in_full, each = self._left(head_dim), in_full + self.residual, 2 * head_dim * bytes_per_element
        for_rows = num_bytes - _CHANNEL * left
        packed = int((for_rows - in_full * each) // ((head_dim + left) * bytes_per_element))
        return max(int(for_rows // each), in_full + packed)

    def _left(self, head_dim: int) -> int:
        """Channels that are left."""
        return max(1, head_dim - int(self.dropped * head_dim))

    def _channels(self, keys: Tensor, counts: list[int], observed: Observation, left: int) -> Tensor:
        """The channels that each head keeps, ascending, int64 `[N, left]`; `keys` are those that lose the others."""
        sizes = torch.tensor(counts).to(keys.device, non_blocking=True)
        head = torch.arange(len(counts), device=keys.device).repeat_interleave(sizes, output_size=len(keys))
        sums = torch.zeros(1, len(counts), keys.shape[1], device=keys.device)
        sums = add_by_class(sums, head[None], keys.float().square()[None])[0]
        scores = sums / sizes.clamp(min=1)[:, None] * query_squares(observed, self.judges)
        return scores.argsort(dim=-1, descending=True, stable=True)[:, :left].sort(dim=-1).values


_CHANNEL = 2
"""Bytes of a channel's number."""
