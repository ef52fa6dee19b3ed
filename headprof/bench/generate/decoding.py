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
from headprof.bench.generate.full_cache import compile_config
from headprof.bench.measure import PeakMemory, now
from headprof.compression.cache.prompt_layer import PromptLayer
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


def decode_prompts(
    model: Any, case: Case, ids: torch.Tensor, new_tokens: int, prefill_chunk: int | None, room: int | None = None
) -> Run:
    """Read prompts `[B, T]` and decode, once, from a cache with room for so many new tokens, `new_tokens` if `None`."""
    device = ids.device
    cache = case.new_cache(model, new_tokens if room is None else room)
    compiling = {"compile_config": compile_config(device)} if case.compiles_full else {}
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
            **compiling,
        )
    return Run(clock.prefilled - start, compressing(), clock.gaps, clock.cache_bytes, clock.sizes, memory.used())


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
def _timing_compression(cache: Cache, device: torch.device) -> Iterator[Callable[[], float]]:
    """Time each layer of this cache while it chooses and keeps a prompt's tokens; yields what tells the seconds."""
    watch = _DeviceWatch() if device.type == "cuda" else _HostWatch(device)
    changes = Changes()
    try:
        for layer in cache.layers:
            if isinstance(layer, PromptLayer):
                changes.set(vars(layer), "attended", watch.timed(layer.attended))
        yield watch.seconds
    finally:
        changes.take_back()


class _HostWatch:
    """Seconds of calls by the host's clock, once the device has done all it was given."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = 0.0

    def timed(self, work: Callable[..., None]) -> Callable[..., None]:
        def run(*args, **kwargs) -> None:
            start = now(self.device)
            work(*args, **kwargs)
            self._seconds += now(self.device) - start

        return run

    def seconds(self) -> float:
        return self._seconds


class _DeviceWatch:
    """Seconds of calls by a CUDA device's own clock: waiting for it after each would itself slow what is timed."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, work: Callable[..., None]) -> Callable[..., None]:
        def run(*args, **kwargs) -> None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work(*args, **kwargs)
            end.record()
            self._spans.append((start, end))

        return run

    def seconds(self) -> float:
        if self._spans:
            self._spans[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1e3
