"""All cases of a request in one run, each repeat of all before the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from headprof.bench.generate.cases import Case, all_cases, random_ids
from headprof.bench.generate.decoding import Run, decode_prompts
from headprof.bench.generate.request import BenchRequest
from headprof.bench.generate.results import BenchResult, Measurement
from headprof.bench.measure import (
    NO_MEMORY,
    Progress,
    attempt,
    describe_environment,
    device_of,
    measure_bandwidth,
)
from headprof.profile.head_profile import HeadProfile


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
    cases = all_cases(model, max_positions, profile, request)
    device = device_of(model)
    prompts = {length: random_ids(model, request.batch, length, request.seed) for length in request.lengths}
    bandwidth = measure_bandwidth(device)

    def decode(case: Case, new_tokens: int) -> Run | None:
        return attempt(partial(decode_prompts, model, case, prompts[case.length], new_tokens, request.prefill_chunk))

    outcomes = [_Outcome(case) for case in cases]
    warm_ups = [case for case in cases if case.length == min(request.lengths)]
    total, done = len(warm_ups) + request.repeats * len(cases), 0
    for case in warm_ups:
        on_progress(f"Warming up: {case.label}", done, total)
        decode(case, 2)
        done += 1
    for _ in range(request.repeats):
        for outcome in outcomes:
            on_progress(outcome.case.label, done, total)
            if not outcome.failed:
                outcome.add(decode(outcome.case, request.new_tokens))
            done += 1
    weights = weight_bytes_per_step(model)
    measurements = [outcome.measured(request.batch, weights, bandwidth) for outcome in outcomes]
    return BenchResult(bandwidth, measurements, describe_environment(model))


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


@dataclass
class _Outcome:
    """How the runs of a case went."""

    case: Case
    runs: list[Run] = field(default_factory=list)
    failed: str = ""

    def add(self, run: Run | None) -> None:
        """Note a run; `None` for one that had not enough memory."""
        if run is None:
            self.failed = NO_MEMORY
        else:
            self.runs.append(run)

    def measured(self, batch: int, weight_bytes: int, bandwidth: float) -> Measurement:
        """Medians over the runs.

        Args:
            batch: sequences.
            weight_bytes: that decoding one token reads.
            bandwidth: of the device's memory, bytes per second.
        """
        case, runs = self.case, self.runs
        measurement = Measurement(case.method, case.budget, case.backend, case.length, batch, failed=self.failed)
        if self.failed:
            return measurement
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


def _median_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
