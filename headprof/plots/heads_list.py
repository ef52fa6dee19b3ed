"""The list of the best heads beneath their panel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from headprof.plots.certainty import interval_of
from headprof.plots.heads_layout import HeadsLayout
from headprof.plots.style import INK, MUTED
from headprof.profile.head_profile import HeadProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_list(
    figure: Figure,
    layout: HeadsLayout,
    panel: int,
    profile: HeadProfile,
    kind: str,
    heads: list[tuple[int, int, float]],
) -> None:
    """List the marked heads under their panel, column by column: rank, head, score and how sure it is."""
    if not heads:
        return
    remark, scores = _listed_scores(profile, kind, heads, with_interval=layout.uncertainty)
    top = layout.list_bottom + layout.list_height - 0.1

    def write(x: float, y: float, text: str, **style: Any) -> None:
        x, y, _, _ = layout.fraction(layout.panel_left(panel) + x, y, 0, 0)
        figure.text(x, y, text, va="center_baseline", size=8, **style)

    write(0, top, f"Top {len(heads)} {kind} heads{remark}", color=MUTED)
    for i, ((layer, head, _), score) in enumerate(zip(heads, scores, strict=True)):
        x = layout.list_width * (i // layout.list_rows)
        y = top - 0.27 - layout.row_height * (i % layout.list_rows)
        write(x + 0.17, y, f"{i + 1}", ha="right", color=MUTED)
        write(x + 0.25, y, f"L{layer} H{head}", weight="bold", color=INK)
        write(x + 0.88, y, score, color=INK)


def _listed_scores(
    profile: HeadProfile, kind: str, heads: list[tuple[int, int, float]], with_interval: bool
) -> tuple[str, list[str]]:
    """What the heading of the list adds, and each head's score with its interval or, where known, standard error."""
    interval = interval_of(profile, kind) if with_interval else None
    if interval is not None:
        ends = [(float(interval[0][layer, head]), float(interval[1][layer, head])) for layer, head, _ in heads]
        decimals = decimals_of([(high - low) / 2 for low, high in ends])
        texts = [
            f"{score:.{decimals}f}  [{low:.{decimals}f}, {high:.{decimals}f}]"
            for (_, _, score), (low, high) in zip(heads, ends, strict=True)
        ]
        return " (score, 95 % interval)", texts
    if (errors := profile.standard_errors.get(kind)) is not None:
        uncertain = [float(errors[layer, head]) for layer, head, _ in heads]
        decimals = decimals_of(uncertain)
        texts = [
            f"{score:.{decimals}f} ± {error:.{decimals}f}"
            for (_, _, score), error in zip(heads, uncertain, strict=True)
        ]
        return " (score ± standard error)", texts
    decimals = decimals_of([heads[0][2] / 10])
    return "", [f"{score:.{decimals}f}" for _, _, score in heads]


def decimals_of(values: list[float]) -> int:
    """Decimals, 2 to 4, that show a digit of the smallest of `values` above 0."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(4, max(2, -math.floor(math.log10(smallest))))
