"""Bars of rank correlations: how alike scores and a yardstick rank the heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headprof.plots.style import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from headprof.validation.side_by_side import RankAgreement

_LEAST = 0.3
"""Of the horizontal axis to the right, however small the correlations are."""


def rank_limits(agreements: Sequence[RankAgreement]) -> tuple[float, float]:
    """Ends of an axis that holds zero, all correlations and their intervals, within -1 and 1."""
    ends = [end for each in agreements for end in (each.spearman, each.low, each.high) if end is not None]
    ends = [end for end in ends if not math.isnan(end)]
    return max(-1.0, min([0.0, *ends]) - 0.05), min(1.0, max([_LEAST, *ends]) + 0.05)


def draw_ranks(
    axes: Axes, agreements: Sequence[RankAgreement], styles: Mapping[str, tuple[str, str]], limits: tuple[float, float]
) -> None:
    """Draw a bar for each score, the first on top, with its 95 % interval; and how many top heads are shared.

    In SVG a bar has the id `rank-<yardstick>-<scores>`, with hyphens for blanks.

    Args:
        axes: where to.
        agreements: of all scores with one yardstick.
        styles: label and color of each score, by its name.
        limits: ends of the axis.
    """
    for row, each in enumerate(agreements):
        known = not math.isnan(each.spearman)
        (bar,) = axes.barh(row, each.spearman if known else 0.0, height=0.6, color=styles[each.scores][1], alpha=0.85)
        bar.set_gid(f"rank-{each.yardstick}-{each.scores}".replace(" ", "-"))
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [row, row], color=INK, linewidth=1.1, solid_capstyle="butt")
        shared = f"{round(each.overlap * each.top)} of {each.top}" if known else "all alike"
        axes.text(1.02, row, shared, transform=axes.get_yaxis_transform(), size=8, va="center", color=MUTED)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set(xlim=limits, ylim=(len(agreements) - 0.4, -0.6))
    axes.set_yticks(range(len(agreements)), [styles[each.scores][0] for each in agreements], parse_math=False)
    axes.tick_params(labelsize=8, length=2, color=MUTED, labelcolor=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("rank correlation (Spearman)", size=8.5, color=MUTED)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
