"""One run of a case: prompts read and decoded by `generate`, each token timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from headprof.bench.generate.cases import Case
from headprof.bench.measure import PeakMemory, now
from headprof.compression.cache.head_cache import PromptLayer
from headprof.compression.generation import cache_nbytes
from headprof.models.changing import Changes


@dataclass(frozen=True)
class Run:
    """What one run of a case took.

    Attributes:
        prefill_seconds: until the first new token.
        overhead_seconds: of these, spent on choosing and keeping the prompt's tokens.
        gaps: seconds from each new token to the next.
        cache_bytes: that the cache held right after the prompt.
        sizes: bytes of the cache, once for each gap.
        peak_bytes: most memory in use beyond what was before the run, or `None` where the system does not say.
    """

    prefill_seconds: float
    overhead_seconds: float
    gaps: list[float]
    cache_bytes: int
    sizes: list[int]
    peak_bytes: int | None

    @property
    def steadiness(self) -> float | None:
        """As in `Measurement`; `None` for fewer than twelve gaps."""
        part = len(self.gaps) // 12
        fill = self.sizes.index(max(self.sizes)) + 1
        first, last = self.gaps[fill if fill + 2 * part <= len(self.gaps) else 0 :][:part], self.gaps[-part:]
        return sum(first) / sum(last) if part else None


def decode_prompts(model: Any, case: Case, ids: torch.Tensor, new_tokens: int, prefill_chunk: int | None) -> Run:
    """Read prompts `[B, T]` and decode, once."""
    device = ids.device
    cache = case.new_cache(model)
    clock = _TokenClock(cache, device)
    memory = PeakMemory(device)
    with case.attending(model, prefill_chunk), _timing_compression(cache, device) as compressing:
        start = now(device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
    return Run(clock.prefilled - start, sum(compressing), clock.gaps, clock.cache_bytes, clock.sizes, memory.used())


class _TokenClock(BaseStreamer):
    """Takes tokens from `generate`, of any batch; notes when they came, and what the cache holds after the prompt."""

    def __init__(self, cache: Cache, device: torch.device):
        self.cache, self.device = cache, device
        self.prefilled = 0.0
        self.cache_bytes = 0
        self.gaps: list[float] = []
        self.sizes: list[int] = []  # of the cache, once for each gap
        self._last: float | None = None
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_came:
            self._prompt_came = True
            return
        moment = now(self.device)
        size = cache_nbytes(self.cache)
        if self._last is None:
            self.prefilled, self.cache_bytes = moment, size
        else:
            self.gaps.append(moment - self._last)
            self.sizes.append(size)
        self._last = now(self.device)  # what was looked at here counts as no one's time

    def end(self) -> None:
        pass


@contextmanager
def _timing_compression(cache: Cache, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds that each layer of this cache takes to choose and keep a prompt's tokens."""
    seconds: list[float] = []

    def timed(attended: Callable[..., None]) -> Callable[..., None]:
        def run(*args, **kwargs) -> None:
            start = now(device)
            attended(*args, **kwargs)
            seconds.append(now(device) - start)

        return run

    changes = Changes()
    try:
        for layer in cache.layers:
            if isinstance(layer, PromptLayer):
                changes.set(vars(layer), "attended", timed(layer.attended))
        yield seconds
    finally:
        changes.take_back()
