"""A cache layer on its way through a prompt."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from headprof.compression.methods.states import PromptStates
from headprof.errors import CacheError


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
