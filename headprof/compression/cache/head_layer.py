"""A cache layer that is compressed from its prompt, and again while text is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.storage import SLACK, CompactRows, RowStorage
from headprof.compression.methods.importance import received_attention
from headprof.compression.methods.reduction import Rows, largest
from headprof.compression.methods.states import Judgement, PromptStates
from headprof.compression.plan import CompressionPlan
from headprof.errors import CacheError

FOLD = 16
"""Queries that are remembered, beyond those that must be at hand, before what they paid is added to the rows."""


class HeadCacheLayer(PromptLayer):
    """One layer, in which every head holds its own rows.

    Its rows come from the prompt, as soon as the layer has attended over it; later tokens are appended to every head.
    When a head has outgrown its budget by the plan's buffer, all are compressed again, by what the queries that came
    since look at. In a batch that is at the same time for all sequences, so a short one that still had room may go on
    otherwise than it would alone.
    """

    is_croppable = True

    def __init__(self, layer_idx: int, plan: CompressionPlan, slack: int = SLACK):
        super().__init__()
        self.layer_idx = layer_idx
        self.plan = plan
        self.slack = slack
        self.reset()

    def reset(self) -> None:
        self._storage: RowStorage | None = None
        self.batch_size = 0
        self.seen = 0
        self.is_initialized = False
        self.recent = RecentQueries()
        self._settled = 0  # appended rows that cannot be taken out, since what their queries paid has been folded
        self._until_compressed: int | None = None
        self.forget_prompt()

    @property
    def storage(self) -> RowStorage:
        """The rows, once there are any."""
        assert self._storage is not None
        return self._storage

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `B * K` numbers."""
        return self.storage.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this layer holds; free space, positions and remembered queries included."""
        tensors = [] if self._storage is None else self._storage.tensors
        return sum(tensor.untyped_storage().nbytes() for tensor in [*tensors, *self.recent.tensors])

    def hold(self, rows: CompactRows, appended: int = 0) -> None:
        """Hold these rows instead of what the layer held.

        Args:
            rows: of `batch_size * num_kv_heads` heads.
            appended: how many of each head's rows have come since they were last compressed.
        """
        self._storage = RowStorage(rows, self.slack, appended)
        self.is_initialized = True

    # The prompt.

    def queries_needed(self) -> int | None:
        importance = self.plan.method.importance
        return 0 if importance is None else importance.queries

    def filled(self, states: PromptStates, values: torch.Tensor) -> None:
        importance = self.plan.method.importance
        self.compress(states, values, None if importance is None else importance.judge(states))

    def compress(self, states: PromptStates, values: torch.Tensor, judgement: Judgement | None) -> None:
        """Keep of the prompt what the plan allots.

        Args:
            states: the prompt's queries and keys.
            values: the prompt's values, `[B, K, T, D]`.
            judgement: of the prompt's tokens; none keeps everything.
        """
        if judgement is None:
            judgement = Judgement(torch.zeros(states.key.shape[:3], device=self.device))
        prompt_lengths = states.valid.sum(dim=-1).tolist()
        counts = torch.stack([self.plan.allocation(length)[self.layer_idx] for length in prompt_lengths])
        self._reduce(states, values, judgement, counts.to(self.device))
        if self.plan.compresses_while_generating:
            self._remember(states)

    def _remember(self, states: PromptStates) -> None:
        """Keep the prompt's last queries if the rows will be judged again before enough new ones have come."""
        short = (self.queries_needed() or 0) - max(0, self._left(self._targets()))
        if short > 0 and not self.observers:
            query = states.query[:, :, max(0, states.query.shape[2] - short) :].clone()
            judges = states.valid[:, -query.shape[2] :]
            logits = {"scaling": states.scaling, "softcap": states.softcap, "sliding_window": states.sliding_window}
            self.recent = RecentQueries([query], [None if bool(judges.all()) else judges], logits)

    def _reduce(self, states: PromptStates, values: torch.Tensor, judgement: Judgement, counts: torch.Tensor) -> None:
        """Hold `counts` rows per head, int64 `[B, K]`, of those that were judged."""
        method = self.plan.method
        ranked, counts = method.ranked(judgement.importance, counts, states.valid)
        kept = largest(ranked, counts)
        weights = judgement.importance if judgement.weights is None else judgement.weights
        received = judgement.received if self.plan.compresses_while_generating else None
        reduced = method.reduction.reduce(Rows(states.key, values, ranked, weights, states.bias, received), kept)
        positions = states.row_positions()[kept].int()
        lengths = kept.sum(dim=-1).flatten().tolist()
        self.hold(CompactRows(reduced.keys, reduced.values, positions, lengths, reduced.bias, reduced.received))
        self._settled, self._until_compressed = 0, None

    # What is generated.

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take the keys and values of new tokens, `[B, K, Q, D]`; what comes back is marked with this layer."""
        if not self.is_initialized:
            return self.gather(key_states, value_states)
        if self.plan.compresses_while_generating:
            self._make_room(key_states.shape[2])
            self._fold()
        self._append(key_states, value_states)
        key_states.head_cache_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def observe(self, query: torch.Tensor, judges: torch.Tensor | None = None, **logits) -> None:
        """Remember the queries of the newest tokens as far as the next compression needs them.

        Args:
            query: of tokens whose keys have been appended, `[B, H, Q, D]`.
            judges: false for padding, bool `[B, Q]`; none if there is none.
            logits: `scaling`, `softcap` and `sliding_window` of this layer.
        """
        needed = self.queries_needed()
        if self.plan.compresses_while_generating and needed != 0:
            self.recent.add(query, judges, needed)
            self.recent.logits = logits

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on."""
        self.plan = plan
        self._until_compressed = None
        if not plan.compresses_while_generating:
            self.recent.forget()

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        count = key_states.shape[2]
        if count > self.storage.room:
            if self._until_compressed is None:
                self.slack = max(self.slack, 2 * count, sum(self.lengths) // (2 * len(self.lengths)))
            else:  # no more than will come before the rows are compressed again
                self.slack = max(self.slack, count, count + self._until_compressed)
            self.hold(self.storage.compact(), self.storage.appended)
        self.storage.append(key_states, value_states, self.seen)
        self.seen += count

    def _make_room(self, count: int) -> None:
        """Compress if `count` more rows would put a head beyond its budget and the buffer."""
        if self._until_compressed is None:
            self._until_compressed = self._left(self._targets())
        if count > self._until_compressed:
            targets = self._targets()
            if count > self._left(targets):
                self._compress_again(targets)
            self._until_compressed = self._left(targets)
        self._until_compressed -= count

    def _targets(self) -> torch.Tensor:
        """Rows that each head is compressed to, int64 `[K]`."""
        return self.plan.decode_allocation(self.seen)[self.layer_idx]

    def _left(self, targets: torch.Tensor) -> int:
        """How many more tokens the heads take before one of them has outgrown its target and the buffer."""
        assert self.plan.buffer is not None
        if self.plan.method.budget.spreads:  # then a layer's heads have but a sum to keep to
            heads = self.num_kv_heads
            held = max(sum(self.lengths[b * heads : (b + 1) * heads]) for b in range(self.batch_size))
            return (int(targets.sum()) + self.plan.buffer * heads - held) // heads
        allowed = (targets + self.plan.buffer).tolist() * self.batch_size
        return min(most - length for most, length in zip(allowed, self.lengths, strict=True))

    def _compress_again(self, targets: torch.Tensor) -> None:
        """Reduce every head that holds more than its target, int64 `[K]`, to that."""
        importance = self.plan.method.importance
        assert importance is not None
        self.slack = max(self.slack, self.plan.buffer or 0)
        places, own = self.storage.padded_places()
        states = self._held_states(places, own, self.recent, self.seen)
        values = self.storage.values[places].view(states.key.shape)
        counts = targets.to(self.device).expand(self.batch_size, -1)
        self._reduce(states, values, importance.judge(states), counts)
        if importance.queries is None:
            self.recent.forget()

    def _fold(self) -> None:
        """Add what remembered queries paid to the rows that received it, and forget these queries.

        The sums at the next compression are the same: rows that come later are hidden from these queries, and none
        goes before it. Those of the newest tokens stay until more come, so that these can still be taken out.
        """
        importance = self.plan.method.importance
        at_hand = None if importance is None else importance.at_hand
        if at_hand is None or len(self.recent) < at_hand + FOLD:
            return
        older, self.recent = self.recent.split(len(self.recent) - at_hand)
        places, own = self.storage.padded_places()
        states = replace(self._held_states(places, own, older, self.seen - at_hand), received=None)
        self.storage.add_received(places, received_attention(states))
        self._settled = self.storage.appended

    def _held_states(self, places: torch.Tensor, own: torch.Tensor, queries: RecentQueries, seen: int) -> PromptStates:
        """The rows in use, as many for each head as the longest has; hidden ones count as padding.

        Args:
            places, own: of the storage, `[N, longest]` (see `RowStorage.padded_places`).
            queries: that judge them.
            seen: tokens of the sequence up to the last of these queries.
        """
        shape = (self.batch_size, self.num_kv_heads, -1)
        valid, bias, received = own.view(shape), self.storage.bias, self.storage.received
        if bias is not None:
            bias = bias[places].view(shape)
            valid = valid & (bias > float("-inf"))
            bias = bias.masked_fill(~valid, 0.0)
        keys = self.storage.keys[places].view(*valid.shape, -1)
        query, judges = queries.joined()
        if query is None:
            query = keys[:, :, :0]
        return PromptStates(
            query,
            keys,
            valid,
            **queries.logits,
            positions=self.storage.positions[places].view(shape),
            places=torch.arange(seen - query.shape[2], seen, device=self.device),
            seen=seen,
            bias=bias,
            received=None if received is None else received[places].view(shape),
            judges=judges,
        )

    # What else is done with a cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            CacheError: since they came, the rows have been compressed, or what queries paid to them has been summed;
                what was lost then cannot be given back. The tokens of the last forward pass can always be taken out.
        """
        count, removable = abs(tokens_to_remove), self.storage.appended - self._settled
        if count > removable:
            raise CacheError(f"Only the last {removable} tokens can be taken out of a compressed cache, not {count}.")
        self.storage.drop_newest(count)
        self.seen -= count
        if self._until_compressed is not None:
            self._until_compressed += count
        self.recent, _ = self.recent.split(max(0, len(self.recent) - count))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence `i` go on from what sequence `beam_idx[i]` holds (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order; one may come more than once."""
        if not self.is_initialized:
            return
        chosen = torch.arange(self.batch_size)[indices.cpu()].tolist()
        heads = [b * self.num_kv_heads + head for b in chosen for head in range(self.num_kv_heads)]
        self.batch_size = len(chosen)
        self.recent.select(chosen)
        self.hold(self.storage.compact().of_heads(heads), self.storage.appended)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @classmethod
    def stacked(cls, layers: Sequence[HeadCacheLayer]) -> HeadCacheLayer:
        """One layer that holds copies of several as a batch; all must have seen the same number of tokens."""
        first = layers[0]
        if len({layer.seen for layer in layers}) != 1:
            raise ValueError("only layers that have seen the same number of tokens can be stacked")
        stack = first.empty_like(sum(layer.batch_size for layer in layers))
        if all(layer.plan is first.plan for layer in layers):
            stack.recent = RecentQueries.stacked(
                [layer.recent for layer in layers], [layer.batch_size for layer in layers]
            )
        else:  # there is no one way to compress them on
            stack.plan = replace(first.plan, buffer=None)
        appended = min(layer.storage.appended for layer in layers)
        stack.hold(CompactRows.joined([layer.storage.compact() for layer in layers]), appended)
        stack._settled = appended - min(layer.storage.appended - layer._settled for layer in layers)
        return stack

    def empty_like(self, batch_size: int) -> HeadCacheLayer:
        """A layer that has seen as many tokens of as many sequences, but holds none yet."""
        layer = HeadCacheLayer(self.layer_idx, self.plan, self.slack)
        layer.batch_size, layer.seen = batch_size, self.seen
        layer.num_kv_heads, layer.head_dim = self.num_kv_heads, self.head_dim
        layer.dtype, layer.device = self.dtype, self.device
        return layer
