"""A key/value cache in which every KV head holds its own number of rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from headprof.compression.attention import RaggedRows
from headprof.compression.importance import Importance, Judgement, PromptStates
from headprof.compression.plan import CompressionPlan
from headprof.compression.recent import RecentQueries
from headprof.compression.reduction import Rows, largest
from headprof.errors import CacheError

SLACK = 16
"""Rows of free space after each head, so that an appended token does not move the others."""


@dataclass(frozen=True)
class CompactRows:
    """The rows that a layer's heads hold, one head after the other without gaps.

    Attributes:
        keys, values: `[rows, D]`.
        positions: each row's place in the sequence, int32 `[rows]`.
        lengths: rows of each head, `B * K` numbers.
        bias: added to the attention logits, float32 `[rows]`, or none.
        received: attention that each row has received so far, float32 `[rows]`, or none (see `Judgement.received`).
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    bias: torch.Tensor | None = None
    received: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[CompactRows]) -> CompactRows:
        """The heads of several, in order."""

        def together(name: str) -> torch.Tensor | None:
            given = [getattr(part, name) for part in parts]
            if all(each is None for each in given):
                return None
            zeros = [part.keys.new_zeros(len(part.keys), dtype=torch.float32) for part in parts]
            return torch.cat([zero if each is None else each for each, zero in zip(given, zeros, strict=True)])

        return cls(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.positions for part in parts]),
            [length for part in parts for length in part.lengths],
            together("bias"),
            together("received"),
        )

    def of_heads(self, heads: Sequence[int]) -> CompactRows:
        """The rows of these heads, in this order; a head may come more than once."""
        starts = [0, *accumulate(self.lengths)]
        lengths = [self.lengths[head] for head in heads]
        rows = _places([starts[head] for head in heads], lengths, self.keys.device)
        return CompactRows(
            self.keys[rows], self.values[rows], self.positions[rows], lengths, *_some(rows, self.bias, self.received)
        )


def _places(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`start, start + 1, ...` for each head, one head after the other, int64."""
    counts = torch.tensor(lengths)
    shifts = torch.tensor(starts) - (counts.cumsum(0) - counts)
    places = torch.arange(sum(lengths)) + shifts.repeat_interleave(counts)
    return places.to(device)


def _some(rows: torch.Tensor, *columns: torch.Tensor | None) -> list[torch.Tensor | None]:
    """These rows of each column that there is."""
    return [None if column is None else column[rows] for column in columns]


def outside_context() -> CacheError:
    """What to say when the model attends without looking at our rows."""
    return CacheError("A HeadCache works only inside `with headprof.compressed(model, ...)`: open it first.")


class PromptLayer(CacheLayerMixin):
    """A cache layer on its way through a prompt: it sees the layer's queries, keys and values, then is `filled`.

    A prompt may come in several chunks, one after the other through this layer before the next layer begins; then
    `expected` says how many tokens belong to it. Of these the last `observers` only judge the others: they are not
    kept, and do not count as seen.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.forget_prompt()

    def forget_prompt(self) -> None:
        self.expected = 0
        self.observers = 0
        self._whole: list[torch.Tensor] = []  # room for the keys and the values of a prompt in chunks
        self._queries: list[torch.Tensor] = []

    def queries_needed(self) -> int | None:
        """How many of the prompt's last queries `filled` wants; none for all."""
        raise NotImplementedError

    def filled(self, states: PromptStates, values: torch.Tensor) -> None:
        """Take what is to be kept of a prompt.

        Args:
            states: the prompt's last queries, and its keys.
            values: the prompt's values, `[B, K, T, D]`.
        """
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch_size, self.num_kv_heads, _, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device

    def gather(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's keys and values so far, `[B, K, tokens, D]`; the keys are marked with this layer.

        The mark is how the attention function finds the layer: a model passes what it gets here on to it untouched.

        Raises:
            CacheError: the prompt was attended over without this package's attention.
        """
        keys, values = self._gathered(key_states, value_states)
        keys.head_cache_layer = self  # type: ignore[attr-defined]
        return keys, values

    def _gathered(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = self.seen, self.seen + key_states.shape[2]
        if start and start >= self.expected:
            raise outside_context()
        self.seen = stop
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            if stop >= self.expected:
                return key_states, value_states
            room = (self.batch_size, self.num_kv_heads, self.expected, self.head_dim)
            self._whole = [key_states.new_empty(room), value_states.new_empty(room)]
        for whole, part in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, start:stop] = part
        keys, values = self._whole
        return keys[:, :, :stop], values[:, :, :stop]

    def attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor, **logits
    ) -> None:
        """Compress the layer once the attention over its whole prompt is done.

        Args:
            query: of the newest chunk, `[B, H, Q, D]`.
            key, value: of the prompt so far, `[B, K, tokens, D]`.
            valid: which of these tokens are no padding, bool `[B, tokens]`.
            logits: `scaling`, `softcap` and `sliding_window` of this layer.
        """
        needed = self.queries_needed()
        last = query if needed is None else query[:, :, query.shape[2] - min(needed, query.shape[2]) :]
        if self.seen < self.expected:
            self._queries.append(last.clone())
            return
        queries = torch.cat([*self._queries, last], dim=2)
        if needed is not None:
            queries = queries[:, :, queries.shape[2] - min(needed, queries.shape[2]) :]
        if self.observers:
            valid = valid.clone()
            valid[:, -self.observers :] = False
            self.seen -= self.observers
        self.filled(PromptStates(queries, key, valid, **logits), value)
        self.forget_prompt()

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


class HeadCacheLayer(PromptLayer):
    """One layer: flat rows `[rows, D]`, one head after the other, each with some free space behind it.

    Its rows come from the prompt, as soon as the layer has attended over it; later tokens are appended to every head.
    When a head has outgrown its budget by the plan's buffer, all are compressed again, by what the queries that came
    since look at.
    """

    is_croppable = True

    def __init__(self, layer_idx: int, plan: CompressionPlan, slack: int = SLACK):
        super().__init__()
        self.layer_idx = layer_idx
        self.plan = plan
        self.slack = slack
        self.reset()

    def reset(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.received: torch.Tensor | None = None
        self.kept: list[int] = []
        self.capacities: list[int] = []
        self.appended = 0
        self.batch_size = 0
        self.seen = 0
        self.is_initialized = False
        self._recent = RecentQueries()
        self._until_compressed: int | None = None
        self.forget_prompt()

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `B * K` numbers."""
        return [length + self.appended for length in self.kept]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take the keys and values of new tokens, `[B, K, Q, D]`; what comes back is marked with this layer."""
        if not self.is_initialized:
            return self.gather(key_states, value_states)
        if self.plan.compresses_while_generating:
            self._make_room(key_states.shape[2])
        self._append(key_states, value_states)
        key_states.head_cache_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

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
            self._recent = RecentQueries([query], [None if bool(judges.all()) else judges], logits)

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
        self._until_compressed = None

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on."""
        self.plan = plan
        self._until_compressed = None
        if not plan.compresses_while_generating:
            self._recent.forget()

    def observe(self, query: torch.Tensor, judges: torch.Tensor | None = None, **logits) -> None:
        """Remember the queries of the newest tokens as far as the next compression needs them.

        Args:
            query: of tokens whose keys have been appended, `[B, H, Q, D]`.
            judges: false for padding, bool `[B, Q]`; none if there is none.
            logits: `scaling`, `softcap` and `sliding_window` of this layer.
        """
        needed = self.queries_needed()
        if self.plan.compresses_while_generating and needed != 0:
            self._recent.add(query, judges, needed)
            self._recent.logits = logits

    def _make_room(self, count: int) -> None:
        """Compress if `count` more rows would put a head beyond its budget and the buffer."""
        assert self.plan.buffer is not None
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
        states, values = self._held_states()
        counts = targets.to(self.device).expand(self.batch_size, -1)
        self._reduce(states, values, importance.judge(states), counts)
        if importance.queries is None:
            self._recent.forget()

    def _held_states(self) -> tuple[PromptStates, torch.Tensor]:
        """The rows of all heads with the queries that judge them, and the values; hidden rows count as padding."""
        assert self.keys is not None and self.values is not None and self.positions is not None
        shape = (self.batch_size, self.num_kv_heads, self._longest)
        starts, ends = self._bounds[0:-1:2, None].long(), self._ends[:, None]
        places = ends + torch.arange(-self._longest, 0, device=self.device)
        valid = (places >= starts).view(shape)
        places = places.maximum(starts).flatten()
        bias, received = (
            None if column is None else column[places].view(shape) for column in (self.bias, self.received)
        )
        if bias is not None:
            valid = valid & (bias > float("-inf"))
            bias = bias.masked_fill(~valid, 0.0)
        keys = self.keys[places].view(*shape, -1)
        query, judges = self._recent.joined()
        if query is None:
            query = keys[:, :, :0]
        states = PromptStates(
            query,
            keys,
            valid,
            **self._recent.logits,
            positions=self.positions[places].view(shape),
            places=torch.arange(self.seen - query.shape[2], self.seen, device=self.device),
            seen=self.seen,
            bias=bias,
            received=received,
            judges=judges,
        )
        return states, self.values[places].view(*shape, -1)

    def hold(self, rows: CompactRows, appended: int = 0) -> None:
        """Lay out rows with free space behind each head, instead of what the layer held.

        Args:
            rows: of `batch_size * num_kv_heads` heads.
            appended: how many of each head's rows came after the prompt.
        """
        lengths, device = rows.lengths, rows.keys.device
        self.kept, self.appended = [length - appended for length in lengths], appended
        self.capacities = [length + self.slack for length in lengths]
        starts = [0, *accumulate(self.capacities)]
        places, total = _places(starts[:-1], lengths, device), starts[-1]
        self.keys = rows.keys.new_zeros(total, rows.keys.shape[-1]).index_copy_(0, places, rows.keys)
        self.values = rows.values.new_zeros(total, rows.values.shape[-1]).index_copy_(0, places, rows.values)
        self.positions = rows.positions.new_zeros(total).index_copy_(0, places, rows.positions)
        self.bias, self.received = (
            None if column is None else column.new_zeros(total).index_copy_(0, places, column)
            for column in (rows.bias, rows.received)
        )
        self._measure(starts)
        self.is_initialized = True

    def _measure(self, starts: list[int]) -> None:
        """Note where the heads' rows are, as appending and attention need it: on the device, without a way back."""
        lengths = self.lengths
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        bounds = [bound for pair in zip(starts, ends, strict=False) for bound in pair] + starts[-1:]
        self._bounds = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        self._ends = torch.tensor(ends, device=self.device)
        self._longest = max(lengths)
        self._room = min(room - length for room, length in zip(self.capacities, lengths, strict=True))
        self._uniform = self.capacities[0] if len(set(self.capacities)) == len(set(lengths)) == 1 else 0

    def rows(self) -> RaggedRows:
        """What the heads hold now, in place."""
        assert self.keys is not None and self.values is not None and self.positions is not None
        return RaggedRows(self.keys, self.values, self.positions, self._bounds, self._longest, self._uniform, self.bias)

    def compact_rows(self) -> CompactRows:
        """What the heads hold now, copied together."""
        assert self.keys is not None and self.values is not None and self.positions is not None
        used = _places([0, *accumulate(self.capacities)][:-1], self.lengths, self.device)
        extras = _some(used, self.bias, self.received)
        return CompactRows(self.keys[used], self.values[used], self.positions[used], self.lengths, *extras)

    @classmethod
    def stacked(cls, layers: Sequence[HeadCacheLayer]) -> HeadCacheLayer:
        """One layer that holds copies of several as a batch; all must have seen the same number of tokens."""
        first = layers[0]
        if len({layer.seen for layer in layers}) != 1:
            raise ValueError("only layers that have seen the same number of tokens can be stacked")
        stack = first.empty_like(sum(layer.batch_size for layer in layers))
        if all(layer.plan is first.plan for layer in layers):
            stack._recent = RecentQueries.stacked([layer._recent for layer in layers])
        else:  # there is no one way to compress them on
            stack.plan = replace(first.plan, buffer=None)
        stack.hold(
            CompactRows.joined([layer.compact_rows() for layer in layers]), min(layer.appended for layer in layers)
        )
        return stack

    def empty_like(self, batch_size: int) -> HeadCacheLayer:
        """A layer that has seen as many tokens of as many sequences, but holds none yet."""
        layer = HeadCacheLayer(self.layer_idx, self.plan, self.slack)
        layer.batch_size, layer.seen = batch_size, self.seen
        layer.num_kv_heads, layer.head_dim = self.num_kv_heads, self.head_dim
        layer.dtype, layer.device = self.dtype, self.device
        return layer

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this layer holds; free space, positions and remembered queries included."""
        tensors = (self.keys, self.values, self.positions, self.bias, self.received, *self._recent.tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, which must have come since the rows were last compressed.

        Raises:
            CacheError: not that many tokens have come since; what was lost then cannot be given back.
        """
        count = abs(tokens_to_remove)
        if count > self.appended:
            raise CacheError(
                f"Only the last {self.appended} tokens can be taken out of a compressed cache, not {count}."
            )
        self._advance(-count)
        if self._until_compressed is not None:
            self._until_compressed += count
        self._recent.drop(count)

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
        self._recent.select(chosen)
        self.hold(self.compact_rows().of_heads(heads), self.appended)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def hide_newest(self, visible: torch.Tensor) -> None:
        """Hide padding among the newest tokens from every query.

        Args:
            visible: false where one of the last `Q` tokens is padding, bool `[B, Q]`.
        """
        assert self.keys is not None
        if self.bias is None:
            self.bias = self.keys.new_zeros(len(self.keys), dtype=torch.float32)
        count = visible.shape[1]
        places = self._ends[:, None] - count + torch.arange(count, device=self.device)
        hidden = ~visible.repeat_interleave(self.num_kv_heads, dim=0)
        self.bias[places[hidden]] = float("-inf")

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        count = key_states.shape[2]
        if count > self._room:
            if self._until_compressed is None:
                self.slack = max(self.slack, 2 * count, sum(self.lengths) // (2 * len(self.kept)))
            else:  # no more than will come before the rows are compressed again
                self.slack = max(self.slack, count, count + self._until_compressed)
            self.hold(self.compact_rows(), self.appended)
        assert self.keys is not None and self.values is not None and self.positions is not None
        if count == 1:
            places = self._ends
            self.positions.index_fill_(0, places, self.seen)
        else:
            new = torch.arange(count, device=self.device)
            places = (self._ends[:, None] + new).flatten()
            self.positions.index_copy_(0, places, (self.seen + new).int().repeat(len(self.kept)))
        self.keys.index_copy_(0, places, key_states.reshape(len(places), -1))
        self.values.index_copy_(0, places, value_states.reshape(len(places), -1))
        for column in (self.bias, self.received):
            if column is not None:
                column.index_fill_(0, places, 0.0)
        self._advance(count)

    def _advance(self, count: int) -> None:
        self.seen += count
        self.appended += count
        self._longest += count
        self._room -= count
        self._ends += count
        self._bounds[1::2] += count


class FanOutLayer(PromptLayer):
    """The same layer of several caches, filled from one prefill; methods that judge alike share the judgement."""

    def __init__(self, layers: list[HeadCacheLayer]):
        super().__init__()
        self.layers = layers

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.is_initialized or any(layer.seen for layer in self.layers):
            raise CacheError("A fan-out cache takes one prompt: continue with one of the caches it filled.")
        return self.gather(key_states, value_states)

    def queries_needed(self) -> int | None:
        needed = [layer.queries_needed() for layer in self.layers]
        return None if None in needed else max(count for count in needed if count is not None)

    def filled(self, states: PromptStates, values: torch.Tensor) -> None:
        judged: dict[Importance | None, Judgement | None] = {None: None}
        for layer in self.layers:
            importance = layer.plan.method.importance
            if importance is not None and importance not in judged:
                judged[importance] = importance.judge(states)
            layer.lazy_initialization(states.key, values)
            layer.seen, layer.observers = self.seen, self.observers
            layer.compress(states, values, judged[importance])
            layer.forget_prompt()
        self.is_initialized = True


class PromptCache(Cache):
    """A cache whose layers are filled from a prompt as soon as they have attended over it."""

    layers: list[Any]  # of PromptLayer

    def __init__(self, layers: Sequence[PromptLayer]):
        super().__init__(layers=list(layers))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As Transformers' caches.

        Raises:
            CacheError: the layer before has not been compressed, so this package's attention is not in use.
        """
        before = self.layers[layer_idx - 1]
        if layer_idx and before.seen and not before.is_initialized:
            raise outside_context()
        return self.layers[layer_idx].update(key_states, value_states)

    def expect(self, prompt_tokens: int) -> None:
        """Announce a prompt that each layer will get in chunks."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.expected = prompt_tokens

    def expect_observers(self, tokens: int) -> None:
        """Announce that the last tokens of the coming prompt only judge those before them.

        So a document can be compressed by what questions about it would look at, before there is a question: let the
        model read the document and a stand-in for a question, and keep the document's tokens only.
        """
        for layer in self.layers:
            layer.observers = tokens


class HeadCache(PromptCache):
    """A Transformers cache that keeps of a prompt what a method and a budget allot to each KV head.

    Pass it as `past_key_values` inside `with headprof.compressed(model, ...)`; new tokens keep their true positions,
    since `get_seq_length` is the number of tokens seen.

    Args:
        plan: from `headprof.make_plan`, or what `headprof.compressed` yields.
        slack: rows of free space behind each head. When they are used up, the rows are laid out anew with half as much
            again, so that long generations copy the cache seldom.
    """

    def __init__(self, plan: CompressionPlan, slack: int = SLACK):
        self.plan = plan
        super().__init__([HeadCacheLayer(index, plan, slack) for index in range(plan.shape.num_layers)])

    @classmethod
    def of_layers(cls, layers: Sequence[HeadCacheLayer]) -> HeadCache:
        """A cache of layers that are filled already."""
        cache = cls(layers[0].plan)
        cache.layers = list(layers)
        return cache

    @property
    def head_layers(self) -> list[HeadCacheLayer]:
        """The layers, by the name of their kind."""
        return self.layers

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on, for the same model."""
        self.plan = plan
        for layer in self.head_layers:
            layer.continue_with(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds; free space, positions and remembered queries included."""
        return sum(layer.nbytes for layer in self.head_layers)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows held by each head, int64 `[L, B, K]`."""
        return torch.stack([torch.tensor(layer.lengths).reshape(layer.batch_size, -1) for layer in self.head_layers])


def stack_caches(caches: Sequence[HeadCache]) -> HeadCache:
    """One cache with a batch entry for each entry of several caches of the same prompt, whatever their methods.

    One forward pass then continues them all.
    """
    return HeadCache.of_layers(
        [HeadCacheLayer.stacked(layers) for layers in zip(*(cache.head_layers for cache in caches), strict=True)]
    )


class FanOutCache(PromptCache):
    """Fills several caches from one prefill: the model runs over the prompt once for all of them."""

    def __init__(self, caches: list[HeadCache]):
        self.caches = caches
        super().__init__([FanOutLayer(list(layers)) for layers in zip(*(c.head_layers for c in caches), strict=True)])
