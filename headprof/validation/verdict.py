"""What the causal check of a profile comes to: accuracy against the number of silent heads, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headprof.utils.bootstrap import bootstrap_interval
from headprof.validation.causal_check import ALL, Validation
from headprof.validation.head_sets import CheckedScores
from headprof.validation.settings import FAMILIES

MIN_LOSS = 0.10
"""Share of the answers that the top heads must cost."""


@dataclass(frozen=True)
class CurvePoint:
    """Answers to probes of one kind while some heads are silent; random picks are pooled.

    Attributes:
        probes: kind of the probes.
        chosen_by, family, count: of the sets of heads.
        right, asked: counts of answers.
        low, high: 95 % interval of the accuracy, 0 to 1, by a bootstrap over contexts.
        log_prob: mean log-probability of the right answer, in nats.
    """

    probes: str
    chosen_by: str
    family: str
    count: int
    right: int
    asked: int
    low: float
    high: float
    log_prob: float

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


@dataclass(frozen=True)
class Verdict:
    """Whether the top heads of a kind cause the answers.

    Attributes:
        kind: of the scores.
        probes: kind of the probes: the same, or `ALL` for scores that have no probes of their own.
        top: number of silent heads.
        baseline: accuracy with nothing silent, 0 to 1.
        lost: what each of `FAMILIES` costs of it.
        low, high: 95 % interval of how much more the top heads cost than random ones, by a paired bootstrap over
            contexts.
    """

    kind: str
    probes: str
    top: int
    baseline: float
    lost: Mapping[str, float]
    low: float
    high: float

    @property
    def confirmed(self) -> bool:
        """The top heads cost at least `MIN_LOSS`, and surely more than random heads."""
        return self.low > 0 and self.lost["top"] >= MIN_LOSS

    def sentence(self) -> str:
        """The verdict in words, with its figures."""
        one = self.top == 1
        heads, others = ("head", "1 random head") if one else (f"{self.top} heads", f"{self.top} random heads")
        left = self.baseline - self.lost["top"]
        told = (
            f"Silencing the top {heads} costs {_points(self.lost['top'])} points ({self.baseline:.0%} to {left:.0%}); "
            f"{others} of the same layer{'s' * (not one)} cost{'s' * one} {_points(self.lost['random'])}"
        )
        judged = f"{self.kind.capitalize()}{', by all probes' * (self.probes == ALL)}"
        start = f"{judged}: {'confirmed' if self.confirmed else 'not confirmed'}. {told}"
        if self.confirmed:
            return f"{start}."
        if self.lost["top"] < MIN_LOSS:
            return f"{start}, where at least {_points(MIN_LOSS)} points count as a cause."
        ends = f"{_points(self.low)} to {_points(self.high)} points"
        return f"{start}, a difference that may be chance (95 % interval {ends})."


def _points(share: float) -> str:
    return str(round(100 * share))


def curve(result: Validation, probes: str, chosen_by: str, family: str) -> list[CurvePoint]:
    """Accuracy on probes of one kind against the number of silent heads, from none.

    Args:
        result: the answers.
        probes: kind of the probes.
        chosen_by: name of the scores that chose the heads.
        family: one of `FAMILIES`.
    """
    indices = result.probe_indices(probes)
    clusters = [result.probes[index].context for index in indices]
    points = []
    for count in (0, *result.counts):
        rows = result.rows(chosen_by, family, count)
        right = result.right[rows][:, indices].float()  # [draws, n]
        low, high = bootstrap_interval(right.mean(dim=0)[:, None], clusters, result.settings.seed)
        log_prob = float(result.log_probs[rows][:, indices].mean())
        points.append(
            CurvePoint(
                probes, chosen_by, family, count, int(right.sum()), right.numel(), float(low), float(high), log_prob
            )
        )
    return points


def verdict(result: Validation, scores: CheckedScores) -> Verdict:
    """Whether the top heads of some scores cause the answers to the probes that judge them."""
    probes, top = result.judges(scores), result.settings.top
    indices = result.probe_indices(probes)
    clusters = [result.probes[index].context for index in indices]
    right = {
        family: result.right[result.rows(scores.name, family, top)][:, indices].double().mean(dim=0)
        for family in FAMILIES
    }  # [n] each
    baseline = float(result.right[0, indices].double().mean())
    low, high = bootstrap_interval((right["random"] - right["top"])[:, None], clusters, result.settings.seed)
    lost = {family: baseline - float(each.mean()) for family, each in right.items()}
    return Verdict(scores.kind, probes, top, baseline, lost, float(low), float(high))


def own_verdicts(result: Validation) -> list[Verdict]:
    """One for each kind of the checked profile's own scores."""
    return [verdict(result, each) for each in result.scores if each.own]


def figures(result: Validation) -> dict[str, Any]:
    """All of it as plain numbers and texts, for JSON."""
    points = [
        point
        for probes in result.probe_kinds
        for name in result.names
        for family in FAMILIES
        for point in curve(result, probes, name, family)
    ]
    return {
        "model": result.model_name,
        "settings": asdict(result.settings),
        "verdicts": [
            asdict(each) | {"confirmed": each.confirmed, "sentence": each.sentence()} for each in own_verdicts(result)
        ],
        "points": [asdict(point) | {"accuracy": point.accuracy} for point in points],
        "sets": [asdict(each) for each in result.sets],
    }
