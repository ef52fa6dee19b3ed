"""The picture of a causal check: answers that are left when more and more heads are silent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.plots.labels import spread
from headprof.plots.style import INK, MUTED, checked_path, lighten_axes, new_figure, save_picture, write_line
from headprof.validation.causal_check import FAMILIES, Validation
from headprof.validation.verdict import curve, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"top": "#d55e00", "random": "#0072b2", "bottom": "#6d6875"}
"""Of Okabe and Ito's palette, which color-blind people can tell apart; so do the markers and the labels."""
_MARKERS = {"top": "o", "random": "s", "bottom": "^"}
_LINES = {"top": "-", "random": "-", "bottom": (0, (2, 1.5))}
_LABELS = {"top": "top heads", "random": "random, same layers", "bottom": "bottom heads"}

# Inches.
_PANEL_WIDTH, _PANEL_HEIGHT, _LABEL_WIDTH, _GAP = 3.3, 2.7, 1.35, 0.62
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.68, 0.15, 1.55, 0.55
_WHERE = {"prompt": "silent in the whole prompt", "question": "silent from the question on"}


def check_picture(path: Path) -> None:
    """Complain about a picture that cannot be written, before any work is done; raises `UsageError`."""
    checked_path(path, what="A validation plot", mend="choose one with -o")


def validation_plot(result: Validation, path: str | Path) -> Path:
    """Draw accuracy against the number of silent heads and write it atomically; equal results give equal bytes.

    A panel for each kind of score shows the probes of that kind; bands are 95 % intervals. In SVG a line has the id
    `<kind>-<family>`.

    Args:
        result: what to draw.
        path: the picture, PNG or SVG by its suffix.

    Returns:
        `path`.

    Raises:
        UsageError: another suffix.
        HeadprofError: the disk refused.
    """
    path = Path(path)
    check_picture(path)
    save_picture(lambda: _draw(result), path)
    return path


def _draw(result: Validation) -> Figure:
    slot = _PANEL_WIDTH + _LABEL_WIDTH
    width = _LEFT + len(result.kinds) * (slot + _GAP) - _GAP + _RIGHT
    height = _TOP + _PANEL_HEIGHT + _BOTTOM
    figure = new_figure(width, height)
    margins = _LEFT, _RIGHT
    write_line(figure, result.model_name, margins, below=0.36, fontsize=14, color=INK, weight="bold")
    write_line(figure, "  ·  ".join(_facts(result)), margins, below=0.65, fontsize=9, color=MUTED)
    for panel, kind in enumerate(result.kinds):
        left = _LEFT + panel * (slot + _GAP)
        axes = figure.add_axes((left / width, _BOTTOM / height, _PANEL_WIDTH / width, _PANEL_HEIGHT / height))
        _draw_panel(axes, result, kind)
    return figure


def _facts(result: Validation) -> list[str]:
    counts = [f"{len(result.probe_indices(kind))} {kind}" for kind in result.kinds]
    return [
        f"{' + '.join(counts)} probes",
        f"contexts of {result.settings.length:,} tokens",
        f"heads {_WHERE[result.settings.where]}",
    ]


def _draw_panel(axes: Axes, result: Validation, kind: str) -> None:
    counts = [0, *result.counts]
    across = range(len(counts))  # evenly spaced: the first few heads matter as much as the last many
    ends = {}
    for family in FAMILIES:
        points = curve(result, kind, kind, family)
        shares = [100 * point.accuracy for point in points]
        low, high = ([100 * end for end in side] for side in ([p.low for p in points], [p.high for p in points]))
        color = _COLORS[family]
        axes.fill_between(across, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(
            across,
            shares,
            color=color,
            marker=_MARKERS[family],
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle=_LINES[family],
            linewidth=1.8,
            zorder=5 if family == "top" else 4,
            clip_on=False,
            gid=f"{kind}-{family}",
        )
        ends[family] = shares[-1]
    axes.set(xlim=(-0.15, len(counts) - 0.85), ylim=(0, 102))
    for family, height in zip(ends, spread(list(ends.values()), 8.5, 0, 100), strict=True):
        axes.text(
            len(counts) - 0.78, height, _LABELS[family], color=_COLORS[family], size=8, weight="bold", va="center"
        )
    _label_axes(axes, counts, result.settings.top)
    found = verdict(result, kind)
    above = 1 / _PANEL_HEIGHT
    axes.text(0, 1 + 0.4 * above, kind.capitalize(), transform=axes.transAxes, size=11, weight="bold", color=INK)
    state = "confirmed" if found.confirmed else "not confirmed"
    told = f"{state}: at {found.top}, top costs {100 * found.lost['top']:.0f} points and random "
    told += f"{100 * found.lost['random']:.0f}"
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
