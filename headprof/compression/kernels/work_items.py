"""The work of attention over ragged rows in pieces of about one size: heads of unequal length keep a device busy.

Shapes as in `ragged_rows`; `M` is the number of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import RaggedRows

GRAIN = 128
"""Rows of an item are a multiple of this, so that tiles of any size fill it."""

_MAX_ROWS = 768
_MAX_PARTS = 64
_ITEMS_PER_PROCESSOR = 3


@dataclass(frozen=True)
class WorkItems:
    """Up to `item_rows` rows of one head each. A head has as many items as its room may need, one at least.

    Attributes:
        bounds: of the rows (see `RaggedRows`).
        table: int32 `[2 * M + N]`: the head of each item, then which part of its head it is, then a count for each
            head, 0 except while a kernel runs. The parts of a head are neighbours, and heads with large ones come
            first, so that what is begun last is soon done. `M` is the most that rooms of so many rows can need; items
            that these do not need have the head -1.
        item_rows: a multiple of `GRAIN`.
    """

    bounds: Tensor
    table: Tensor
    item_rows: int

    @classmethod
    def of(cls, rows: RaggedRows, item_rows: int | None = None) -> WorkItems:
        """Made without a read back to the host.

        Args:
            item_rows: `None` goes by the device's size.
        """
        item_rows = item_rows or rows_per_item(rows)
        with torch.inference_mode(False):
            table = rows.bounds.new_zeros(2 * _most_items(rows, item_rows) + rows.num_heads)
        items = cls(rows.bounds, table, item_rows)
        items.refresh()
        return items

    @property
    def num_heads(self) -> int:
        """`N`."""
        return len(self.bounds) // 2

    @property
    def num_items(self) -> int:
        """`M`."""
        return (len(self.table) - self.num_heads) // 2

    @property
    def counts(self) -> Tensor:
        """Each head's count, `[N]`."""
        return self.table[2 * self.num_items :]

    def refresh(self) -> None:
        """Deal out the rooms that the bounds say now."""
        rooms = self.bounds[::2].diff()
        parts = ((rooms - 1) // self.item_rows + 1).clamp_(min=1)
        heads = (rooms // parts).argsort(descending=True, stable=True)
        parts = parts[heads]
        stops = parts.cumsum(0)
        item = torch.arange(self.num_items, device=stops.device)
        place = torch.searchsorted(stops, item, right=True)
        known = place.clamp(max=self.num_heads - 1)
        of_items = torch.stack([heads[known].masked_fill(place == self.num_heads, -1), item - (stops - parts)[known]])
        self.table[: 2 * self.num_items].view(2, -1).copy_(of_items)


def rows_per_item(rows: RaggedRows) -> int:
    """Few enough that every processor gets several items, but not so few that heads have more parts than are joined
    quickly. It goes by what never changes in a storage."""
    total, processors = rows.size, num_processors(rows.keys.device)
    share = min(total // (processors * _ITEMS_PER_PROCESSOR), _MAX_ROWS)
    return -(-max(share, total // rows.num_heads // _MAX_PARTS, 1) // GRAIN) * GRAIN


def _most_items(rows: RaggedRows, item_rows: int) -> int:
    return rows.size // item_rows + rows.num_heads


@lru_cache(maxsize=16)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 of any other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
