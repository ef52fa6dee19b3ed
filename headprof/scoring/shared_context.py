"""Asking many questions about one context: one prefill, and a short suffix over its cache for each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headprof.models.loading import require_finite
from headprof.models.requirements import require_attention_layers

_LEAST_SHARE = 0.1
"""Of a context; sharing a shorter beginning with the one before is not worth a chunked prefill."""

_CHUNK = 2048
"""Tokens read at once after a shared beginning; a mask over them has this many rows."""

_MASKABLE = {"full_attention", "sliding_attention"}


class SharedContext:
    """A context in a model's cache, about which questions are asked side by side.

    The cache keeps every token, also of layers with a sliding window, so that key `j` is token `j` of the context.

    Args:
        model: a causal language model.
        attention: the attention implementation it runs with; FlashAttention takes no mask that hides questions from
            each other, unless whoever wraps it falls back to another for those passes (`RowReader` does).

    Raises:
        ModelError: some of the model's layers are no attention, so there are no heads in them.
    """

    def __init__(self, model: PreTrainedModel, attention: str):
        require_attention_layers(model, "its heads cannot be scored")
        self.model = model
        self.cache = DynamicCache()
        self._ids: tuple[int, ...] = ()
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        self._layer_types = getattr(config, "layer_types", None)
        kinds = set(self._layer_types or ["full_attention" if window is None else "sliding_attention"])
        self._window = window if "sliding_attention" in kinds else None
        self.shares_passes = attention in ("sdpa", "eager", "flash_attention_2") and kinds <= _MASKABLE
        """Whether questions may share one forward pass, each hidden from the others by the mask."""

    def read(self, ids: Sequence[int], *, anew: bool = True) -> None:
        """Make the cache that of the context `ids`.

        Args:
            ids: token ids.
            anew: compute all of it; else keep what it begins with and the context before did too.

        Raises:
            ModelError: the model's numbers overflow.
        """
        shared = 0 if anew else _common_length(self._ids, ids)
        if shared < _LEAST_SHARE * len(ids):
            self.cache, shared = DynamicCache(), 0
        else:
            self._drop(len(self._ids) - shared)
        step = _CHUNK if shared else len(ids)
        for start in range(shared, len(ids), step):
            logits = self.extend(ids[start : start + step])
            require_finite(logits.amax(), logits.dtype)
        self._ids = tuple(ids)

    def extend(self, ids: Sequence[int]) -> torch.Tensor:
        """Feed tokens after what is held; logits of the last, `[vocabulary]`."""
        batch = torch.tensor([ids], device=self.model.device)
        return self.model(batch, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def rewind(self) -> None:
        """Drop what was fed after the context."""
        self._drop(self.cache.get_seq_length() - len(self._ids))

    def together(self, suffixes: Sequence[Sequence[int]]) -> Iterator[slice]:
        """The suffixes in parts that may share a forward pass: all of them, or one at a time."""
        step = len(suffixes) if self.shares_passes else 1
        return (slice(at, at + step) for at in range(0, len(suffixes), step))

    def ask(self, suffixes: Sequence[Sequence[int]], rows: torch.Tensor) -> torch.Tensor:
        """Run suffixes that all continue the context, in one pass; the cache is left as it was.

        Args:
            suffixes: token ids of each.
            rows: which of the suffixes' tokens, counted over all of them, `[N]`.

        Returns:
            logits of these tokens, `[N, vocabulary]`.

        Raises:
            ModelError: the model's numbers overflow.
        """
        logits = self.forward(suffixes, rows)[0]
        require_finite(logits.amax(), logits.dtype)
        self.rewind()
        return logits

    def forward(self, suffixes: Sequence[Sequence[int]], rows: torch.Tensor) -> torch.Tensor:
        """As `ask`, of a model that may make a batch of one sequence, `[B, N, vocabulary]`; the cache keeps it all."""
        seen = len(self._ids)
        ids = torch.tensor([list(chain.from_iterable(suffixes))], device=self.model.device)
        options = {}
        if len(suffixes) > 1:
            positions = torch.cat([torch.arange(seen, seen + len(suffix)) for suffix in suffixes])
            options = {"position_ids": positions[None].to(ids.device), "attention_mask": self._masks(suffixes)}
        rows = rows.to(ids.device)
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=rows, **options).logits

    def _masks(self, suffixes: Sequence[Sequence[int]]) -> torch.Tensor | dict[str, torch.Tensor]:
        """What each suffix's tokens see, added to the logits: `[1, 1, S, seen + S]`, one for each type of layer."""
        if self._window is None:
            return self._mask(suffixes, None)
        if self._layer_types is None:
            return self._mask(suffixes, self._window)
        windows = {"full_attention": None, "sliding_attention": self._window}
        return {kind: self._mask(suffixes, window) for kind, window in windows.items()}

    def _mask(self, suffixes: Sequence[Sequence[int]], window: int | None) -> torch.Tensor:
        seen, dtype = len(self._ids), self.model.dtype
        total = sum(map(len, suffixes))
        mask = torch.full((total, seen + total), torch.finfo(dtype).min, dtype=dtype)
        stops = list(accumulate(map(len, suffixes)))
        for stop, suffix in zip(stops, suffixes, strict=True):
            own = slice(stop - len(suffix), stop)
            for row, position in zip(range(own.start, own.stop), range(seen, seen + len(suffix)), strict=True):
                first = 0 if window is None else max(0, position - window + 1)
                mask[row, first:seen] = 0
                mask[row, seen + own.start + max(0, first - seen) : seen + row + 1] = 0
        return mask[None, None].to(self.model.device)

    def _drop(self, count: int) -> None:
        if count:
            self.cache.crop(-count)


def teacher_forced(
    questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """What to feed after a context, and where the answers are predicted.

    Args:
        questions: token ids of each, at least one.
        answers: token ids of each, at least one.

    Returns:
        Suffixes: each question with its answer but for the last token, after which nothing is asked.
        Rows: for each answer the `N` tokens that predict it, counted over all suffixes, int64 `[N]`.
    """
    suffixes = [(*question, *answer[:-1]) for question, answer in zip(questions, answers, strict=True)]
    stops = accumulate(map(len, suffixes))
    return suffixes, [torch.arange(stop - len(answer), stop) for stop, answer in zip(stops, answers, strict=True)]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike, at least one of the second left over."""
    length = min(len(a), len(b) - 1)
    return next((at for at in range(length) if a[at] != b[at]), max(0, length))
