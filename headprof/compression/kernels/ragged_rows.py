"""What attention over a ragged cache, in which every head has kept its own number of tokens, is asked.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `Q` new tokens, `D` head
dimension. A head is one (sequence, KV head) pair, `b * K + k`, and there are `N = B * K` of them. The last `Q` rows of
every head belong to the new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows


class WorkPlan(Protocol):
    """How a backend shares out its work over one storage of rows, kept on the device."""

    def refresh(self) -> None:
        """Make it anew in place, by the rooms that the bounds say now; nothing is read back to the host."""
        ...


@dataclass(frozen=True)
class RaggedRows:
    """The rows that one layer's heads hold, as they lie on the device.

    Each head has a room: its rows in use, and the free space behind them. Rows are appended (`append_rows`) without the
    host learning of it, so that of the numbers here none changes from token to token but `in_use`.

    Attributes:
        keys, values: `[rows, D]`, one head after the other in the order `b * K + k`, with free space after each; where
            some are packed, those of the others alone, `[rows - P, D]`.
        positions: each row's position in the sequence, int32 `[rows]`, ascending within a head.
        bounds: first row and end (exclusive) of each head's rows in use, alternating, then the number of rows in the
            storage: int32 `[2 * N + 1]` on the rows' device. Head `h`'s room goes from the first row of `h` to that of
            `h + 1`.
        longest: at least the most rows that one head ever has in use here, such as the largest room.
        uniform: rows of storage per head if all heads have equally many and equally many of them in use, else 0.
        bias: added to the logits, float32 `[rows]` (the log mass of merged rows; -inf hides a row), or `None`.
        received: attention that each row has received, float32 `[rows]`, or `None`. Attention does not ask for it.
        next_positions: position of each head's next token, int32 `[N]`, or `None` where nothing is appended.
        in_use: most rows that one head has in use now, or `None` if the host does not know.
        packed: rows that are held in another form (see `packed_rows`), or `None`.
        plans: work plans that backends have made for this storage, by their names. Whoever moves the heads' rooms calls
            `refresh` on each of them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bounds: Tensor
    longest: int
    uniform: int
    bias: Tensor | None = None
    received: Tensor | None = None
    next_positions: Tensor | None = None
    in_use: int | None = None
    packed: PackedRows | None = None
    plans: dict[str, WorkPlan] = field(default_factory=dict)

    @property
    def num_heads(self) -> int:
        """`N`."""
        return len(self.bounds) // 2

    @property
    def size(self) -> int:
        """Rows of the storage, in use or not."""
        return len(self.positions)

    def unpacked(self) -> RaggedRows:
        """The same rows with all keys and values at hand: copies, where some are packed."""
        if self.packed is None:
            return self
        keys, values = self.packed.among(self.keys, self.values, self.positions, self.bounds[0:-1:2])
        return replace(self, keys=keys, values=values, packed=None)

    def without_newest(self, count: int) -> RaggedRows:
        """The same rows but for the last `count` of every head."""
        if not count:
            return self
        bounds = self.bounds.clone()
        bounds[1::2] -= count
        in_use = None if self.in_use is None else self.in_use - count
        return replace(self, bounds=bounds, in_use=in_use, next_positions=None, plans={})

    @property
    def most(self) -> int:
        """At least the most rows that one head has in use now: that number itself where the host knows it."""
        return self.longest if self.in_use is None else self.in_use


@dataclass(slots=True)
class Request:
    """The arguments of one call of `ragged_attention`."""

    query: Tensor
    rows: RaggedRows
    num_kv_heads: int
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def num_heads(self) -> int:
        """`N`."""
        return self.query.shape[0] * self.num_kv_heads

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.num_kv_heads

    def by_head(self) -> Tensor:
        """Each head's queries: `[N, 1, g, D]` for one new token, whose group reads rows once, else `[N, g, Q, D]`."""
        if self.num_queries == 1:
            return self.query.reshape(self.num_heads, 1, self.group_size, self.head_dim)
        return self.query.reshape(self.num_heads, self.group_size, self.num_queries, self.head_dim)

    def sinks_by_head(self) -> Tensor | None:
        """Each head's sinks, shaped to join the logits of `by_head`: `[N, 1, g, 1]` or `[N, g, 1, 1]`."""
        if self.sinks is None:
            return None
        shape = (1, self.group_size, 1) if self.num_queries == 1 else (self.group_size, 1, 1)
        return self.sinks.float().view(self.num_kv_heads, *shape).repeat(self.query.shape[0], 1, 1, 1)

    def in_output_order(self, output: Tensor) -> Tensor:
        """What was computed for `by_head`, as `[B, Q, H, D]`."""
        return output.reshape(self.query.shape).transpose(1, 2)
