"""How alike the scores of two sides are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headprof.bench.score.request import PACKED, UNPACKED, ScoreBenchRequest
from headprof.bench.score.sides import Side
from headprof.profile.kinds import PROBE_KINDS
from headprof.scoring.averages import counted_values
from headprof.scoring.prober import ProbeResult
from headprof.utils.ranks import spearman, top_overlap


@dataclass(frozen=True)
class Agreement:
    """How alike the mean scores of our side and another are, over the heads; `None` where a side counts no probe.

    Attributes:
        side, length: which other side, at which length.
        kind: `retrieval` or `reasoning`.
        over: `answered`: each side's mean is over the probes that it counts itself; `all`: over all probes.
        probes: counted on our side, and on the other.
        spearman: rank correlation over the heads; also `None` if all scores of a side are equal.
        overlap: share of the best heads in common, 0 to 1.
    """

    side: str
    length: int
    kind: str
    over: str
    probes: tuple[int, int]
    spearman: float | None
    overlap: float | None


def agreements(sides: Sequence[Side], request: ScoreBenchRequest) -> list[Agreement]:
    """Our side beside each other one that was run to its end, at one length."""
    run = {side.name: side for side in sides if not side.failed}
    ours = run.pop(PACKED, None) or run.pop(UNPACKED, None)
    if ours is None:
        return []
    found = []
    for other in run.values():
        for over in ("answered", "all") if request.include_failed else ("answered",):
            a, b = (_mean_scores(each.results, over == "all") for each in (ours, other))
            found += [_agreement(other, kind, over, a[kind], b[kind], request.top) for kind in PROBE_KINDS if kind in a]
    return found


MeanScores = dict[str, tuple[int, torch.Tensor]]
"""Of each kind: how many probes count, and their mean `[L * H]`."""


def _mean_scores(results: Sequence[ProbeResult], include_failed: bool) -> MeanScores:
    values = counted_values(results, range(len(results)), include_failed)
    return {kind: (len(scores), scores.mean(dim=0)) for kind, (scores, _) in values.items()}


def _agreement(
    other: Side, kind: str, over: str, a: tuple[int, torch.Tensor], b: tuple[int, torch.Tensor], top: int
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
