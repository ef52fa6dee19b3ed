"""Speed and memory of decoding with compressed caches, beside Transformers' own full cache, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from headprof.bench.measure import (
    PeakMemory,
    Progress,
    Result,
    attempt,
    describe_environment,
    device_of,
    measure_bandwidth,
    now,
    require_at_least,
)
from headprof.compression.cache.head_cache import HeadCache, PromptLayer
from headprof.compression.generation import cache_nbytes
from headprof.compression.kernels.backends import check_backend
from headprof.compression.methods.budget import Budget
from headprof.compression.methods.table import deal_options, find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.head_profile import HeadProfile


@dataclass(frozen=True)
class BenchRequest:
    """Methods times budgets times backends times prompt lengths, and the full cache at each length unless left out.

    Attributes:
        methods: names in the table of methods; `full` adds nothing, since the full cache is always run.
        budgets: as the command line takes them.
        lengths: prompt lengths in tokens.
        new_tokens: tokens to decode after the prompt.
        repeats: timed runs of each case.
        batch: sequences decoded together.
        backends: attentions over the compressed cache, names in `BACKENDS` or `auto`.
        prefill_chunk: as for `headprof.compressed`; the full cache's prompt is read as Transformers does.
        full: whether the full cache is run too, with which the others are compared.
        seed: of the random prompts.
        options: parameters of the methods, `None` for their defaults; a method without a parameter ignores it.
        decoding: `decode_budget` and `buffer`, as for `headprof.make_plan`; what is missing keeps its default.
    """

    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    new_tokens: int = 32
    repeats: int = 3
    batch: int = 1
    backends: tuple[str, ...] = ("auto",)
    prefill_chunk: int | None = None
    full: bool = True
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: an unknown method or backend, a budget that cannot be read, or a number that is too small.
        """
        deal_options(self.methods, self.options)
        for budget in self.budgets:
            Budget.parse(budget)
        for backend in self.backends:
            check_backend(backend)
        for what in ("budgets", "backends"):
            if not getattr(self, what):
                raise UsageError(f"There is nothing to run without {what}: name at least one with --{what}.")
        require_at_least(1, lengths=self.lengths, repeats=self.repeats, batch=self.batch)
        require_at_least(2, new_tokens=self.new_tokens)
        if self.prefill_chunk is not None:
            require_at_least(1, prefill_chunk=self.prefill_chunk)

    @property
    def needs_profile(self) -> bool:
        """Whether one of the methods spends its budget by a head profile."""
        return any(find_method(name).budget.profile_scores is not None for name in self.methods)


@dataclass(frozen=True)
class Measurement:
    """What one case took. Numbers are `None` where they could not be measured, all of them where the case failed.

    Attributes:
        method, budget: as requested; `full` and an empty budget for Transformers' own cache.
        backend: of the attention over the compressed cache; for the full cache the model's own attention.
        length: prompt tokens of each sequence.
        batch: sequences.
        prefill_seconds: until the first new token, compression included; median.
        overhead_seconds: of these, spent on choosing and keeping the prompt's tokens; median.
        decode_rate: new tokens per second, over all sequences, at the median time between two tokens.
        cache_bytes: that the cache holds right after the prompt.
        largest_cache_bytes: most that it holds while decoding.
        steadiness: decode rate over the last twelfth of the new tokens, as a multiple of that over the first twelfth
            after the cache had come to its largest size (or after the prompt, if it grows to the end); 1 is steady.
        peak_bytes: most memory in use beyond what was before the run, weights and prompt ids not counted: on CUDA what
            PyTorch allocates, on Linux what is resident.
        step_bytes: that decoding one token per sequence has to read: weights and cache.
        floor_rate: tokens per second if reading these at the measured bandwidth were all there is to do.
        failed: why the case could not be run; empty if it could.
    """

    method: str
    budget: str
    backend: str
    length: int
    batch: int
    prefill_seconds: float | None = None
    overhead_seconds: float | None = None
    decode_rate: float | None = None
    cache_bytes: int | None = None
    largest_cache_bytes: int | None = None
    steadiness: float | None = None
    peak_bytes: int | None = None
    step_bytes: int | None = None
    floor_rate: float | None = None
    failed: str = ""

    @property
    def overhead_share(self) -> float | None:
        """Share of the prefill that compression took, 0 to 1."""
        return _ratio(self.overhead_seconds, self.prefill_seconds)


@dataclass(frozen=True)
class BenchResult:
    """All cases of a run.

    Attributes:
        bandwidth: of the device's memory, bytes per second (see `measure_bandwidth`).
        measurements: the cases, grouped by length, the full cache first.
        environment: device, dtype, versions and date.
    """

    bandwidth: float
    measurements: list[Measurement]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A measurement relative to the full cache of the same length and batch; `None` where either number is missing.

    Attributes:
        decode_ratio: times the full cache's decode rate; above 1 is faster.
        prefill_ratio: times its prefill time; below 1 is faster.
        cache_ratio, peak_ratio: times its bytes.
    """

    measurement: Measurement
    decode_ratio: float | None
    prefill_ratio: float | None
    cache_ratio: float | None
    peak_ratio: float | None


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


def run_bench(
    model: Any,
    max_positions: int,
    profile: HeadProfile | None,
    request: BenchRequest,
    on_progress: Progress = lambda text, done, total: None,
) -> BenchResult:
    """Decode the same random prompts with every case, each repeat of all cases before the next.

    A case that runs out of memory is reported as failed, and the others go on.

    Args:
        model: a Transformers decoder language model.
        max_positions: longest sequence it was made for, in tokens.
        profile: its head profile, for methods that need one.
        request: what to run.
        on_progress: called before each run.

    Raises:
        UsageError: the request cannot be met (see `BenchRequest.check`), or is longer than the model's context.
        ProfileError: a method needs a profile and there is none, or it belongs to another model.
    """
    cases = _cases(model, max_positions, profile, request)
    device = device_of(model)
    prompts = {length: _random_ids(model, request.batch, length, request.seed) for length in request.lengths}
    bandwidth = measure_bandwidth(device)
    warm_ups = [case for case in cases if case.length == min(request.lengths)]
    total, done = len(warm_ups) + request.repeats * len(cases), 0
    for case in warm_ups:
        on_progress(f"Warming up: {case.label}", done, total)
        attempt(partial(_run, model, case, prompts[case.length], 2, request.prefill_chunk))
        done += 1
    for _ in range(request.repeats):
        for case in cases:
            on_progress(case.label, done, total)
            if not case.failed:
                work = partial(_run, model, case, prompts[case.length], request.new_tokens, request.prefill_chunk)
                case.add(attempt(work))
            done += 1
    weights = weight_bytes_per_step(model)
    measurements = [_measured(case, request.batch, weights, bandwidth) for case in cases]
    return BenchResult(bandwidth, measurements, describe_environment(model))


def comparison(result: BenchResult) -> list[Comparison]:
    """Every measurement, the full cache's own included, beside the full cache's of the same length and batch."""
    full = {(each.length, each.batch): each for each in result.measurements if each.method == "full"}
    rows = []
    for each in result.measurements:
        beside = full.get((each.length, each.batch), Measurement("full", "", "", each.length, each.batch))
        rows.append(
            Comparison(
                each,
                decode_ratio=_ratio(each.decode_rate, beside.decode_rate),
                prefill_ratio=_ratio(each.prefill_seconds, beside.prefill_seconds),
                cache_ratio=_ratio(each.cache_bytes, beside.cache_bytes),
                peak_ratio=_ratio(each.peak_bytes, beside.peak_bytes),
            )
        )
    return rows


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
    cases = _cases(model, max_positions, profile, request)
    if device_of(model).type != "cuda":
        raise UsageError("The largest batch can only be found on a CUDA device: choose one with --device cuda.")
    found = []
    for done, case in enumerate(cases):
        on_progress(f"Largest batch: {case.label}", done, len(cases))
        found.append(_largest_batch(model, case, request, at_most))
    return found


def _largest_batch(model: Any, case: _Case, request: BenchRequest, at_most: int) -> LargestBatch:
    ids = _random_ids(model, 1, case.length, request.seed)

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
        work: returns none for numbers that are too large.
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


def weight_bytes_per_step(model: Any) -> int:
    """Bytes of the weights that decoding one token reads, each weight once.

    An input embedding that is not the output's too is not counted, since a step reads one row of it per sequence. The
    experts of a mixture are all counted.
    """
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    read = {id(weight): weight for part in (model.get_decoder(), output) for weight in part.parameters()}
    if output.weight is not embedding:
        read.pop(id(embedding), None)
    return sum(weight.numel() * weight.element_size() for weight in read.values())


@dataclass(frozen=True)
class _Run:
    prefill_seconds: float
    overhead_seconds: float
    gaps: list[float]
    cache_bytes: int
    sizes: list[int]
    peak_bytes: int | None

    @property
    def steadiness(self) -> float | None:
        part = len(self.gaps) // 12
        fill = self.sizes.index(max(self.sizes)) + 1
        first, last = self.gaps[fill if fill + 2 * part <= len(self.gaps) else 0 :][:part], self.gaps[-part:]
        return sum(first) / sum(last) if part else None


@dataclass
class _Case:
    """One way to decode prompts of one length, and how its runs went."""

    method: str
    budget: str
    backend: str
    length: int
    plan: CompressionPlan | None = None
    runs: list[_Run] = field(default_factory=list)
    failed: str = ""

    @property
    def label(self) -> str:
        way = f"{self.method}, budget {self.budget}, {self.backend}" if self.plan else "full cache"
        return f"{way}, {self.length} tokens"

    def add(self, run: _Run | None) -> None:
        if run is None:
            self.failed = "out of memory"
        else:
            self.runs.append(run)

    def new_cache(self, model: Any) -> Cache:
        return DynamicCache(config=model.config) if self.plan is None else HeadCache(self.plan)

    def attending(self, model: Any, prefill_chunk: int | None) -> AbstractContextManager[None]:
        if self.plan is None:
            return nullcontext()
        return attending_ragged(model, backend=self.backend, prefill_chunk=prefill_chunk)


def _cases(model: Any, max_positions: int, profile: HeadProfile | None, request: BenchRequest) -> list[_Case]:
    """All cases, with budgets that are known to suffice; raises what `run_bench` raises."""
    request.check()
    if max(request.lengths) + request.new_tokens > max_positions:
        raise UsageError(
            f"Prompts of {max(request.lengths)} tokens and {request.new_tokens} new ones exceed the {max_positions} "
            "that the model can read: lower --lengths or --new-tokens."
        )
    options = deal_options(request.methods, request.options)
    plans = [
        (name, budget, make_plan(model, profile, method=name, budget=budget, **options[name], **request.decoding))
        for name in request.methods
        if not find_method(name).keeps_everything
        for budget in request.budgets
    ]
    cases = []
    for length in request.lengths:
        if request.full:
            cases.append(_Case("full", "", model.config._attn_implementation, length))
        for name, budget, plan in plans:
            plan.check(length)
            cases += [_Case(name, budget, backend, length, plan) for backend in request.backends]
    return cases


def _run(model: Any, case: _Case, ids: torch.Tensor, new_tokens: int, prefill_chunk: int | None) -> _Run:
    """Read prompts `[B, T]` and decode, once."""
    device = ids.device
    cache = case.new_cache(model)
    clock = _TokenClock(cache, device)
    memory = PeakMemory(device)
    with case.attending(model, prefill_chunk), _timing_compression(device) as compressing:
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
    return _Run(clock.prefilled - start, sum(compressing), clock.gaps, clock.cache_bytes, clock.sizes, memory.used())


def _measured(case: _Case, batch: int, weight_bytes: int, bandwidth: float) -> Measurement:
    measurement = Measurement(case.method, case.budget, case.backend, case.length, batch, failed=case.failed)
    if case.failed:
        return measurement
    runs = case.runs
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    cache_bytes = runs[-1].cache_bytes
    step_bytes = weight_bytes + cache_bytes
    return replace(
        measurement,
        prefill_seconds=median(run.prefill_seconds for run in runs),
        overhead_seconds=median(run.overhead_seconds for run in runs),
        decode_rate=batch / median(gap for run in runs for gap in run.gaps),
        cache_bytes=cache_bytes,
        largest_cache_bytes=max(max(run.sizes) for run in runs),
        steadiness=_median_of([run.steadiness for run in runs]),
        peak_bytes=max(peaks, default=None),
        step_bytes=step_bytes,
        floor_rate=batch * bandwidth / step_bytes,
    )


@dataclass(frozen=True)
class _Decoded:
    rate: float
    cache_bytes: int


@torch.no_grad()
def _decode_copies(
    model: Any, case: _Case, ids: torch.Tensor, batch: int, new_tokens: int, prefill_chunk: int | None
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
def _timing_compression(device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds that each cache layer takes to choose and keep a prompt's tokens."""
    seconds: list[float] = []
    attended = PromptLayer.attended

    def timed(layer: PromptLayer, *args, **kwargs) -> None:
        start = now(device)
        attended(layer, *args, **kwargs)
        seconds.append(now(device) - start)

    PromptLayer.attended = timed  # type: ignore[method-assign, assignment]
    try:
        yield seconds
    finally:
        PromptLayer.attended = attended  # type: ignore[method-assign]


def _random_ids(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids `[batch, length]` on the model's device."""
    vocab_size = HeadShape.from_config(model.config).vocab_size
    ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device_of(model))


def _median_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(value: float | None, beside: float | None) -> float | None:
    return None if value is None or not beside else value / beside
