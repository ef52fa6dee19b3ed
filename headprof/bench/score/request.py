"""Which sides `bench score` is asked to run, over which probes."""

from __future__ import annotations

from dataclasses import dataclass

from headprof.bench.measure import require_at_least
from headprof.bench.score.stepwise import Prefill
from headprof.errors import UsageError

PACKED = "packed"
PREFILLS: dict[str, Prefill] = {"stepwise-fast": "fast", "stepwise-attentions": "attentions"}
SIDES = (PACKED, *PREFILLS)
UNPACKED = "unpacked"
"""Not run unless asked for: our scoring over contexts with one needle each, which shows what packing changes."""
TOGETHER = "together"
"""Likewise: packed contexts of one length that share passes, as many as `headprof score` lets on this device."""


@dataclass(frozen=True)
class ScoreBenchRequest:
    """What to compare.

    Attributes:
        lengths: context lengths in tokens, question and answer included.
        probes: at each length, retrieval and reasoning together.
        pack: probes that share one context on our side; `None` to choose it from the length.
        include_failed: compare the scores over all probes too, also those answered wrongly.
        seed: of the probes.
        sides: some of `SIDES`, ours (`packed`) and the papers' procedure with a fast prefill or with one that returns
            all attention (see `StepwiseProber`), `UNPACKED` and `TOGETHER`. Scores are compared with those of `packed`;
            without it, of `UNPACKED`.
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
        unknown = [side for side in self.sides if side not in (*SIDES, UNPACKED, TOGETHER)]
        if unknown or not self.sides:
            raise UsageError(
                f"There is no side {''.join(unknown[:1])!r} to run: use some of "
                f"{', '.join((*SIDES, UNPACKED, TOGETHER))}."
            )
        require_at_least(1, lengths=self.lengths, probes=self.probes, top=self.top)
        if self.pack is not None:
            require_at_least(1, pack=self.pack)
