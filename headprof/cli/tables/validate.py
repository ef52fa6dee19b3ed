"""The tables of `headprof validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headprof.cli.tables.cells import Rows

if TYPE_CHECKING:
    from headprof.validation.causal_check import Validation
    from headprof.validation.side_by_side import RankAgreement, SideBySide, TopLoss


def validation(result: Validation) -> tuple[list[str], Rows]:
    """Answers while heads are silent: all counts for the heads of the probes' own kind, and the top of the others."""
    from headprof.validation.settings import FAMILIES
    from headprof.validation.verdict import curve

    points = []
    for probes in result.probe_kinds:
        points.append(curve(result, probes, result.names[0], "top")[0])  # nothing is silent
        for name in sorted(result.names, key=lambda name: name != probes):
            for family in FAMILIES if name == probes else ("top",):
                shown = result.counts if name == probes else [result.settings.top]
                points += [point for point in curve(result, probes, name, family) if point.count in shown]
    rows = [
        [
            point.probes,
            f"{point.family} {point.chosen_by}" if point.count else "none",
            str(point.count),
            f"{point.right}/{point.asked}",
            f"{point.accuracy:.0%}",
            f"{point.low:.0%} to {point.high:.0%}",
            f"{point.log_prob:.2f}",
        ]
        for point in points
    ]
    return ["probes", "silent heads", "k", "right", "accuracy", "95 % interval", "log-probability"], rows


def side_by_side(found: SideBySide) -> tuple[list[str], Rows, str]:
    """A row for each kind of score: what its top heads cost; in brackets 95 % intervals."""
    columns, rows = ["scores"], {name: [name] for name in found.names}
    for probes in dict.fromkeys(loss.probes for loss in found.losses):
        columns.append(f"{probes} points")
        for loss in found.losses:
            if loss.probes == probes:
                rows[loss.scores].append(_points(loss))
    title = f"Scores side by side: points lost with the top {found.losses[0].top} silent"
    return columns, list(rows.values()), title


def agreements(found: SideBySide) -> tuple[list[str], Rows, str] | None:
    """How alike scores and what heads cost alone rank them, in brackets 95 % intervals; `None` if that is unknown."""
    rows = [
        [each.yardstick, each.scores, _rank(each), f"{round(each.overlap * each.top)} of {each.top}"]
        for each in found.agreements
    ]
    columns = ["what heads cost", "scores", "rank correlation", "top heads shared"]
    return (columns, rows, "Scores beside what single heads cost") if rows else None


def _points(loss: TopLoss) -> str:
    return f"{100 * loss.lost:.0f} ({100 * loss.low:.0f} to {100 * loss.high:.0f})"


def _rank(agreement: RankAgreement) -> str:
    interval = "" if agreement.low is None else f" ({agreement.low:.2f} to {agreement.high:.2f})"
    return f"{agreement.spearman:.2f}{interval}"
