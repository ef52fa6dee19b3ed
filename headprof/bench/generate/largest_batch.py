"""How many sequences can be decoded together before memory is full."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from headprof.bench.generate.cases import Case, all_cases, random_ids
from headprof.bench.generate.full_cache import (
    COMPILED_WARM_UP,
    EAGER,
    FULL,
    compiled_call,
    forget_compiled,
    free_memory,
    repeat_sequences,
)
from headprof.bench.generate.request import BenchRequest
from headprof.bench.generate.results import best
from headprof.bench.measure import Progress, Result, attempt, device_of, now
from headprof.compression.generation import cache_nbytes
from headprof.compression.session import prefill
from headprof.errors import UsageError
from headprof.profile.head_profile import HeadProfile


@dataclass(frozen=True)
class LargestBatch:
    """How many sequences fit.

    Attributes:
        method, budget, backend, length, step: as in `Measurement`.
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
    step: str = "auto"


def beside_full(found: Iterable[LargestBatch]) -> list[float | None]:
    """Each one's decode rate as a multiple of the better full cache's of that length; `None` where one is missing."""
    found = list(found)
    ratios: list[float | None] = []
    for each in found:
        rates = [other.decode_rate for other in found if (other.method, other.length) == (FULL, each.length)]
        full = best(max, rates)
        ratios.append(each.decode_rate / full if each.decode_rate and full else None)
    return ratios


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
    batch that is tried decodes `new_tokens`, the room these take included. The full cache whose steps are compiled is
    compiled for one batch only: the largest that fits without, or a little less if that does not.

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

    def decoded(batch: int, compiling: bool = True) -> Decoded | None:
        result = attempt(
            partial(decode_copies, model, case, ids, batch, request.new_tokens, request.prefill_chunk, compiling)
        )
        free_memory()
        return result

    try:
        find = _largest_compiled if case.compiles_full else largest_that_works
        batch, result = find(decoded, at_most)
    finally:
        if case.step != EAGER:
            forget_compiled(model)
    row = LargestBatch(case.method, case.budget, case.backend, case.length, batch, step=case.step)
    return row if result is None else replace(row, decode_rate=result.rate, cache_bytes=result.cache_bytes)


_COMPILED_TRIES = (1.0, 0.97, 0.94, 0.9)
"""Shares of the largest batch that fits uncompiled, for which a step over it is compiled."""


def _largest_compiled(decoded: Callable[..., Decoded | None], at_most: int) -> tuple[int, Decoded | None]:
    """As `largest_that_works`, though compiling for every batch that is tried would take minutes."""
    fits, _ = largest_that_works(partial(decoded, compiling=False), at_most)
    for batch in dict.fromkeys(int(fits * share) for share in _COMPILED_TRIES):
        if batch and (result := decoded(batch)) is not None:
            return batch, result
    return 0, None


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
class Decoded:
    """What copies of a prompt took.

    Attributes:
        rate: new tokens per second over all copies, at the median time between two.
        cache_bytes: of their cache right after the prompt.
    """

    rate: float
    cache_bytes: int


@torch.no_grad()
def decode_copies(
    model: Any,
    case: Case,
    ids: torch.Tensor,
    batch: int,
    new_tokens: int,
    prefill_chunk: int | None = None,
    compiling: bool = True,
) -> Decoded:
    """Read one prompt `[1, T]`, and decode greedily from copies of its cache: forward passes alone, without `generate`.

    Args:
        model: the model.
        case: how it decodes.
        ids: the prompt.
        batch: copies.
        new_tokens: that each gets; those by which what is compiled is warmed up come on top.
        prefill_chunk: as for `headprof.compressed`.
        compiling: if not, a step that the case would compile is run as it is, and once, to see whether it fits.
    """
    untimed = COMPILED_WARM_UP if case.compiles_full else 0
    step = compiled_call(model, ids.device) if untimed and compiling else model
    with case.attending(model, prefill_chunk):
        cache: Any = case.new_cache(model, untimed + new_tokens)
        token = prefill(model, ids, cache).argmax(dim=-1, keepdim=True).repeat(batch, 1)
        repeat_sequences(cache, batch)
        cache_bytes = cache_nbytes(cache)
        if not compiling:
            untimed, new_tokens = 0, 2
        times = [now(ids.device)]
        for _ in range(untimed + new_tokens - 1):
            token = step(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1, keepdim=True)
            times.append(now(ids.device))
    gaps = [after - before for before, after in pairwise(times[untimed:])]
    return Decoded(batch / median(gaps), cache_bytes)
