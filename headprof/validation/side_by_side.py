"""All scores side by side: what their top heads cost, and how alike they and measurements of heads rank these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headprof.profile.influence import InfluenceCurves
from headprof.utils.bootstrap import bootstrap_interval, cluster_sums, resampled_weights
from headprof.utils.intervals import t_95
from headprof.utils.ranks import rank_correlations, spearman, top_overlap
from headprof.validation.causal_check import Validation
from headprof.validation.head_drops import HeadDrops
from headprof.validation.head_sets import CheckedScores

_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What heads were measured to be worth, by which their scores are judged.

    Attributes:
        name: `"retrieval drops"`.
        samples: what each of `n` measurements says of each head, float32 `[n, L, H]`, or `[n, L, K]` for KV heads.
        clusters: which of them go together, such as probes of one context, `n` numbers.
    """

    name: str
    samples: torch.Tensor
    clusters: Sequence[int]

    @property
    def worth(self) -> torch.Tensor:
        """The means, float32 `[L, H]` or `[L, K]`."""
        return self.samples.mean(dim=0)


def drop_yardsticks(drops: HeadDrops) -> list[Yardstick]:
    """What single heads cost, one for each kind of probe."""
    return [Yardstick(f"{kind} drops", *drops.of_kind(kind)) for kind in drops.kinds]


def curve_yardsticks(curves: Mapping[str, InfluenceCurves]) -> list[Yardstick]:
    """What KV heads cost when their rows go, mean over influence curves, by the situation of the question.

    Only the means are known, so that correlations with them have no intervals.
    """
    return [Yardstick(f"curves ({situation})", each.area[None], [0]) for situation, each in curves.items()]


@dataclass(frozen=True)
class RankAgreement:
    """How alike scores and a yardstick rank the heads.

    Attributes:
        scores, yardstick: their names.
        spearman: rank correlation over all heads; NaN if either is constant.
        low, high: its 95 % interval, over other probes; `None` where all measurements are of one cluster.
        top: number of best heads.
        overlap: share of these that both have in common, 0 to 1.
    """

    scores: str
    yardstick: str
    spearman: float
    low: float | None
    high: float | None
    top: int
    overlap: float


def rank_agreement(scores: CheckedScores, yardstick: Yardstick, top: int = 10, seed: int = 0) -> RankAgreement:
    """Compare scores with a yardstick; where that is of KV heads, each has the best score of its query heads.

    The interval is Student's around the estimate, with the standard error from a bootstrap over clusters (Efron and
    Tibshirani 1993, section 12.4). Not the percentiles, which would lie too low: noise in the drops lowers a rank
    correlation, and resampled drops have more of it.
    """
    worth = yardstick.worth
    values = scores.values
    if worth.shape != values.shape:
        values = values.unflatten(1, (worth.shape[1], -1)).amax(dim=-1)
    estimate, low, high = spearman(values, worth), None, None
    error = _bootstrap_error(values, yardstick, seed)
    if error is not None and not math.isnan(estimate):
        half = t_95(len(set(yardstick.clusters)) - 1) * error
        low, high = max(-1.0, estimate - half), min(1.0, estimate + half)
    top = min(top, worth.numel())
    return RankAgreement(scores.name, yardstick.name, estimate, low, high, top, top_overlap(values, worth, top))


def _bootstrap_error(values: torch.Tensor, yardstick: Yardstick, seed: int) -> float | None:
    """Standard error of the rank correlation; `None` for a single cluster."""
    sums, counts = cluster_sums(yardstick.samples.flatten(1), yardstick.clusters)
    if len(counts) < 2:
        return None
    flat, found = values.flatten(), []
    for weights in resampled_weights(len(counts), seed, _RESAMPLES).split(100):
        found.append(rank_correlations(flat, (weights @ sums) / (weights @ counts)[:, None]))
    # A resample of `C` clusters spreads by (C - 1) / C of what other clusters would.
    return float(torch.cat(found).std()) * math.sqrt(len(counts) / (len(counts) - 1))


@dataclass(frozen=True)
class TopLoss:
    """What is lost of the answers to probes of one kind when the top heads of some scores are silent.

    Attributes:
        scores: their name.
        probes: kind of the probes.
        top: number of silent heads.
        lost: accuracy lost, -1 to 1.
        low, high: its 95 % interval, by a paired bootstrap over contexts.
        lost_log_prob: mean log-probability of the right answer that is lost, in nats.
    """

    scores: str
    probes: str
    top: int
    lost: float
    low: float
    high: float
    lost_log_prob: float


def top_loss(result: Validation, probes: str, chosen_by: str) -> TopLoss:
    """What silencing the top heads costs, by probes of one kind."""
    indices = result.probe_indices(probes)
    clusters = [result.probes[index].context for index in indices]
    (row,) = result.rows(chosen_by, "top", result.settings.top)
    lost = result.right[0, indices].double() - result.right[row, indices].double()
    low, high = bootstrap_interval(lost[:, None], clusters, result.settings.seed)
    nats = float((result.log_probs[0, indices] - result.log_probs[row, indices]).mean())
    return TopLoss(chosen_by, probes, result.settings.top, float(lost.mean()), float(low), float(high), nats)


@dataclass(frozen=True)
class SideBySide:
    """Every kind of score beside the others.

    Attributes:
        losses: for each kind of probe, each score's in turn.
        agreements: for each yardstick, each score's in turn; none where no heads were measured.
    """

    losses: tuple[TopLoss, ...]
    agreements: tuple[RankAgreement, ...] = ()

    @property
    def names(self) -> list[str]:
        """The scores."""
        return list(dict.fromkeys(each.scores for each in self.losses))

    def figures(self) -> dict[str, Any]:
        """All of it as plain numbers and texts, for JSON; a correlation that is not a number is `None`."""
        agreements = [asdict(each) for each in self.agreements]
        for each in agreements:
            each["spearman"] = None if math.isnan(each["spearman"]) else each["spearman"]
        return {"losses": [asdict(each) for each in self.losses], "agreements": agreements}


def side_by_side(result: Validation, yardsticks: Sequence[Yardstick]) -> SideBySide:
    """Put all scores of a check beside each other."""
    top, seed = result.settings.top, result.settings.seed
    return SideBySide(
        tuple(top_loss(result, probes, name) for probes in result.probe_kinds for name in result.names),
        tuple(rank_agreement(scores, each, top, seed) for each in yardsticks for scores in result.scores),
    )
