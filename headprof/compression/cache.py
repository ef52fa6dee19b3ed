"""A key/value cache in which every KV head holds its own number of rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from headprof.compression.attention import RaggedRows
from headprof.compression.budget import Budget
from headprof.compression.importance import Importance, PromptStates
from headprof.compression.methods import Method
from headprof.compression.reduction import top_tokens
from headprof.errors import CacheError, UsageError
from headprof.shape import HeadShape

SLACK = 16
"""Rows of free space after each head, so that an appended token seldom moves the others."""


@dataclass
class CompressionPlan:
    """A method with its budget, for a model of a certain shape.

    Attributes:
        method: what to keep, how much per head, and what becomes of the rest.
        budget: average tokens per KV head.
        shape: the model's.
        scores: importance of each KV head, float `[L, K]`; all equal for methods without a profile.
        bytes_per_element: of a cached number, for budgets in bytes.
    """

    method: Method
    budget: Budget
    shape: HeadShape
    scores: torch.Tensor
    bytes_per_element: int
    _allocations: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def allocation(self, prompt_length: int) -> torch.Tensor:
        """Tokens per KV head for a prompt of this many tokens, int64 `[L, K]`.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        if prompt_length not in self._allocations:
            bytes_per_token = self.shape.cache_bytes_per_token(self.bytes_per_element)
            budget = self.budget.tokens(prompt_length, bytes_per_token)
            if budget < 1:
                raise UsageError(
                    f"A budget of {int(self.budget.amount)} bytes is less than one token per head "
                    f"({bytes_per_token} bytes): raise --budget."
                )
            if self.method.importance is None:
                budget = prompt_length
            self._allocations[prompt_length] = self.method.budget.allocate(
                self.scores,
                budget=budget,
                context_length=prompt_length,
                always_kept=self.method.always_kept,
            )
        return self._allocations[prompt_length]


class HeadCacheLayer(CacheLayerMixin):
    """One layer: flat rows `[rows, D]`, one head after the other, each with some free space behind it.

    It is filled by `compress`, which the attention function calls as soon as the layer has attended over the prompt;
    later tokens are appended to every head.
    """

    is_sliding = False

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
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.capacities: list[int] = []
        self.batch_size = 0
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch_size, self.num_kv_heads, _, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take the keys and values of new tokens, `[B, K, Q, D]`; they come back marked with this layer.

        The mark is how the attention function finds the rows: a model passes what it gets here on to it untouched.

        Raises:
            CacheError: the prompt was attended over without this package's attention.
        """
        if self.is_initialized:
            self._append(key_states, value_states)
        elif self.seen:
            raise CacheError("A HeadCache works only inside `with headprof.compressed(model, ...)`: open it first.")
        else:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        key_states.head_cache_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def compress(self, states: PromptStates, values: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Keep of the prompt what the plan allots.

        Args:
            states: the prompt's queries and keys.
            values: the prompt's values, `[B, K, T, D]`.
            importance: `[B, K, T]`; none keeps everything.
        """
        method = self.plan.method
        prompt_lengths = states.valid.sum(dim=-1).tolist()
        counts = torch.stack([self.plan.allocation(length)[self.layer_idx] for length in prompt_lengths])
        if importance is None:
            importance = torch.zeros(states.key.shape[:3], device=self.device)
        kept = top_tokens(
            importance, counts.to(self.device), states.valid, sinks=method.sinks, keep_last=method.keep_last
        )
        keys, values = method.reduction.reduce(states.key, values, kept)
        positions = torch.arange(kept.shape[-1], dtype=torch.int32, device=self.device).expand_as(kept)[kept]
        self._store(keys, values, positions, kept.sum(dim=-1).flatten().tolist())
        self.is_initialized = True

    @classmethod
    def stacked(cls, layers: Sequence[HeadCacheLayer]) -> HeadCacheLayer:
        """One layer that holds copies of several as a batch; all must have seen the same number of tokens."""
        first = layers[0]
        if len({layer.seen for layer in layers}) != 1:
            raise ValueError("only layers that have seen the same number of tokens can be stacked")
        stack = cls(first.layer_idx, first.plan, first.slack)
        stack.batch_size = sum(layer.batch_size for layer in layers)
        stack.num_kv_heads, stack.head_dim = first.num_kv_heads, first.head_dim
        stack.dtype, stack.device, stack.seen = first.dtype, first.device, first.seen
        held = [layer.rows() for layer in layers]
        stack.keys = torch.cat([rows.keys for rows in held])
        stack.values = torch.cat([rows.values for rows in held])
        stack.positions = torch.cat([rows.positions for rows in held])
        stack.lengths = [length for rows in held for length in rows.lengths]
        stack.capacities = [room for layer in layers for room in layer.capacities]
        stack.offsets = [0, *accumulate(stack.capacities)][:-1]
        stack.is_initialized = True
        return stack

    def rows(self) -> RaggedRows:
        """What the heads hold now."""
        assert self.keys is not None and self.values is not None and self.positions is not None
        return RaggedRows(self.keys, self.values, self.positions, self.offsets, self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this layer holds, free space and positions included."""
        tensors = (self.keys, self.values, self.positions)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens that were appended after the prompt."""
        count = abs(tokens_to_remove)
        self.lengths = [length - count for length in self.lengths]
        self.seen -= count

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise CacheError("Beam search cannot reorder a compressed cache: generate with num_beams=1.")

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        count = key_states.shape[2]
        if any(length + count > room for length, room in zip(self.lengths, self.capacities, strict=True)):
            self._grow(count)
        assert self.keys is not None and self.values is not None and self.positions is not None
        ends = torch.tensor([start + n for start, n in zip(self.offsets, self.lengths, strict=True)])
        places = (ends[:, None] + torch.arange(count)).flatten().to(self.device)
        self.keys.index_copy_(0, places, key_states.reshape(-1, self.head_dim))
        self.values.index_copy_(0, places, value_states.reshape(-1, self.head_dim))
        new = torch.arange(self.seen, self.seen + count, dtype=torch.int32, device=self.device)
        self.positions.index_copy_(0, places, new.repeat(len(self.lengths)))
        self.lengths = [length + count for length in self.lengths]

    def _grow(self, count: int) -> None:
        assert self.keys is not None and self.values is not None and self.positions is not None
        used = torch.cat(
            [torch.arange(start, start + n) for start, n in zip(self.offsets, self.lengths, strict=True)]
        ).to(self.device)
        self.slack = max(self.slack, count, sum(self.lengths) // (2 * len(self.lengths)))
        self._store(self.keys[used], self.values[used], self.positions[used], self.lengths)

    def _store(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, lengths: list[int]) -> None:
        """Lay out rows that come one head after the other, with free space behind each head."""
        self.lengths = lengths
        self.capacities = [length + self.slack for length in lengths]
        self.offsets = [0, *accumulate(self.capacities)][:-1]
        places = torch.cat([torch.arange(start, start + n) for start, n in zip(self.offsets, lengths, strict=True)]).to(
            self.device
        )
        total = sum(self.capacities)
        self.keys = keys.new_zeros(total, self.head_dim).index_copy_(0, places, keys)
        self.values = values.new_zeros(total, self.head_dim).index_copy_(0, places, values)
        self.positions = positions.new_zeros(total).index_copy_(0, places, positions)


class FanOutLayer(CacheLayerMixin):
    """The same layer of several caches, filled from one prefill."""

    def __init__(self, layers: list[HeadCacheLayer]):
        super().__init__()
        self.layers = layers

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if any(layer.seen for layer in self.layers):
            raise CacheError("A fan-out cache takes one prompt: continue with one of the caches it filled.")
        for layer in self.layers:
            layer.update(key_states, value_states)
        self.lazy_initialization(key_states, value_states)
        key_states.head_cache_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.layers[0].get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layers[0].get_mask_sizes(query_length)


class HeadCache(Cache):
    """A Transformers cache that keeps of a prompt what a method and a budget allot to each KV head.

    Pass it as `past_key_values` inside `with headprof.compressed(model, ...)`; new tokens keep their true positions,
    since `get_seq_length` is the number of tokens seen.
    """

    def __init__(self, plan: CompressionPlan, slack: int = SLACK):
        self.plan = plan
        self.head_layers = [HeadCacheLayer(index, plan, slack) for index in range(plan.shape.num_layers)]
        super().__init__(layers=list(self.head_layers))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds, free space and positions included."""
        return sum(layer.nbytes for layer in self.head_layers)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows held by each head, int64 `[L, B, K]`."""
        return torch.stack([torch.tensor(layer.lengths).reshape(layer.batch_size, -1) for layer in self.head_layers])


def stack_caches(caches: Sequence[HeadCache]) -> HeadCache:
    """One cache with a batch entry for each entry of several caches of the same prompt, whatever their methods.

    One forward pass then continues them all.
    """
    stack = HeadCache(caches[0].plan)
    stack.head_layers = [
        HeadCacheLayer.stacked(layers) for layers in zip(*(cache.head_layers for cache in caches), strict=True)
    ]
    stack.layers = list(stack.head_layers)
    return stack


class FanOutCache(Cache):
    """Fills several caches from one prefill: the model runs over the prompt once for all of them."""

    def __init__(self, caches: list[HeadCache]):
        self.caches = caches
        super().__init__(
            layers=[FanOutLayer(list(layers)) for layers in zip(*(c.head_layers for c in caches), strict=True)]
        )


def compress_layer(layer: HeadCacheLayer | FanOutLayer, states: PromptStates, values: torch.Tensor) -> None:
    """Compress a layer, or each of a fan-out's; methods that judge tokens alike share the judgement."""
    judged: dict[Importance | None, torch.Tensor | None] = {None: None}
    for each in layer.layers if isinstance(layer, FanOutLayer) else [layer]:
        importance = each.plan.method.importance
        if importance not in judged:
            assert importance is not None
            judged[importance] = importance.score(states)
        each.compress(states, values, judged[importance])
