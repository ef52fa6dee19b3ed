"""A cache layer on its way through a prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headprof.compression.cache.seen_tokens import SeenTokens
from headprof.compression.hook import mark
from headprof.compression.methods.observation import AttentionLayer, Observation, Tokens
from headprof.compression.rows import Rows
from headprof.errors import CacheError


def outside_context() -> CacheError:
    """What to say when the model attends without looking at our rows."""
    return CacheError("A HeadCache works only inside `with headprof.compressed(model, ...)`: open it first.")


class PromptLayer(CacheLayerMixin):
    """A cache layer on its way through a prompt: it sees the layer's queries, keys and values, then is `filled`.

    A prompt may come in several chunks, one after the other through this layer before the next layer begins; then
    `expected` says how many tokens belong to it. Of these the last `observers` only observe the others: they are not
    kept, and do not count as seen. They may be in `segments`, which do not see one another.

    Attributes:
        tokens: that its cache has been given, those of the pass under way among them.
    """

    is_sliding = False
    unread = False
    """Whether new tokens have come over which this package's attention has not run yet."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.tokens = SeenTokens()
        self.forget_prompt()

    def forget_prompt(self) -> None:
        self.expected = 0
        self.observers = 0
        self.segments: tuple[int, ...] = ()
        self._whole: list[Tensor] = []  # room for the keys and the values of a prompt in chunks
        self._queries: list[Tensor] = []
        self._own: list[Tensor] = []
        self._norms: list[Tensor] = []

    @property
    def weighs_norms(self) -> bool:
        """Whether `filled` wants the norms of the hidden states from which the queries were made."""
        return False

    def queries_needed(self) -> int | None:
        """How many of the prompt's last queries `filled` wants; `None` for all."""
        raise NotImplementedError

    def filled(self, observed: Observation) -> None:
        """Take what is to be kept of a prompt, from its last queries and all its rows."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.batch_size, self.num_kv_heads, _, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device

    def gather(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values so far, `[B, K, tokens, D]`; the keys are marked with this layer.

        Raises:
            CacheError: the prompt was attended over without this package's attention.
        """
        keys, values = self._gathered(key_states, value_states)
        return mark(keys, self), values

    def _gathered(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tokens,
        layer: AttentionLayer,
        norms: Tensor | None = None,
    ) -> None:
        """Compress the layer once the attention over its whole prompt is done.

        Args:
            query: of the newest chunk, `[B, H, Q, D]`.
            key, value: of the prompt so far, `[B, K, tokens, D]`.
            tokens: which of these tokens are no padding.
            layer: how it attended.
            norms: of the hidden states from which the newest chunk's queries were made, `[B, Q]`.
        """
        needed = self.queries_needed()
        to_come = max(0, self.expected - self.seen)
        newest = _last(query, None if needed is None else max(0, needed - to_come))
        if norms is not None:
            self._norms.append(norms)
        if tokens.own is not None:
            self._own.append(tokens.own)
        if self.seen < self.expected:
            self._queries.append(newest.clone())
            return
        queries = _last(torch.cat([*self._queries, newest], dim=2), needed)
        norms = torch.cat(self._norms, dim=1) if self._norms else None
        whole, known = self._known_tokens(tokens, layer.sliding_window)
        self.seen -= self.observers
        observed = Observation(queries, Rows.of_prompt(key, value), known.valid, layer, padded=known.padded)
        self.filled(
            replace(
                observed,
                lengths=known.lengths,
                visible=known.visible,
                attended=whole if self.observers else None,
                segments=self.segments,
                ids=self.tokens.first(self.seen, len(key)),
                query_norms=None if norms is None else norms[:, norms.shape[1] - queries.shape[2] :],
            )
        )
        self.forget_prompt()

    def _known_tokens(self, tokens: Tokens, window: int | None) -> tuple[Tokens, Tokens]:
        """A whole prompt's tokens, and those of them that may be kept: what the first token after it can see.

        The mask of a layer with a sliding window hides what the last observer cannot see, which that token can.
        """
        if not self.observers or window is None:
            whole = tokens.counted(self._own)
            return whole, whole.without_last(self.observers)
        own = torch.cat(self._own, dim=1)
        whole = Tokens(own, tokens.lengths, tokens.lengths).counted(self._own)
        return whole, whole.without_last(self.observers).last(self.seen - self.observers, window)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the position of the next one."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


def _last(queries: Tensor, count: int | None) -> Tensor:
    """The last `count` of `[B, H, N, D]`, or all if they are fewer or it is `None`."""
    return queries if count is None else queries[:, :, max(0, queries.shape[2] - count) :]
