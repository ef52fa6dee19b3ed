"""The classic picture of needles: right answers by length of the prompt and depth of the needle, for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import UsageError
from headprof.plots.scores import budget_order
from headprof.plots.style import INK, MUTED, SCORE_COLORMAP, checked_path, new_figure, save_picture, write_heading
from headprof.utils.units import parse_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headprof.evaluation.results import Answer

BINS = 5
MOST_BUDGETS = 3
LengthAndBin = tuple[str, int]
"""A length as it is written, and a bin of depths from 0."""
Counts = dict[LengthAndBin, tuple[int, int]]
"""Right answers and questions."""

# Inches.
_CELL_WIDTH, _CELL_HEIGHT, _GAP, _LEFT, _RIGHT, _TOP, _BETWEEN, _BOTTOM = 0.5, 0.26, 0.14, 0.95, 0.1, 1.1, 0.34, 0.5
_NAME_LETTER, _SETTING_LETTER, _SETTING_LINE = 0.075, 0.056, 0.12
_NO_QUESTIONS = "#e9e7ec"
_FACTS = "across: tokens of the prompt  ·  down: where in it the needle stands  ·  right answers / questions"


def depth_table(answers: Iterable[Answer], bins: int = BINS) -> dict[tuple[str, str], Counts]:
    """For each method and budget, right answers and questions by length and by which of `bins` equal parts.

    Answers of other tasks than `niah`, or without a depth, are left out.
    """
    tables: dict[tuple[str, str], Counts] = {}
    for answer in answers:
        if answer.task != "niah" or answer.depth is None:
            continue
        table = tables.setdefault((answer.method, answer.budget), {})
        cell = answer.group, min(int(answer.depth * bins), bins - 1)
        right, asked = table.get(cell, (0, 0))
        table[cell] = right + round(answer.score), asked + 1
    return tables


def few_budgets(budgets: Iterable[str]) -> list[str]:
    """At most three of them: the smallest, the middle one, the largest."""
    found = budget_order(budgets)
    if len(found) <= MOST_BUDGETS:
        return found
    return [found[0], found[len(found) // 2], found[-1]]


def depths_plot(
    answers: Sequence[Answer], path: str | Path, budgets: Sequence[str] | None = None, bins: int = BINS
) -> Path:
    """Draw, for each method (a column) and budget (a row), the share of right answers by length and depth; atomically.

    A cell's figures are right answers and questions; grey is where no needle was. In SVG a panel has the id
    `depths-<method>-<budget>`.

    Args:
        answers: of an evaluation, those of the task `niah` count.
        path: the picture, PNG or SVG by its suffix.
        budgets: those to draw; at most three, if nothing is said.
        bins: equal parts of the text, from its start at the top.

    Raises:
        UsageError: another suffix, or no answer to draw.
        HeadprofError: the disk refused.
    """
    path = checked_path(path)
    tables = depth_table(answers, bins)
    chosen = few_budgets(budget for _, budget in tables) if budgets is None else list(budgets)
    if not tables:
        raise UsageError("There is no answer to a needle probe that could be drawn: evaluate the task niah.")
    save_picture(lambda: _draw(tables, chosen, bins), path)
    return path


def _draw(tables: dict[tuple[str, str], Counts], budgets: Sequence[str], bins: int) -> Figure:
    import matplotlib

    methods = list(dict.fromkeys(method for method, _ in tables))
    lengths = sorted({group for table in tables.values() for group, _ in table}, key=lambda text: parse_lengths(text))
    rows = budgets or [""]
    named = {method: _heading_of(method) for method in methods}
    wide = max(
        _CELL_WIDTH * len(lengths),
        *(_NAME_LETTER * len(name) for name, _ in named.values()),
        *(_SETTING_LETTER * len(setting) for _, settings in named.values() for setting in settings),
    )
    top = _TOP + _SETTING_LINE * max(len(settings) for _, settings in named.values())
    tall = _CELL_HEIGHT * bins
    width = _LEFT + len(methods) * (wide + _GAP) - _GAP + _RIGHT
    height = top + len(rows) * (tall + _BETWEEN) - _BETWEEN + _BOTTOM
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = new_figure(max(width, 4.6), height)
        total_width = figure.get_size_inches()[0]
        write_heading(figure, 0.2, "Needles found", _FACTS, 8)
        for row, budget in enumerate(rows):
            for column, method in enumerate(methods):
                table = tables.get((method, budget)) or (tables.get((method, "")) if row == 0 else None)
                if table is None:
                    continue
                left = _LEFT + column * (wide + _GAP)
                bottom = height - top - row * (tall + _BETWEEN) - tall
                axes = figure.add_axes((left / total_width, bottom / height, wide / total_width, tall / height))
                axes.set_gid(f"depths-{method}-{budget if (method, budget) in tables else ''}")
                _draw_panel(axes, table, lengths, bins)
                last = row == len(rows) - 1 or (method, "") in tables
                axes.set_xticks(range(len(lengths)), lengths if last else [])
                if row == 0:
                    _write_name(figure, left + wide / 2, *named[method])
                if column == 0:
                    _label_depths(axes, bins)
            label_at = (height - top - row * (tall + _BETWEEN) + 0.1) / height
            if budget:
                first = next(column for column, method in enumerate(methods) if (method, budget) in tables)
                at = (_LEFT + (wide + _GAP) * first) / total_width
                figure.text(at, label_at, f"budget {budget}", size=8, color=MUTED, va="center")
    return figure


def _heading_of(method: str) -> tuple[str, list[str]]:
    """A method's name, and its settings, which stand below it: in one line they would be wider than the grids."""
    name, *settings = method.split(":")
    return "full cache" if method == "full" else name, settings


def _write_name(figure: Figure, center: float, name: str, settings: Sequence[str]) -> None:
    """Write them at `center` inches from the left."""
    width, height = figure.get_size_inches()
    below = _TOP - 0.27
    figure.text(center / width, 1 - below / height, name, size=8.5, color=INK, weight="bold", ha="center")
    for setting in settings:
        below += _SETTING_LINE
        figure.text(center / width, 1 - below / height, setting, size=6.5, color=MUTED, ha="center")


def _draw_panel(axes: Axes, table: Counts, lengths: Sequence[str], bins: int) -> None:
    from matplotlib import colormaps

    colormap = colormaps[SCORE_COLORMAP]
    for column, length in enumerate(lengths):
        for row in range(bins):
            right, asked = table.get((length, row), (0, 0))
            share = right / asked if asked else 0.0
            color = colormap(0.08 + 0.84 * share) if asked else _NO_QUESTIONS
            axes.add_patch(_cell(column, row, color))
            if asked:
                ink = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{right}/{asked}", size=6.5, ha="center", va="center_baseline", color=ink)
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(bins - 0.5, -0.5))
    axes.tick_params(labelsize=7.5, length=0, labelcolor=MUTED, labelleft=False, left=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(column: int, row: int, color):
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=0.8)


def _label_depths(axes: Axes, bins: int) -> None:
    ends = [f"{100 * row / bins:.0f} to {100 * (row + 1) / bins:.0f} %" for row in range(bins)]
    axes.set_yticks(range(bins), ends)
    axes.tick_params(axis="y", labelleft=True)
