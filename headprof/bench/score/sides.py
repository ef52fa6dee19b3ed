"""The ways to score that are compared, and how each did at one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch

from headprof.bench.measure import NO_MEMORY, PeakMemory, attempt, now
from headprof.bench.score.request import PACKED, PREFILLS, UNPACKED, ScoreBenchRequest
from headprof.bench.score.stepwise import StepwiseProber
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
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
    def start(cls, loaded: LoadedModel, request: ScoreBenchRequest, name: str, length: int, lost: str) -> Side:
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
        return replace(
            row,
            answered=sum(result.answered for result in self.results),
            seconds=sum(self.seconds),
            seconds_per_probe=median(self.seconds_per_probe),
            probes_per_minute=60 * self.probes / sum(self.seconds),
            peak_bytes=max(self.peaks, default=None),
        )


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
