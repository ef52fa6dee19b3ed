"""Scoring as headprof does it beside the papers' procedure: the same probes, one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headprof.bench.measure import NO_MEMORY, Progress, describe_environment
from headprof.bench.score.agreement import Agreement, agreements
from headprof.bench.score.request import PACKED, ScoreBenchRequest
from headprof.bench.score.sides import Side, SideResult
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings


@dataclass(frozen=True)
class ScoreBenchResult:
    """All lengths of a run.

    Attributes:
        top: heads whose overlap is reported.
        sides: grouped by length.
        agreements: of our side with each other.
        environment: device, dtype, versions and date.
    """

    top: int
    sides: list[SideResult]
    agreements: list[Agreement]
    environment: dict[str, Any]

    def memory(self, side: str) -> list[tuple[int, int]]:
        """Length and peak bytes wherever the side was measured."""
        return [(e.length, e.peak_bytes) for e in self.sides if e.side == side and e.peak_bytes is not None]


def run_score_bench(
    loaded: LoadedModel,
    request: ScoreBenchRequest,
    on_progress: Progress = lambda text, done, total: None,
) -> ScoreBenchResult:
    """Score the same probes with every side, context by context in turn, each time from the other end.

    Our side reads a context once and asks its probes with the right answer given. The others read, for each of these
    probes, a context as long that hides its needle alone (`ProbeBuilder.unpacked`). Building the probes is not timed.

    A side that runs out of memory is not run at longer lengths. One that would need more than four fifths of the free
    memory for the attention of its prefill is not run at all.

    Args:
        loaded: model and tokenizer.
        request: what to compare.
        on_progress: called before each side's turn at a context.

    Raises:
        UsageError: see `ScoreBenchRequest.check`, or the probes do not fit into a length or the model's positions.
    """
    request.check()
    builders = {length: _builder(loaded, request, length) for length in sorted(request.lengths)}
    total = sum(map(len, builders.values())) * len(request.sides)
    done, results, found = 0, [], []
    lost: dict[str, str] = {}
    for number, (length, builder) in enumerate(builders.items()):
        sides = [Side.start(loaded, request, name, length, lost.get(name, "")) for name in request.sides]
        if number == 0:
            for side in sides:
                on_progress(f"Warming up: {side.label}", done, total)
                side.warm_up(builder)
        for index in range(len(builder)):
            for side in sides if index % 2 == 0 else reversed(sides):
                on_progress(side.label, done, total)
                side.run(side.contexts(builder, index))
                done += 1
        lost |= {side.name: f"out of memory at {length}" for side in sides if side.failed == NO_MEMORY}
        results += _with_speedups([side.result() for side in sides])
        found += agreements(sides, request)
    return ScoreBenchResult(request.top, results, found, describe_environment(loaded.model))


def _builder(loaded: LoadedModel, request: ScoreBenchRequest, length: int) -> ProbeBuilder:
    settings = ProbeSettings(request.probes, (length,), needles_per_context=request.pack, seed=request.seed)
    return ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)


def _with_speedups(rows: Sequence[SideResult]) -> list[SideResult]:
    """The rows of one length, each with our side's speed as a multiple of its own."""
    ours = next((row.seconds for row in rows if row.side == PACKED), None)
    if ours is None:
        return list(rows)
    return [row if row.seconds is None else replace(row, packed_speedup=row.seconds / ours) for row in rows]
