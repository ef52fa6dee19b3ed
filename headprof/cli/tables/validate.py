"""The table of `headprof validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headprof.cli.tables.cells import Rows

if TYPE_CHECKING:
    from headprof.validation.causal_check import Validation


def validation(result: Validation) -> tuple[list[str], Rows]:
    """Answers while heads are silent: all counts for the heads of the probes' own kind, and the top of the other."""
    from headprof.validation.causal_check import FAMILIES
    from headprof.validation.verdict import curve

    points = []
    for probes in result.probe_kinds:
        points.append(curve(result, probes, result.kinds[0], "top")[0])  # nothing is silent
        for kind in sorted(result.kinds, key=lambda kind: kind != probes):
            for family in FAMILIES if kind == probes else ("top",):
                shown = result.counts if kind == probes else [result.settings.top]
                points += [point for point in curve(result, probes, kind, family) if point.count in shown]
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
