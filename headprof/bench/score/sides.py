"""The ways to score that are compared, and how each did at one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from statistics import median

import torch

from headprof.bench.calls import Calls, counted
from headprof.bench.measure import NO_MEMORY, PeakMemory, attempt, now
from headprof.bench.score.request import PACKED, PREFILLS, TOGETHER, UNPACKED, ScoreBenchRequest
from headprof.bench.score.stepwise import StepwiseProber
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
from headprof.models.write_path import WritePath
from headprof.probes.build import ProbeBuilder, ProbeContext
from headprof.scoring.prober import Prober, ProbeResult
from headprof.utils.memory import free_bytes
from headprof.utils.units import human_bytes

_FREE_SHARE = 0.8
"""Of the free memory; what is estimated to need more is not tried."""


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
        operators_per_probe: of torch that are issued, views aside; of the first contexts at the shortest length, as
            are the next three.
        reads_per_probe: how often the host waits to read from the device; `None` on a CPU.
        launches_per_probe: kernels and copies that run on a CUDA device; `None` elsewhere.
        busy_share: of the time, in which a CUDA device is at work; `None` elsewhere.
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
    operators_per_probe: float | None = None
    reads_per_probe: float | None = None
    launches_per_probe: float | None = None
    busy_share: float | None = None
    failed: str = ""


def attentions_bytes(shape: HeadShape, length: int, itemsize: int) -> int:
    """Bytes that a prefill takes which returns all attention: every layer's weights and one layer's temporaries.

    These are the logits, the logits with the mask added, and the softmax in float32.
    """
    square = shape.num_heads * length**2
    return square * (shape.num_layers * itemsize + 2 * itemsize + 4)


@dataclass
class Side:
    """One way to score, and how it goes at one length.

    Attributes:
        score: takes a context, or as many as share a pass.
        together: how many contexts share a pass.
        seconds: of each pass.
        peaks: of each turn, where they are known.
        calls: what the first pass of all asked of the device, and how many probes were in it.
    """

    name: str
    length: int
    probes: int
    device: torch.device
    score: Callable[..., list[ProbeResult]]
    together: int = 1
    estimated_bytes: int | None = None
    failed: str = ""
    results: list[ProbeResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seconds_per_probe: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    calls: tuple[Calls, int] | None = None

    @classmethod
    def start(cls, loaded: LoadedModel, request: ScoreBenchRequest, name: str, length: int, lost: str) -> Side:
        """A side that has not begun; it has already failed if it cannot but fail."""
        side = cls(name, length, request.probes, loaded.device, _scoring(loaded, request, name), failed=lost)
        if name == TOGETHER:
            side.together = Prober(loaded.model, loaded.shape).most_together(length)
        if PREFILLS.get(name) == "attentions":
            side.estimated_bytes = attentions_bytes(loaded.shape, length, loaded.dtype.itemsize)
            if not lost and side.estimated_bytes > _FREE_SHARE * free_bytes(loaded.device):
                side.failed = f"would need {human_bytes(side.estimated_bytes)} (estimate)"
        return side

    @property
    def label(self) -> str:
        return f"{self.name}, {self.length} tokens"

    def contexts(self, builder: ProbeBuilder, index: int) -> list[ProbeContext]:
        """What is read in a turn; where contexts share passes, all of these in the turn of the first."""
        if self.name not in (PACKED, TOGETHER):
            return builder.unpacked(index)
        if index % self.together:
            return []
        return [builder.context(each) for each in range(index, min(index + self.together, len(builder)))]

    def _passes(self, contexts: Sequence[ProbeContext]) -> list[Sequence[ProbeContext]]:
        return [contexts[at : at + self.together] for at in range(0, len(contexts), self.together)]

    def warm_up(self, builder: ProbeBuilder) -> None:
        """Score the first contexts once, untimed, and count what that asks of the device."""
        if self.failed:
            return
        first = self._passes(self.contexts(builder, 0))[0]
        done = attempt(partial(counted, partial(self.score, *first), self.device))
        if done is not None:
            self.calls = done[1], sum(len(context.probes) for context in first)

    def run(self, contexts: Sequence[ProbeContext]) -> None:
        """Score contexts, each pass timed, unless the side has failed."""
        if self.failed or not contexts:
            return
        memory = PeakMemory(self.device)
        for part in self._passes(contexts):
            start = now(self.device)
            results = attempt(partial(self.score, *part))
            if results is None:
                self.failed = NO_MEMORY
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
        measured = replace(
            row,
            answered=sum(result.answered for result in self.results),
            seconds=sum(self.seconds),
            seconds_per_probe=median(self.seconds_per_probe),
            probes_per_minute=60 * self.probes / sum(self.seconds),
            peak_bytes=max(self.peaks, default=None),
        )
        return measured if self.calls is None else self._with_calls(measured, *self.calls)

    def _with_calls(self, row: SideResult, calls: Calls, probes: int) -> SideResult:
        return replace(
            row,
            operators_per_probe=calls.operators / probes,
            reads_per_probe=None if calls.reads is None else calls.reads / probes,
            launches_per_probe=None if calls.launches is None else calls.launches / probes,
            busy_share=None if calls.busy_seconds is None else calls.busy_seconds / self.seconds[0],
        )


def _scoring(loaded: LoadedModel, request: ScoreBenchRequest, side: str) -> Callable[..., list[ProbeResult]]:
    """How a side scores the probes of contexts; nothing is kept between two calls but what a run finds out once."""
    if side in (PACKED, TOGETHER, UNPACKED):
        return partial(_score_ours, loaded, Prober(loaded.model, loaded.shape).write_path())
    prober = StepwiseProber(
        loaded.model,
        loaded.shape,
        loaded.tokenizer,
        prefill=PREFILLS[side],
        stop_after_answer=request.stop_after_answer,
    )
    return prober.run


def _score_ours(loaded: LoadedModel, path: WritePath | str, *contexts: ProbeContext) -> list[ProbeResult]:
    with Prober(loaded.model, loaded.shape, write_path=path) as prober:
        return list(chain.from_iterable(prober.run_together(contexts)))
