"""All cases of a request in one run, length by length, each repeat of all before the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

from headprof.bench.generate.cases import Case, all_cases, random_ids
from headprof.bench.generate.decoding import Run, decode_prompts
from headprof.bench.generate.full_cache import COMPILED_WARM_UP, forget_compiled, free_memory
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
from headprof.errors import ModelError
from headprof.profile.head_profile import HeadProfile


def run_bench(
    model: Any,
    max_positions: int,
    profile: HeadProfile | None,
    request: BenchRequest,
    on_progress: Progress = lambda text, done, total: None,
    on_result: Callable[[BenchResult], object] = lambda result: None,
) -> BenchResult:
    """Decode the same random prompts with every case, length by length, each repeat of all cases before the next.

    All cases are warmed up at the shortest length, and those that are compiled for their length at each. A case that
    runs out of memory, or whose steps cannot be run as asked, is reported as failed, and the others go on.

    Args:
        model: a Transformers decoder language model.
        max_positions: longest sequence it was made for, in tokens.
        profile: its head profile, for methods that need one.
        request: what to run.
        on_progress: called before each run.
        on_result: called after each length with what has been measured so far.

    Raises:
        UsageError: the request cannot be met (see `BenchRequest.check`), or is longer than the model's context.
        ProfileError: a method needs a profile and there is none, or it belongs to another model.
    """
    cases = all_cases(model, max_positions, profile, request)
    device = device_of(model)
    bandwidth, weights, environment = (
        measure_bandwidth(device),
        weight_bytes_per_step(model),
        describe_environment(model),
    )
    measured: list[Measurement] = []
    outcomes = [_Outcome(case) for case in cases]
    rounds = [_Round(outcomes, length, request) for length in dict.fromkeys(request.lengths)]
    total, done = sum(each.total for each in rounds), 0
    room = max(request.new_tokens, COMPILED_WARM_UP)  # what is compiled serves caches of one size
    for each in rounds:
        ids = random_ids(model, request.batch, each.length, request.seed)
        for outcome, label, new_tokens, counts in each.runs():
            on_progress(label, done, total)
            done += 1
            if not outcome.failed:
                work = partial(decode_prompts, model, outcome.case, ids, new_tokens, request.prefill_chunk, room)
                outcome.run(work, counts)
        if any(outcome.case.compiles_full for outcome in each.outcomes):
            forget_compiled(model)
        free_memory()
        measured += [outcome.measured(request.batch, weights, bandwidth) for outcome in each.outcomes]
        on_result(BenchResult(bandwidth, list(measured), environment))
    return BenchResult(bandwidth, measured, environment)


class _Round:
    """All runs of the cases of one length."""

    def __init__(self, outcomes: Sequence[_Outcome], length: int, request: BenchRequest):
        self.length, self.request = length, request
        self.outcomes = [outcome for outcome in outcomes if outcome.case.length == length]
        first = request.warm_up and length == min(request.lengths)
        self.warmed_up = [outcome for outcome in self.outcomes if first or outcome.case.compiles_full]

    @property
    def total(self) -> int:
        return len(self.warmed_up) + self.request.repeats * len(self.outcomes)

    def runs(self) -> Iterator[tuple[_Outcome, str, int, bool]]:
        """Whose turn it is, what to call that, how many tokens it decodes, and whether its time counts."""
        for outcome in self.warmed_up:
            case = outcome.case
            yield outcome, f"Warming up: {case.label}", COMPILED_WARM_UP if case.compiles_full else 2, False
        for _ in range(self.request.repeats):
            for outcome in self.outcomes:
                yield outcome, outcome.case.label, self.request.new_tokens, True


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

    def run(self, work: Callable[[], Run], counts: bool = True) -> None:
        """Run the case, whose time may not count; note why, if it cannot be run."""
        try:
            done = attempt(work)
        except ModelError as error:  # steps that cannot be run as they were asked for
            self.failed = str(error)
            return
        if done is None:
            self.failed = NO_MEMORY
        elif counts:
            self.runs.append(done)

    def measured(self, batch: int, weight_bytes: int, bandwidth: float) -> Measurement:
        """Medians over the runs.

        Args:
            batch: sequences.
            weight_bytes: that decoding one token reads.
            bandwidth: of the device's memory, bytes per second.
        """
        case, runs = self.case, self.runs
        measurement = Measurement(
            case.method, case.budget, case.backend, case.length, batch, failed=self.failed, step=case.step
        )
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
