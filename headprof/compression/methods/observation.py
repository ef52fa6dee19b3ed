"""What an importance is given: a layer's newest queries, the rows they observe, and the layer itself.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `N` queries, `T` prompt
tokens or held rows, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.constants import newer_queries
from headprof.compression.rows import Rows
from headprof.compression.segments import segment_positions
from headprof.models.rotary import Rotary
from headprof.models.tensor_parallel import WHOLE, HeadShard

NOISE = 2.0**-20
"""Scores that differ by so small a share of themselves are equal: a sum of a dozen numbers varies by less."""


@dataclass(frozen=True)
class AttentionLayer:
    """How a layer attends.

    Attributes:
        scaling: factor on the attention logits.
        softcap: bound on the logits (Gemma-2), or `None`.
        sliding_window: tokens that a query sees, or `None` for all.
        rotary: the layer's rotary embedding, or `None` where it cannot be had.
        module: the attention module; `None` before the first forward pass over a document that was loaded, unless its
            method judges with norms.
        shard: which of the layer's heads this process has.
    """

    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    rotary: Rotary | None = None
    module: torch.nn.Module | None = None
    shard: HeadShard = WHOLE


@dataclass(frozen=True)
class Tokens:
    """Which of a prompt's tokens so far are no padding.

    Attributes:
        valid: bool `[B, T]`; a layer with a sliding window need not mark those that no later query can see.
        lengths: how many each sequence has, also those that nobody can see any more, `B` numbers; `None` where the host
            does not know.
        visible: how many of each sequence are marked, `B` numbers; `None` where the host does not know.
        own: which of the newest chunk's are no padding, bool `[B, Q]`, where the host does not know `lengths`, or the
            layer has a sliding window and the prompt ends with observers.
    """

    valid: Tensor
    lengths: Sequence[int] | None = None
    visible: Sequence[int] | None = None
    own: Tensor | None = None

    @property
    def padded(self) -> bool:
        """Whether some tokens may not be marked."""
        return self.visible is None or min(self.visible) < self.valid.shape[1]

    def counted(self, own: Sequence[Tensor]) -> Tokens:
        """The same with all numbers, for which the host waits where it does not know them.

        Args:
            own: of all chunks, where that is not known.
        """
        if self.lengths is not None and self.visible is not None:
            return self
        return Tokens(self.valid, torch.cat(list(own), dim=1).sum(dim=-1).tolist(), self.valid.sum(dim=-1).tolist())

    def without_last(self, count: int) -> Tokens:
        """The same tokens, but for the last of all sequences, which none of them counts."""
        if not count or self.lengths is None or self.visible is None:
            return self
        kept = torch.arange(self.valid.shape[1], device=self.valid.device) < self.valid.shape[1] - count
        lengths, visible = ([max(0, each - count) for each in known] for known in (self.lengths, self.visible))
        return Tokens(self.valid & kept, lengths, visible)

    def last(self, end: int, window: int) -> Tokens:
        """Of these tokens, those among the last `window` before token `end`."""
        if window >= end:
            return self
        marked = torch.arange(self.valid.shape[1], device=self.valid.device) >= end - window
        whole = self.lengths is not None and min(self.lengths) == end
        return Tokens(self.valid & marked, self.lengths, [window] * len(self.valid) if whole else None)


@dataclass(frozen=True)
class Observation:
    """One layer's newest queries, and the rows they observe: a whole prompt's, or those that its heads still hold.

    Attributes:
        queries: of the last `N` tokens, rotated to their positions, `[B, H, N, D]`; an importance says how many it
            needs.
        rows: a block, `[B, K, T, ...]`.
        valid: false where there is no row (padding), bool `[B, T]`, or `[B, K, T]` if heads differ.
        layer: how it attends.
        is_prompt: whether row `t` of every head is token `t` of the sequence; if not, a head holds some of them.
        query_positions: each query's position in the sequence, int64 `[N]`; `None` for the last `N` of a prompt.
        query_valid: false for queries that do not count (padding), bool `[B, N]`; `None` if all do.
        seen: tokens of the sequence so far; `None` for `T`.
        padded: whether some rows may be padding, as far as the host knows.
        lengths, visible: of a prompt's sequences, as in `Tokens`; `None` where the host does not know.
        attended: which of a prompt's tokens are no padding, with the last ones that only observe and are not `valid`;
            `None` if there are none of these. A sliding window is left out of account.
        segments: tokens of each segment of a prompt's last ones, which only observe: a segment's queries see what is
            before all segments, and their own segment up to themselves. Their positions follow what is before all
            segments, and nothing is padding. Empty where each query sees all before it.
        query_norms: norm of the hidden state that each query of a prompt was made from, as the attention module was
            given it, float32 `[B, N]`; `None` where nobody has asked, and for rows that are held.
        ids: of the sequence's tokens so far, int64 `[B, seen]`; `None` where they are not known, or nobody asks.
        shared: what several importances need of this, computed once.
    """

    queries: Tensor
    rows: Rows
    valid: Tensor
    layer: AttentionLayer
    is_prompt: bool = True
    query_positions: Tensor | None = None
    query_valid: Tensor | None = None
    seen: int | None = None
    padded: bool = True
    lengths: Sequence[int] | None = None
    visible: Sequence[int] | None = None
    attended: Tokens | None = None
    segments: tuple[int, ...] = ()
    query_norms: Tensor | None = None
    ids: Tensor | None = None
    shared: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def keys(self) -> Tensor:
        """`[B, K, T, D]`, rotated to their positions."""
        return self.rows.keys

    @property
    def values(self) -> Tensor:
        """`[B, K, T, D]`."""
        return self.rows.values

    @property
    def positions(self) -> Tensor:
        """Each row's position in the sequence, int `[B, K, T]`."""
        return self.rows.positions

    @property
    def num_seen(self) -> int:
        """Tokens of the sequence so far."""
        return self.rows.keys.shape[2] if self.seen is None else self.seen

    def ids_of_rows(self) -> Tensor | None:
        """The id of each row's token, int64 `[B, K, T]`, any for padding; `None` where they are not known."""
        if self.ids is None:
            return None
        places = self.positions.long().clamp(0, self.ids.shape[1] - 1)
        return self.ids.to(places.device, non_blocking=True)[:, None].expand(-1, places.shape[1], -1).gather(2, places)

    def positions_of_queries(self) -> Tensor:
        """Each query's position in the sequence, int64 `[N]`."""
        if self.query_positions is not None:
            return self.query_positions
        num_tokens = self.keys.shape[2]
        if self.segments:
            return segment_positions(num_tokens, self.segments, self.keys.device)[0, -self.queries.shape[2] :]
        return torch.arange(num_tokens - self.queries.shape[2], num_tokens, device=self.keys.device)

    @property
    def whole_and_causal(self) -> bool:
        """Whether each query sees all rows up to its own, and the host knows that."""
        return (
            self.is_prompt
            and not self.padded
            and self.query_valid is None
            and self.layer.sliding_window is None
            and "bias" not in self.rows.columns
        )

    def valid_rows(self) -> Tensor:
        """Which rows each head has, bool `[B, K, T]`."""
        return per_head(self.valid).expand(self.keys.shape[:3])

    def attention(self, start: int, stop: int) -> Tensor:
        """Softmax attention of a prompt's tokens `start` to before `stop`, float32 `[B, K, g, stop - start, stop]`.

        Tokens from `stop` on are left out, since none of these queries sees them. A query that sees nothing but padding
        has a row of zeros.

        Raises:
            ValueError: some of these queries are not held.
        """
        num_tokens = self.keys.shape[2]
        first = num_tokens - self.queries.shape[2]
        if not first <= start <= stop <= num_tokens:
            raise ValueError(f"queries {start} to {stop} asked for, {first} to {num_tokens} held")
        return self._attention(start - first, stop - first, stop)

    def last_attention(self, count: int) -> Tensor:
        """Softmax attention of the last `count` queries, or of all if they are fewer, float32 `[B, K, g, count, T]`.

        Raises:
            ValueError: some of these queries of a prompt are not held.
        """
        num_rows, held = self.keys.shape[2], self.queries.shape[2]
        if self.is_prompt:
            return self.attention(num_rows - min(count, num_rows), num_rows)
        return self._attention(held - min(count, held), held, num_rows)

    def valid_queries(self) -> Tensor | None:
        """Which of the held queries are no padding, bool `[B, N]`; `None` if all are none."""
        if not (self.is_prompt and self.padded):
            return self.query_valid
        tokens = self.valid if self.attended is None else self.attended.valid
        return tokens[:, tokens.shape[1] - self.queries.shape[2] :]

    def of_queries(self, index: Tensor) -> Observation:
        """The same with some of the held queries only, in their order.

        Args:
            index: which of them, int64 `[n]`, on their device.
        """
        valid = self.valid_queries()
        return replace(
            self,
            queries=self.queries[:, :, index],
            query_positions=self.positions_of_queries()[index],
            query_valid=None if valid is None else valid[:, index],
            padded=True,  # they are no longer the last ones, one after the other
            shared={},
        )

    def attention_of(self, first: int, last: int) -> Tensor:
        """Softmax attention of the held queries `first` to before `last`, float32 `[B, K, g, last - first, T]`.

        A query that sees nothing but padding has a row of zeros.
        """
        return self._attention(first, last, self.keys.shape[2])

    def _attention(self, first: int, last: int, num_keys: int) -> Tensor:
        """Softmax attention of held queries `first` to before `last` over the first `num_keys` rows."""
        batch, num_kv_heads, _, head_dim = self.keys.shape
        group_size, count = self.queries.shape[1] // num_kv_heads, last - first
        queries = self.queries[:, :, first:last].float() * self.layer.scaling
        queries = queries.reshape(batch, num_kv_heads, group_size * count, head_dim)
        logits = queries @ self.keys[:, :, :num_keys].float().transpose(2, 3)  # [B, K, g * count, num_keys]
        if self.layer.softcap is not None:
            logits = self.layer.softcap * torch.tanh(logits / self.layer.softcap)
        logits = logits.reshape(batch, num_kv_heads, group_size, count, num_keys)
        if self.whole_and_causal:
            newest = logits[..., num_keys - count :]
            newest.masked_fill_(newer_queries(count, logits.device), float("-inf"))
            return logits.softmax(dim=-1)
        if (bias := self.rows.columns.get("bias")) is not None:
            logits = logits + bias[:, :, None, None, :num_keys]
        visible = self._visible(self.positions_of_queries()[first:last, None], num_keys)
        attention = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1).nan_to_num_(nan=0.0)
        if self.query_valid is not None:
            attention *= self.query_valid[:, None, None, first:last, None]
        return attention

    def _visible(self, of_queries: Tensor, num_keys: int) -> Tensor:
        """Which of the first rows queries at positions `[count, 1]` see, bool `[B, K or 1, 1, count, num_keys]`."""
        if self.is_prompt:  # alike in all heads
            positions = torch.arange(num_keys, device=self.keys.device)[None, None, None]
        else:
            positions = self.positions[:, :, None, :num_keys]
        visible = positions <= of_queries  # [B or 1, K or 1, count, num_keys]
        if self.layer.sliding_window is not None:
            visible &= positions > of_queries - self.layer.sliding_window
        return (visible & per_head(self.valid)[:, :, None, :num_keys])[:, :, None]


def per_head(valid: Tensor) -> Tensor:
    """`[B, T]` as `[B, 1, T]`; `[B, K, T]` as it is."""
    return valid[:, None] if valid.ndim == 2 else valid


@dataclass(frozen=True)
class Assessment:
    """What an importance says of a layer's rows.

    Attributes:
        importance: of each row, float32 `[B, K, T]`; higher is kept; any finite value for padding.
        weights: attention that each row can expect, at least 0, by which rows that merge are weighed, `[B, K, T]`;
            `None` if the importance serves.
        columns: what the rows are to carry on for the next time, by names of `COLUMNS`, `[B, K, T]` each.
    """

    importance: Tensor
    weights: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
