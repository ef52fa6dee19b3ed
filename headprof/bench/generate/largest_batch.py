"""How many sequences can be decoded together before memory is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from headprof.bench.generate.cases import Case, all_cases, random_ids
from headprof.bench.generate.request import BenchRequest
from headprof.bench.measure import Progress, Result, attempt, device_of, now
from headprof.compression.generation import cache_nbytes
from headprof.compression.session import prefill
from headprof.errors import UsageError
from headprof.profile.head_profile import HeadProfile


@dataclass(frozen=True)
class LargestBatch:
    """How many sequences fit.

    Attributes:
        method, budget, backend, length: as in `Measurement`.
        batch: the largest batch that was decoded; 0 if not even one sequence could be.
        decode_rate: new tokens per second over all sequences of that batch, at the median time between two tokens.
        cache_bytes: that the cache of that batch holds right after the prompt.
    """

    method: str
    budget: str
    backend: str
    length: int
    batch: int
    decode_rate: float | None = None
    cache_bytes: int | None = None


def largest_batches(
    model: Any,
    max_positions: int,
    profile: HeadProfile | None,
    request: BenchRequest,
    on_progress: Progress = lambda text, done, total: None,
    at_most: int = 1 << 16,
) -> list[LargestBatch]:
    """How many sequences of each case can be decoded together, to within two percent, and how fast.

    One prompt is read and its cache repeated, so the prefill of a batch need not fit where its decoding does. Every
    batch that is tried decodes `new_tokens`, the room these take included.

    Args:
        model, max_positions, profile, request, on_progress: as for `run_bench`; `batch` and `repeats` are not used.
        at_most: batches beyond this are not tried.

    Raises:
        UsageError: as for `run_bench`, or the model is not on a CUDA device, which alone says when memory is full.
    """
    cases = all_cases(model, max_positions, profile, request)
    if device_of(model).type != "cuda":
        raise UsageError("The largest batch can only be found on a CUDA device: choose one with --device cuda.")
    found = []
    for done, case in enumerate(cases):
        on_progress(f"Largest batch: {case.label}", done, len(cases))
        found.append(_largest_batch(model, case, request, at_most))
    return found


def _largest_batch(model: Any, case: Case, request: BenchRequest, at_most: int) -> LargestBatch:
    ids = random_ids(model, 1, case.length, request.seed)

    def decoded(batch: int) -> _Decoded | None:
        return attempt(partial(_decode_copies, model, case, ids, batch, request.new_tokens, request.prefill_chunk))

    batch, result = largest_that_works(decoded, at_most)
    row = LargestBatch(case.method, case.budget, case.backend, case.length, batch)
    return row if result is None else replace(row, decode_rate=result.rate, cache_bytes=result.cache_bytes)


def largest_that_works(
    work: Callable[[int], Result | None], at_most: int, precision: float = 0.02
) -> tuple[int, Result | None]:
    """The largest number that `work` returns something for, and what; found by doubling, then bisecting.

    Args:
        work: returns `None` for numbers that are too large.
        at_most: no larger number is tried.
        precision: stop where no number that fails is known to be more than this share larger, or next to it.
    """
    best, result, failed = 0, None, at_most + 1
    while failed - best > max(1, int(precision * best)):
        number = min(2 * best or 1, at_most) if failed > at_most else (best + failed) // 2
        if (returned := work(number)) is None:
            failed = number
        else:
            best, result = number, returned
    return best, result


@dataclass(frozen=True)
class _Decoded:
    rate: float
    cache_bytes: int


@torch.no_grad()
def _decode_copies(
    model: Any, case: Case, ids: torch.Tensor, batch: int, new_tokens: int, prefill_chunk: int | None
) -> _Decoded:
    """Read one prompt `[1, T]`, and decode greedily from `batch` copies of its cache."""
    with case.attending(model, prefill_chunk):
        cache: Any = case.new_cache(model)
        token = prefill(model, ids, cache).argmax(dim=-1, keepdim=True).repeat(batch, 1)
        cache.batch_repeat_interleave(batch)
        cache_bytes = cache_nbytes(cache)
        times = [now(ids.device)]
        for _ in range(new_tokens - 1):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
            times.append(now(ids.device))
    gaps = [after - before for before, after in pairwise(times)]
    return _Decoded(batch / median(gaps), cache_bytes)
