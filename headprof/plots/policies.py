"""The picture of the policies that heads take of a text: layers by KV heads, a color for each policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headprof.compression.methods.policy_order import POLICIES
from headprof.plots.heads_cells import label_axes
from headprof.plots.heads_layout import HeadsLayout
from headprof.plots.style import GRID, INK, MUTED, checked_path, new_figure, save_picture, write_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from headprof.compression.policy_profile import HeadPolicies

COLORS = ("#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#3b3640")
"""Of each of `POLICIES`; told apart by readers who do not tell all colors apart."""

MEANINGS = ("special tokens", "and punctuation", "and heavy hitters", "and the last rows", "all rows")

_TOP, _LEGEND = 0.95, 2.3  # inches
_LINE = 0.24


def policies_plot(found: HeadPolicies, path: str | Path) -> Path:
    """Draw the policies of a model's KV heads and write the picture atomically; the same policies give the same bytes.

    The legend says what each policy keeps, from the smallest on, and how many heads take it. In SVG the cells have the
    id `policies`, and the legend's entries `policy-special` and so on, with hyphens for blanks.

    Args:
        found: of `head_policies`.
        path: the picture, PNG or SVG by its suffix.

    Raises:
        UsageError: another suffix.
        HeadprofError: the disk refused.
    """
    path = checked_path(path, what="A picture of policies", mend="choose one with -o")
    save_picture(lambda: _draw(found), path)
    return path


def _draw(found: HeadPolicies) -> Figure:
    layers, heads = found.policies.shape
    layout = HeadsLayout(layers, heads, 1, 0)
    panel = layout.left + layout.panel_width
    width = max(panel + layout.bar_gap + _LEGEND, 4.6)
    tall = max(layout.panel_height, _LINE * len(POLICIES))
    height = _TOP + tall + layout.bottom
    figure = new_figure(width, height)
    margins = layout.left, layout.right
    facts = [
        f"{layers} layers × {heads} KV heads",
        f"{found.tokens:,} tokens",
        f"at least {100 * found.recovery:.4g} % of the attention",
    ]
    write_line(figure, found.model_name, margins, below=0.36, fontsize=14, color=INK, weight="bold")
    write_line(figure, "  ·  ".join(facts), margins, below=0.65, fontsize=9, color=MUTED)
    bottom = layout.bottom + tall - layout.panel_height
    sizes = (layout.left, bottom, layout.panel_width, layout.panel_height)
    axes = figure.add_axes(_share(figure, *sizes))
    _draw_cells(axes, found, layout)
    _draw_legend(figure, found, panel + 3 * layout.bar_gap, layout.bottom + tall)
    return figure


def _share(
    figure: Figure, left: float, bottom: float, width: float, height: float
) -> tuple[float, float, float, float]:
    across, down = figure.get_size_inches()
    return left / across, bottom / down, width / across, height / down


def _draw_cells(axes: Axes, found: HeadPolicies, layout: HeadsLayout) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    layers, heads = found.policies.shape
    norm = BoundaryNorm(range(len(POLICIES) + 1), len(POLICIES))
    mesh = axes.pcolormesh(
        found.policies.numpy(), cmap=ListedColormap(COLORS), norm=norm, edgecolors=GRID, linewidth=0.25
    )
    mesh.set_gid("policies")
    axes.set(xlim=(0, heads), ylim=(layers, 0))
    label_axes(axes, layout, "KV head")


def _draw_legend(figure: Figure, found: HeadPolicies, left: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    counts = found.policies.flatten().bincount(minlength=len(POLICIES)).tolist()
    for number, (policy, meaning) in enumerate(zip(POLICIES, MEANINGS, strict=True)):
        middle = top - _LINE * (number + 0.5)
        swatch = Rectangle((0, 0), 0, 0, transform=figure.transFigure, gid=f"policy-{policy}".replace(" ", "-"))
        swatch.set_bounds(_share(figure, left, middle - 0.07, 0.14, 0.14))
        swatch.set(facecolor=COLORS[number], edgecolor=GRID, linewidth=0.5)
        figure.add_artist(swatch)
        x, y, _, _ = _share(figure, left + 0.22, middle, 0, 0)
        text = f"{meaning}: {counts[number]} head{'s' * (counts[number] != 1)}"
        figure.text(x, y, text, va="center_baseline", size=8, color=INK if counts[number] else MUTED)
