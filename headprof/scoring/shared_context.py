"""Asking many questions about one context: one prefill, and a short suffix over its cache for each question.

Several contexts may be read side by side, and asked about in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headprof.models.loading import require_finite
from headprof.models.requirements import require_attention_layers
from headprof.scoring.packing import Packed, hidden_mask

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
        self._lengths: tuple[int, ...] = ()
        self._width = 0
        self.peak = torch.zeros(())
        """The largest of the last logits of what was read, to be found finite by whoever reads it from the device."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        self._layer_types = getattr(config, "layer_types", None)
        kinds = set(self._layer_types or ["full_attention" if window is None else "sliding_attention"])
        self._window = window if "sliding_attention" in kinds else None
        self.shares_passes = attention in ("sdpa", "eager", "flash_attention_2") and kinds <= _MASKABLE
        """Whether questions may share one forward pass, each hidden from the others by the mask."""

    @property
    def width(self) -> int:
        """Tokens of the longest context that is held."""
        return self._width

    def read(self, ids: Sequence[int], *, anew: bool = True) -> None:
        """Make the cache that of the context `ids`.

        Args:
            ids: token ids.
            anew: compute all of it; else keep what it begins with and the context before did too.

        Raises:
            ModelError: the model's numbers overflow.
        """
        self.fill(ids, anew=anew)
        require_finite(self.peak, self.model.dtype)

    def fill(self, ids: Sequence[int], *, anew: bool = True) -> None:
        """As `read`, but nothing is read from the device: look at `peak`."""
        shared = 0 if anew else _common_length(self._ids, ids)
        if shared < _LEAST_SHARE * len(ids):
            self.cache, shared = DynamicCache(), 0
        else:
            self._drop(len(self._ids) - shared)
        step = _CHUNK if shared else len(ids)
        peaks = [self.extend(ids[start : start + step]).amax() for start in range(shared, len(ids), step)]
        self.peak = peaks[0] if len(peaks) == 1 else torch.stack(peaks).amax()
        self._ids, self._lengths, self._width = tuple(ids), (len(ids),), len(ids)

    def fill_together(self, contexts: Sequence[Sequence[int]]) -> None:
        """Make the cache that of several contexts, to be asked about with `feed`; shorter ones are filled up behind.

        No token of a context sees what fills it up, since it stands behind.
        """
        if len(contexts) == 1:
            self.fill(contexts[0])
            return
        self.cache, self._ids = DynamicCache(), ()
        self._lengths, self._width = tuple(map(len, contexts)), max(map(len, contexts))
        filled = torch.tensor([[*ids, *[ids[-1]] * (self._width - len(ids))] for ids in contexts])
        batch = filled.to(self.model.device, non_blocking=True)
        self.peak = self.model(batch, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits.amax()

    def extend(self, ids: Sequence[int]) -> torch.Tensor:
        """Feed tokens after what is held; logits of the last, `[vocabulary]`."""
        batch = torch.tensor([ids]).to(self.model.device, non_blocking=True)
        return self.model(batch, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def rewind(self) -> None:
        """Drop what was fed after the context."""
        self._drop(self.cache.get_seq_length() - self._width)

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
        ids = torch.tensor([list(chain.from_iterable(suffixes))])
        positions = torch.cat([torch.arange(self._width, self._width + len(suffix)) for suffix in suffixes])[None]
        segments = torch.cat([torch.full((len(suffix),), at) for at, suffix in enumerate(suffixes, start=1)])[None]
        return self._feed(ids, positions, segments, rows, plain=len(suffixes) == 1)

    def feed(self, packed: Packed) -> torch.Tensor:
        """Run packed suffixes of the contexts in one pass; the cache is left as it was.

        Returns:
            logits of the rows that predict answers, `[B, N, vocabulary]`; nobody has looked whether they are finite.
        """
        logits = self._feed(packed.ids, packed.positions, packed.segments, packed.rows, plain=packed.is_plain)
        self.rewind()
        return logits

    def _feed(
        self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, rows: torch.Tensor, *, plain: bool
    ) -> torch.Tensor:
        device = self.model.device
        ids, positions, segments = torch.stack([ids, positions, segments]).to(device, non_blocking=True)
        options = {} if plain else {"position_ids": positions, "attention_mask": self._masks(positions, segments)}
        rows = rows.to(device, non_blocking=True)
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=rows, **options).logits

    def _masks(self, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What each token sees, added to the logits: `[B, 1, S, C + S]`, one for each type of layer."""
        lengths = torch.tensor(self._lengths).to(positions.device, non_blocking=True)

        def mask(window: int | None) -> torch.Tensor:
            return hidden_mask(positions, segments, lengths, self._width, window, self.model.dtype)

        if self._window is None or self._layer_types is None:
            return mask(self._window)
        return {kind: mask(self._window if kind == "sliding_attention" else None) for kind in _MASKABLE}

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
