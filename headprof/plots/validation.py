"""The picture of a causal check: answers that are left when heads are silent, and scores beside what heads cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.plots.labels import spread
from headprof.plots.rank_bars import draw_ranks, rank_limits
from headprof.plots.style import INK, MUTED, checked_path, lighten_axes, new_figure, save_picture, write_line
from headprof.validation.causal_check import ALL, Validation
from headprof.validation.settings import FAMILIES
from headprof.validation.verdict import CurvePoint, curve, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headprof.validation.side_by_side import RankAgreement, SideBySide

_TOP_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f4fc9")
"""Of scores, in turn; the first five and that of random heads are of Okabe and Ito's palette, which color-blind people
can tell apart; so do the markers and the labels."""
_COLORS = {"random": "#0072b2", "bottom": "#6d6875"}
_MARKERS = {"top": "o", "random": "s", "bottom": "^"}
_DASHED = (0, (2, 1.5))
_LINES = {"top": "-", "random": "-", "bottom": _DASHED}
_LABELS = {"top": "top heads", "random": "random, same layers", "bottom": "bottom heads"}

# Inches.
_PANEL_WIDTH, _PANEL_HEIGHT, _LABEL_WIDTH, _LETTER = 3.3, 2.7, 1.35, 0.072
_LEFT, _RIGHT, _TOP, _BOTTOM, _BAR, _BARS_TOP = 0.68, 0.15, 1.55, 0.55, 0.25, 0.75
_LONGEST_NAME = 30
_WHERE = {"prompt": "silent in the whole prompt", "question": "silent from the question on"}
_HOW = {"zero": "", "mean": ", their mean output in place of theirs"}


def check_picture(path: Path) -> None:
    """Complain about a picture that cannot be written, before any work is done; raises `UsageError`."""
    checked_path(path, what="A validation plot", mend="choose one with -o")


def validation_plot(result: Validation, path: str | Path, compared: SideBySide | None = None) -> Path:
    """Draw accuracy against the number of silent heads and write it atomically; equal results give equal bytes.

    A panel for each kind of probe, with the top, random and bottom heads of the scores that it judges, and the top
    heads of the others; bands are 95 % intervals. In SVG a line has the id `<kind>-<family>`, or `<kind>-top-<scores>`.
    Beneath, where heads were measured, how alike scores and measurements rank them (see `draw_ranks`).

    Args:
        result: what to draw.
        path: the picture, PNG or SVG by its suffix.
        compared: its scores side by side, for their rank correlations.

    Returns:
        `path`.

    Raises:
        UsageError: another suffix.
        HeadprofError: the disk refused.
    """
    path = Path(path)
    check_picture(path)
    save_picture(lambda: _draw(result, compared), path)
    return path


@dataclass(frozen=True)
class _Sizes:
    """Of the picture and its parts, in inches: each panel has a margin to its left and labels to its right."""

    panels: int
    left: float
    labels: float
    bars: float

    @property
    def slot(self) -> float:
        return self.left + _PANEL_WIDTH + self.labels

    @property
    def width(self) -> float:
        return self.panels * self.slot + _RIGHT

    @property
    def height(self) -> float:
        return _TOP + _PANEL_HEIGHT + _BOTTOM + self.bars

    def place(self, number: int, bottom: float, height: float) -> tuple[float, float, float, float]:
        """Of the axes of a panel, as shares of the picture."""
        left = self.left + number * self.slot
        return left / self.width, bottom / self.height, _PANEL_WIDTH / self.width, height / self.height


def _draw(result: Validation, compared: SideBySide | None = None) -> Figure:
    panels = [kind for kind in result.probe_kinds if kind in result.names] or result.probe_kinds
    by_yardstick: dict[str, list[RankAgreement]] = {}
    for each in compared.agreements if compared is not None else ():
        by_yardstick.setdefault(each.yardstick, []).append(each)
    longest = max(map(len, map(_shown, result.names)))
    tall = _BAR * len(result.names)
    sizes = _Sizes(
        panels=max(len(panels), len(by_yardstick)),
        left=max(_LEFT, _LETTER * longest + 0.1) if by_yardstick else _LEFT,
        labels=max(_LABEL_WIDTH, _LETTER * (longest + 4)),
        bars=_BARS_TOP + tall + _BOTTOM if by_yardstick else 0.0,
    )
    figure = new_figure(sizes.width, sizes.height)
    margins = sizes.left, _RIGHT
    write_line(figure, result.model_name, margins, below=0.36, fontsize=14, color=INK, weight="bold")
    write_line(figure, "  ·  ".join(_facts(result)), margins, below=0.65, fontsize=9, color=MUTED)
    for number, kind in enumerate(panels):
        _draw_panel(figure.add_axes(sizes.place(number, sizes.bars + _BOTTOM, _PANEL_HEIGHT)), result, kind)
    styles = {name: (_shown(name), color) for name, color in _colors(result.names).items()}
    limits = rank_limits([each for members in by_yardstick.values() for each in members])
    for number, (yardstick, members) in enumerate(by_yardstick.items()):
        axes = figure.add_axes(sizes.place(number, _BOTTOM, tall))
        draw_ranks(axes, members, styles, limits)
        told = f"to the right: of the top {members[0].top} heads, those that both have"
        _write_above(axes, tall, f"Scores beside {yardstick}", told)
    return figure


def _facts(result: Validation) -> list[str]:
    counts = [f"{len(result.probe_indices(kind))} {kind}" for kind in result.probe_kinds]
    settings = result.settings
    families = [] if settings.probe_families is None else [f"families {', '.join(settings.probe_families)}"]
    return [
        f"{' + '.join(counts)} probes",
        *families,
        f"contexts of {settings.length:,} tokens",
        f"heads {_WHERE[settings.where]}{_HOW[settings.ablate]}",
    ]


def _shown(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _colors(names: Sequence[str]) -> dict[str, str]:
    """Of the top heads of scores."""
    return {name: _TOP_COLORS[number % len(_TOP_COLORS)] for number, name in enumerate(names)}


def _draw_panel(axes: Axes, result: Validation, kind: str) -> None:
    main = kind if kind in result.names else result.names[0]
    others = [name for name in result.names if name != main]
    labels = dict(_LABELS) | ({"top": f"top {_shown(main)}"} if others else {})
    colors, lines = _colors(result.names), []
    for family in FAMILIES:
        points, color = curve(result, kind, main, family), _COLORS.get(family, colors[main])
        style: dict[str, Any] = {"color": color, "marker": _MARKERS[family], "linestyle": _LINES[family]}
        lines.append((_draw_line(axes, points, f"{kind}-{family}", band=True, **style), labels[family], color))
    for name in others:
        points, style = curve(result, kind, name, "top"), {"color": colors[name], "marker": "D", "linestyle": _DASHED}
        height = _draw_line(axes, points, f"{kind}-top-{name}", **style)
        lines.append((height, f"top {_shown(name)}", colors[name]))
    counts = [0, *result.counts]
    axes.set(xlim=(-0.15, len(counts) - 0.85), ylim=(0, 102))
    for (_, label, color), height in zip(lines, spread([line[0] for line in lines], 8.5, 0, 100), strict=True):
        axes.text(len(counts) - 0.78, height, label, color=color, size=8, weight="bold", va="center", parse_math=False)
    _label_axes(axes, counts, result.settings.top)
    _write_above(axes, _PANEL_HEIGHT, kind.capitalize(), _told(result, kind, main))


def _draw_line(
    axes: Axes, points: Sequence[CurvePoint], gid: str, *, color: str, marker: str, linestyle, band: bool = False
) -> float:
    """Draw a curve, with its interval if it has a `band`; returns the height of its end."""
    across = range(len(points))  # evenly spaced: the first few heads matter as much as the last many
    shares = [100 * point.accuracy for point in points]
    if band:
        low, high = ([100 * end for end in side] for side in ([p.low for p in points], [p.high for p in points]))
        axes.fill_between(across, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        across,
        shares,
        color=color,
        marker=marker,
        markersize=4.5 if band else 3.2,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linestyle=linestyle,
        linewidth=1.8 if band else 1.2,
        zorder=5 if marker == _MARKERS["top"] else 4,
        clip_on=False,
        gid=gid.replace(" ", "-"),
    )
    return shares[-1]


def _told(result: Validation, kind: str, main: str) -> str:
    """What the panel comes to, in words; the verdict only where it is by the panel's probes."""
    found = verdict(result, next(each for each in result.scores if each.name == main))
    if found.probes not in (kind, ALL) or (found.probes == ALL and len(result.probe_kinds) > 1):
        return f"judged by all probes together: {'' if found.confirmed else 'not '}confirmed"
    told = f"{'' if found.confirmed else 'not '}confirmed: at {found.top}, top costs {100 * found.lost['top']:.0f} "
    return f"{told}points and random {100 * found.lost['random']:.0f}"


def _write_above(axes: Axes, height: float, heading: str, told: str) -> None:
    """Write a heading and a line beneath it above axes of this height in inches."""
    above = 1 / height
    axes.text(0, 1 + 0.4 * above, heading, transform=axes.transAxes, size=11, weight="bold", color=INK)
    axes.text(0, 1 + 0.17 * above, told, transform=axes.transAxes, size=8, color=MUTED)


def _label_axes(axes: Axes, counts: Sequence[int], top: int) -> None:
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.get_xticklabels()[list(counts).index(top)].set_fontweight("bold")
    ticks = range(0, 101, 20)
    axes.set_yticks(ticks, [f"{tick} %" for tick in ticks])
    axes.tick_params(labelsize=8, length=2, color=MUTED, labelcolor=INK)
    axes.set_xlabel("heads silenced", size=8.5, color=MUTED)
    axes.set_ylabel("probes answered right", size=8.5, color=MUTED)
    lighten_axes(axes)
