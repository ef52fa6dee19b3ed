"""What attention over a ragged cache, in which every head has kept its own number of tokens, is asked.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `Q` new tokens, `D` head
dimension. A head is one (sequence, KV head) pair, `b * K + k`, and there are `N = B * K` of them. The last `Q` rows of
every head belong to the new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RaggedRows:
    """The rows that one layer's heads hold.

    Attributes:
        keys, values: `[rows, D]`, one head after the other in the order `b * K + k`, with free space after each.
        positions: each row's position in the sequence, int32 `[rows]`, ascending within a head.
        bounds: first row and end (exclusive) of each head's rows in use, alternating, then the number of rows in the
            storage: int32 `[2 * N + 1]` on the rows' device.
        longest: most rows that one head has in use.
        uniform: rows of storage per head if all heads have equally many and equally many of them in use, else 0.
        bias: added to the logits, float32 `[rows]` (the log mass of merged rows; -inf hides a row), or `None`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bounds: Tensor
    longest: int
    uniform: int
    bias: Tensor | None = None


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
