"""The picture of an evaluation: what each method scores at each budget, beside the full cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import UsageError
from headprof.plots.labels import spread
from headprof.plots.method_styles import marker_of, style_of
from headprof.plots.style import (
    INK,
    MUTED,
    checked_path,
    even_ticks,
    lighten_axes,
    new_figure,
    save_picture,
    write_heading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headprof.evaluation.results import Cell

LEAST_DIVERGENCE = 1e-5
"""Nats; smaller divergences are rounding errors, and drawn here since a logarithmic axis has no zero."""


@dataclass(frozen=True)
class _Measure:
    """What is drawn upwards: the words for it, its interval, and whether on a logarithmic axis or in percent."""

    heading: str
    label: str
    interval: Callable[[Cell], tuple[float, float] | None]
    logarithmic: bool = False


MEASURES = {
    "score": _Measure("Score by cache budget", "score", lambda cell: cell.interval),
    "divergence": _Measure("Divergence from the full cache", "nats", lambda cell: cell.divergence_interval, True),
    "agreement": _Measure("Same token as the full cache", "same token", lambda cell: None),
}

# Inches.
_PANEL_WIDTH, _LEAST_HEIGHT, _LINE, _LETTER, _ACROSS = 2.9, 2.5, 0.148, 0.062, 3
_LEFT, _RIGHT, _TOP, _ABOVE, _BELOW, _GAP = 0.72, 0.1, 0.62, 0.5, 0.52, 0.3


def budget_order(budgets: Iterable[str]) -> list[str]:
    """Each budget once: by size where all are token counts, else in the order given. The full cache has none."""
    found = [budget for budget in dict.fromkeys(budgets) if budget]
    return sorted(found, key=int) if all(budget.isdecimal() for budget in found) else found


def scores_plot(cells: Sequence[Cell], path: str | Path, measure: str = "score", title: str = "") -> Path:
    """Draw a measure against the budget, a line for each method, and write it atomically.

    A panel for each task and group; bars are 95 % intervals. The full cache is the dashed line, its interval the band.
    Equal cells give equal bytes. In SVG the panels have the ids `panel-1`, `panel-2` ..., and their lines
    `line-1-<method>` ....

    Args:
        cells: what to draw; `headprof.evaluation.results.main_cells` chooses those of interest.
        path: the picture, PNG or SVG by its suffix.
        measure: `"score"`, `"divergence"` (in nats, on a logarithmic axis) or `"agreement"`.
        title: stands above in place of the measure's name.

    Raises:
        UsageError: another suffix or measure, or no cell of a compressed cache has this measure.
        HeadprofError: the disk refused.
    """
    path = checked_path(path)
    if measure not in MEASURES:
        raise UsageError(f"There is no measure {measure!r}: choose one of {', '.join(MEASURES)}.")
    # What the full cache differs from itself is no news.
    shown = [each for each in cells if getattr(each, measure) is not None and (each.budget or measure == "score")]
    with_line = {(cell.task, cell.group) for cell in shown if cell.budget}
    shown = [cell for cell in shown if (cell.task, cell.group) in with_line]
    if not shown:
        raise UsageError(
            f"No compressed cache has a {measure} that could be drawn: evaluate one, and the method full beside it."
        )
    save_picture(lambda: _draw(shown, measure, title), path)
    return path


def _draw(cells: Sequence[Cell], measure: str, title: str) -> Figure:
    import matplotlib

    panels: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        panels.setdefault((cell.task, cell.group), []).append(cell)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    across, down = min(_ACROSS, len(panels)), math.ceil(len(panels) / _ACROSS)
    tall = max(_LEAST_HEIGHT, _LINE * (len(methods) + 1))
    slot = _PANEL_WIDTH + 0.42 + _LETTER * max(map(len, (*methods, "full cache")))
    width = _LEFT + across * (slot + _GAP) - _GAP + _RIGHT
    height = _TOP + down * (_ABOVE + tall + _BELOW)
    with matplotlib.rc_context({"text.parse_math": False}):  # a name is no formula
        figure = new_figure(width, height)
        _write_heading(figure, measure, title, any(cell.method == "full" for cell in cells))
        for number, own in enumerate(panels.values()):
            left = _LEFT + number % across * (slot + _GAP)
            bottom = height - _TOP - (number // across + 1) * (_ABOVE + tall + _BELOW) + _BELOW
            axes = figure.add_axes((left / width, bottom / height, _PANEL_WIDTH / width, tall / height))
            axes.set_gid(f"panel-{number + 1}")
            _scale(axes, cells, measure, tall)
            _draw_panel(axes, own, measure, methods, number + 1, tall)
            _label_axes(axes, own[0], len({each.questions for each in own}) == 1, tall, first=number % across == 0)
            if number % across == 0:
                axes.set_ylabel(MEASURES[measure].label, size=8.5, color=MUTED)
    return figure


def _write_heading(figure: Figure, measure: str, title: str, has_full: bool) -> None:
    facts = [] if measure == "agreement" else ["bars are 95 % intervals"]
    facts += ["dashed: the full cache and its interval"] if has_full else []
    facts += ["logarithmic"] if MEASURES[measure].logarithmic else []
    write_heading(figure, _LEFT, title or MEASURES[measure].heading, "  ·  ".join(facts), 8.5)


def _scale(axes: Axes, cells: Sequence[Cell], measure: str, inches: float) -> None:
    """The vertical axis, the same in all panels."""
    values = [getattr(cell, measure) for cell in cells]
    highest = max([*values, *(ends[1] for cell in cells if (ends := MEASURES[measure].interval(cell)))])
    if MEASURES[measure].logarithmic:
        low = max(LEAST_DIVERGENCE, min(values)) / 1.25
        high = max(highest, 4 * low) * 1.25
        digits = (1,) if high / low > 300 else (1, 2, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [each for power in powers for digit in digits if low <= (each := digit * 10.0**power) <= high]
        axes.set(yscale="log", ylim=(low, high))
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{tick:.10f}".rstrip("0").rstrip(".") for tick in ticks])
    else:
        top = 1.0 if highest > 0.8 else max(0.1, math.ceil(10 * highest) / 10)
        axes.set_ylim(0, 1.02 * top)
        ticks = even_ticks(top, inches)
        axes.set_yticks(ticks, [f"{100 * tick:.4g} %" for tick in ticks])


def _draw_panel(
    axes: Axes, cells: Sequence[Cell], measure: str, methods: Sequence[str], number: int, inches: float
) -> None:
    offsets = _place_budgets(axes, budget_order(cell.budget for cell in cells))
    compressed = [method for method in methods if any(each.method == method and each.budget for each in cells)]
    apart = 0.5 * _least_step(offsets) / len(compressed)
    ends: dict[str, tuple[float, float]] = {}
    for rank, method in enumerate(compressed):
        found = {cell.budget: cell for cell in cells if cell.method == method}
        line = [found[budget] for budget in offsets if budget in found]
        dodge = apart * (rank - (len(compressed) - 1) / 2)
        dodged = [offset + dodge for budget, offset in offsets.items() if budget in found]
        _draw_line(axes, dodged, line, measure, f"line-{number}-{method}")
        ends[method] = (dodged[-1], _height(line[-1], measure))
    for cell in cells:
        if not cell.budget:
            if cell.interval is not None:
                axes.axhspan(*cell.interval, color=INK, alpha=0.07, linewidth=0)
            gid = f"line-{number}-{cell.method}"
            axes.axhline(cell.score, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=3, gid=gid)
            ends[cell.method] = (axes.get_xlim()[1], cell.score)
    _label_lines(axes, ends, inches)


def _height(cell: Cell, measure: str) -> float:
    value = getattr(cell, measure)
    return max(LEAST_DIVERGENCE, value) if MEASURES[measure].logarithmic else value


def _place_budgets(axes: Axes, budgets: Sequence[str]) -> dict[str, float]:
    """Where each budget stands on the horizontal axis, which gets its ticks."""
    counts = all(budget.isdecimal() and int(budget) for budget in budgets)
    offsets = {budget: math.log2(int(budget)) if counts else float(i) for i, budget in enumerate(budgets)}
    first, last = min(offsets.values()), max(offsets.values())
    margin = 0.4 * _least_step(offsets)
    axes.set_xlim(first - margin, last + margin)
    room = _LETTER * max(map(len, budgets)) / _PANEL_WIDTH * (last - first + 2 * margin)
    shown: list[str] = []
    for budget, offset in offsets.items():  # where labels would overlap, the left one stays
        if not shown or offset - offsets[shown[-1]] > room:
            shown.append(budget)
    axes.set_xticks([offsets[budget] for budget in shown], shown)
    return offsets


def _least_step(offsets: Mapping[str, float]) -> float:
    return min((right - left for left, right in pairwise(sorted(offsets.values()))), default=1.0)


def _draw_line(axes: Axes, across: Sequence[float], cells: Sequence[Cell], measure: str, gid: str) -> None:
    style = style_of(cells[0].method)
    for offset, cell in zip(across, cells, strict=True):
        if ends := MEASURES[measure].interval(cell):
            bar: dict[str, Any] = {"linewidth": 1.0 if style.strong else 0.7, "alpha": 0.75 if style.strong else 0.5}
            low = max(ends[0], axes.get_ylim()[0])
            axes.plot([offset, offset], [low, ends[1]], color=style.color, zorder=4, solid_capstyle="butt", **bar)
    axes.plot(
        across,
        [_height(cell, measure) for cell in cells],
        color=style.color,
        linewidth=2.0 if style.strong else 1.1,
        linestyle=(0, (5, 1.5)) if style.hollow else "-",
        zorder=6 if style.strong else 5,
        clip_on=False,
        gid=gid,
        **marker_of(style),
    )


def _label_lines(axes: Axes, ends: Mapping[str, tuple[float, float]], inches: float) -> None:
    """A name and its marker beside the end of each line, moved up or down until none covers another."""
    to_share = axes.transScale + axes.transLimits
    shares = {method: to_share.transform(end)[1] for method, end in ends.items()}
    placed = spread(list(shares.values()), _LINE / inches, -0.02, 1.02)
    inch = 1 / _PANEL_WIDTH
    inside = axes.transAxes
    for (method, end), height in zip(ends.items(), placed, strict=True):
        style = style_of(method)
        start = to_share.transform(end)
        axes.plot(
            [start[0], 1 + 0.1 * inch],
            [start[1], height],
            transform=inside,
            color=style.color,
            linewidth=0.6,
            alpha=0.55,
            clip_on=False,
            zorder=2,
        )
        if style.marker:
            axes.plot([1 + 0.16 * inch], [height], transform=inside, clip_on=False, **marker_of(style))
        else:
            axes.plot([1 + 0.1 * inch, 1 + 0.22 * inch], [height] * 2, transform=inside, clip_on=False, color=INK)
        axes.text(
            1 + 0.27 * inch,
            height,
            "full cache" if method == "full" else method,
            transform=inside,
            size=7.5,
            va="center_baseline",
            color=INK if style.strong or method == "full" else MUTED,
            weight="bold" if style.strong else "normal",
        )


def _label_axes(axes: Axes, cell: Cell, says_questions: bool, inches: float, *, first: bool) -> None:
    above = 1 / inches
    axes.text(0, 1 + 0.27 * above, cell.task, transform=axes.transAxes, size=10, weight="bold", color=INK)
    facts = [f"{cell.group} tokens"] if cell.group else []
    facts += [f"{cell.questions:,} question{'s' * (cell.questions != 1)}"] if says_questions else []
    axes.text(0, 1 + 0.1 * above, "  ·  ".join(facts), transform=axes.transAxes, size=8, color=MUTED)
    axes.tick_params(labelsize=8, length=2, color=MUTED, labelcolor=INK, labelleft=first)
    axes.set_xlabel("budget", size=8.5, color=MUTED)
    lighten_axes(axes)
