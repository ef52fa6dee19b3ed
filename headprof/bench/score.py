"""Scoring as headprof does it beside the papers' procedure: the same probes, one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from headprof.bench.measure import (
    PeakMemory,
    Progress,
    attempt,
    describe_environment,
    now,
    require_at_least,
)
from headprof.bench.stepwise import Prefill, StepwiseProber
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeBuilder, ProbeContext, ProbeSettings
from headprof.profile.head_profile import KINDS
from headprof.scoring.prober import Prober, ProbeResult
from headprof.scoring.run import counted_values
from headprof.utils.memory import free_bytes
from headprof.utils.ranks import spearman, top_overlap
from headprof.utils.units import human_bytes

PACKED = "packed"
PREFILLS: dict[str, Prefill] = {"stepwise-fast": "fast", "stepwise-attentions": "attentions"}
SIDES = (PACKED, *PREFILLS)
UNPACKED = "unpacked"
"""Not run unless asked for: our scoring over contexts with one needle each, which shows what packing changes."""

_FREE_SHARE = 0.8
"""Of the free memory; what is estimated to need more is not tried."""


@dataclass(frozen=True)
class ScoreBenchRequest:
    """What to compare.

    Attributes:
        lengths: context lengths in tokens, question and answer included.
        probes: at each length, retrieval and reasoning together.
        pack: probes that share one context on our side; none to choose it from the length.
        include_failed: compare the scores over all probes too, also those answered wrongly.
        seed: of the probes.
        sides: some of `SIDES`, ours (`packed`) and the papers' procedure with a fast prefill or with one that returns
            all attention (see `StepwiseProber`), and `UNPACKED`. Scores are compared with those of `packed`; without
            it, of `UNPACKED`.
        top: heads whose overlap is reported.
        stop_after_answer: see `StepwiseProber`.
    """

    lengths: tuple[int, ...] = (1024,)
    probes: int = 48
    pack: int | None = None
    include_failed: bool = False
    seed: int = 0
    sides: tuple[str, ...] = SIDES
    top: int = 10
    stop_after_answer: bool = False

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: an unknown side, no side, or a number that is too small.
        """
        unknown = [side for side in self.sides if side not in (*SIDES, UNPACKED)]
        if unknown or not self.sides:
            raise UsageError(
                f"There is no side {''.join(unknown[:1])!r} to run: use some of {', '.join((*SIDES, UNPACKED))}."
            )
        require_at_least(1, lengths=self.lengths, probes=self.probes, top=self.top)
        if self.pack is not None:
            require_at_least(1, pack=self.pack)


@dataclass(frozen=True)
class SideResult:
    """How one side did at one length. Numbers are `None` where they could not be measured.

    Attributes:
        side, length: as requested.
        probes, answered: probes asked, and answered right: token for token with the right answer given to the model on
            our side, with more than half of its words on the others.
        seconds: for all probes.
        seconds_per_probe: the median; a context's seconds are shared by its probes.
        probes_per_minute: over all probes.
        packed_speedup: how many times as many probes per minute our side did.
        peak_bytes: most memory in use beyond what was before a context, weights not counted (see `PeakMemory`).
        estimated_bytes: what a prefill that returns all attention takes, by calculation (see `attentions_bytes`).
        failed: why the side was not run to its end; empty if it was.
    """

    side: str
    length: int
    probes: int
    answered: int | None = None
    seconds: float | None = None
    seconds_per_probe: float | None = None
    probes_per_minute: float | None = None
    packed_speedup: float | None = None
    peak_bytes: int | None = None
    estimated_bytes: int | None = None
    failed: str = ""


@dataclass(frozen=True)
class Agreement:
    """How alike the mean scores of our side and another are, over the heads; `None` where a side counts no probe.

    Attributes:
        side, length: which other side, at which length.
        kind: `retrieval` or `reasoning`.
        over: `answered`: each side's mean is over the probes that it counts itself; `all`: over all probes.
        probes: counted on our side, and on the other.
        spearman: rank correlation over the heads; also none if all scores of a side are equal.
        overlap: share of the best heads in common, 0 to 1.
    """

    side: str
    length: int
    kind: str
    over: str
    probes: tuple[int, int]
    spearman: float | None
    overlap: float | None


@dataclass(frozen=True)
class MemoryLine:
    """The least-squares line through peak memory at several lengths.

    Attributes:
        bytes_per_token: its slope.
        r_squared: share of the variance that it explains; 1 is a line.
        lengths: how many it is drawn through.
    """

    bytes_per_token: float
    r_squared: float
    lengths: int


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
    done, results, agreements = 0, [], []
    lost: dict[str, str] = {}
    for number, (length, builder) in enumerate(builders.items()):
        sides = [_Side.start(loaded, request, name, length, lost.get(name, "")) for name in request.sides]
        if number == 0:
            for side in sides:
                on_progress(f"Warming up: {side.label}", done, total)
                side.warm_up(builder)
        for index in range(len(builder)):
            for side in sides if index % 2 == 0 else reversed(sides):
                on_progress(side.label, done, total)
                side.run(side.contexts(builder, index))
                done += 1
        lost |= {side.name: f"out of memory at {length}" for side in sides if side.failed == _OUT_OF_MEMORY}
        results += _with_speedups([side.result() for side in sides])
        agreements += _agreements(sides, request)
    return ScoreBenchResult(request.top, results, agreements, describe_environment(loaded.model))


def memory_slope(points: Sequence[tuple[int, int]]) -> MemoryLine | None:
    """The least-squares line of peak bytes against length; none for fewer than three lengths, which prove no line."""
    if len(points) < 3:
        return None
    lengths, peaks = np.array(points, dtype=np.float64).T
    slope, start = np.polyfit(lengths, peaks, 1)
    spread = ((peaks - peaks.mean()) ** 2).sum()
    missed = ((peaks - start - slope * lengths) ** 2).sum()
    return MemoryLine(float(slope), float(1 - missed / spread) if spread else 1.0, len(points))


def limit_length(points: Sequence[tuple[int, int]], limit_bytes: float) -> int | None:
    """The length at which the least-squares parabola through peak memory comes to `limit_bytes`: an extrapolation.

    Args:
        points: length in tokens and peak bytes.
        limit_bytes: as many as there are beside the weights.

    Returns:
        tokens; none for fewer than three lengths, or if the parabola does not get there within a hundred times the
        longest of them.
    """
    if len(points) < 3:
        return None
    lengths, peaks = np.array(points, dtype=np.float64).T
    roots = np.roots(np.polyfit(lengths, peaks, 2) - [0, 0, limit_bytes])
    reached = [root.real for root in roots if abs(root.imag) < 1e-6 and 0 < root.real < 100 * lengths.max()]
    return int(min(reached)) if reached else None


def attentions_bytes(shape: HeadShape, length: int, itemsize: int) -> int:
    """Bytes that a prefill takes which returns all attention: every layer's weights and one layer's temporaries.

    These are the logits, the logits with the mask added, and the softmax in float32.
    """
    square = shape.num_heads * length**2
    return square * (shape.num_layers * itemsize + 2 * itemsize + 4)


_OUT_OF_MEMORY = "out of memory"


@dataclass
class _Side:
    """One way to score, and how it goes at one length.

    Attributes:
        seconds: of each context.
        peaks: of each turn, where they are known.
    """

    name: str
    length: int
    probes: int
    device: torch.device
    score: Callable[[ProbeContext], list[ProbeResult]]
    estimated_bytes: int | None = None
    failed: str = ""
    results: list[ProbeResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seconds_per_probe: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, loaded: LoadedModel, request: ScoreBenchRequest, name: str, length: int, lost: str) -> _Side:
        """A side that has not begun; it has already failed if it cannot but fail."""
        side = cls(name, length, request.probes, loaded.device, _scoring(loaded, request, name), failed=lost)
        if PREFILLS.get(name) == "attentions":
            side.estimated_bytes = attentions_bytes(loaded.shape, length, loaded.dtype.itemsize)
            if not lost and side.estimated_bytes > _FREE_SHARE * free_bytes(loaded.device):
                side.failed = f"would need {human_bytes(side.estimated_bytes)} (estimate)"
        return side

    @property
    def label(self) -> str:
        return f"{self.name}, {self.length} tokens"

    def contexts(self, builder: ProbeBuilder, index: int) -> list[ProbeContext]:
        return [builder.context(index)] if self.name == PACKED else builder.unpacked(index)

    def warm_up(self, builder: ProbeBuilder) -> None:
        if not self.failed:
            attempt(partial(self.score, self.contexts(builder, 0)[0]))

    def run(self, contexts: Sequence[ProbeContext]) -> None:
        """Score contexts, each timed, unless the side has failed."""
        if self.failed:
            return
        memory = PeakMemory(self.device)
        for context in contexts:
            start = now(self.device)
            results = attempt(partial(self.score, context))
            if results is None:
                self.failed = _OUT_OF_MEMORY
                return
            seconds = now(self.device) - start
            self.seconds.append(seconds)
            self.seconds_per_probe += [seconds / len(results)] * len(results)
            self.results += results
        peak = memory.used()
        self.peaks += [] if peak is None else [peak]

    def result(self) -> SideResult:
        row = SideResult(self.name, self.length, self.probes, estimated_bytes=self.estimated_bytes, failed=self.failed)
        if self.failed:
            return row
        return replace(
            row,
            answered=sum(result.answered for result in self.results),
            seconds=sum(self.seconds),
            seconds_per_probe=median(self.seconds_per_probe),
            probes_per_minute=60 * self.probes / sum(self.seconds),
            peak_bytes=max(self.peaks, default=None),
        )


def _builder(loaded: LoadedModel, request: ScoreBenchRequest, length: int) -> ProbeBuilder:
    settings = ProbeSettings(request.probes, (length,), needles_per_context=request.pack, seed=request.seed)
    return ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)


def _scoring(loaded: LoadedModel, request: ScoreBenchRequest, side: str) -> Callable[[ProbeContext], list[ProbeResult]]:
    """How a side scores the probes of a context; nothing is kept between two contexts."""
    if side in (PACKED, UNPACKED):
        return partial(_score_ours, loaded)
    prober = StepwiseProber(
        loaded.model,
        loaded.shape,
        loaded.tokenizer,
        prefill=PREFILLS[side],
        stop_after_answer=request.stop_after_answer,
    )
    return prober.run


def _score_ours(loaded: LoadedModel, context: ProbeContext) -> list[ProbeResult]:
    with Prober(loaded.model, loaded.shape) as prober:
        return prober.run(context)


def _with_speedups(rows: Sequence[SideResult]) -> list[SideResult]:
    """The rows of one length, each with our side's speed as a multiple of its own."""
    ours = next((row.seconds for row in rows if row.side == PACKED), None)
    if ours is None:
        return list(rows)
    return [row if row.seconds is None else replace(row, packed_speedup=row.seconds / ours) for row in rows]


def _agreements(sides: Sequence[_Side], request: ScoreBenchRequest) -> list[Agreement]:
    """Our side beside each other one that was run to its end, at one length."""
    run = {side.name: side for side in sides if not side.failed}
    ours = run.pop(PACKED, None) or run.pop(UNPACKED, None)
    if ours is None:
        return []
    found = []
    for other in run.values():
        for over in ("answered", "all") if request.include_failed else ("answered",):
            a, b = (_mean_scores(each.results, over == "all") for each in (ours, other))
            found += [_agreement(other, kind, over, a[kind], b[kind], request.top) for kind in KINDS if kind in a]
    return found


MeanScores = dict[str, tuple[int, torch.Tensor]]
"""Of each kind: how many probes count, and their mean `[L * H]`."""


def _mean_scores(results: Sequence[ProbeResult], include_failed: bool) -> MeanScores:
    values = counted_values(results, range(len(results)), include_failed)
    return {kind: (len(scores), scores.mean(dim=0)) for kind, (scores, _) in values.items()}


def _agreement(
    other: _Side, kind: str, over: str, a: tuple[int, torch.Tensor], b: tuple[int, torch.Tensor], top: int
) -> Agreement:
    (count_a, mean_a), (count_b, mean_b) = a, b
    agreement = Agreement(other.name, other.length, kind, over, (count_a, count_b), None, None)
    if not count_a or not count_b:
        return agreement
    correlation = spearman(mean_a, mean_b)
    return replace(
        agreement,
        spearman=None if math.isnan(correlation) else correlation,
        overlap=top_overlap(mean_a, mean_b, top),
    )
