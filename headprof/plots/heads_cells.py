"""The cells of a head profile's picture: colors, axes, KV groups, outlines and ranks of the best heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headprof.plots.heads_layout import HeadsLayout, tick_step
from headprof.plots.style import GRID, INK, MARK, MUTED, bar_ticks, even_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = (0, (2.0, 1.3))
"""Of the outline of a head that may not be among the best."""


def draw_cells(
    figure: Figure,
    layout: HeadsLayout,
    corner: tuple[float, float],
    values: Any,
    colormap: str,
    gamma: float,
    group_size: int,
) -> tuple[Axes, Any]:
    """Axes with a colored cell for each of `values` `[L, H]`, and the mesh of the cells."""
    from matplotlib.colors import PowerNorm

    axes = figure.add_axes(layout.fraction(*corner, layout.panel_width, layout.panel_height))
    norm = PowerNorm(gamma=gamma, vmin=0, vmax=float(values.max()) or 1.0)
    mesh = axes.pcolormesh(values, cmap=colormap, norm=norm, edgecolors=GRID, linewidth=0.25)
    axes.set(xlim=(0, layout.num_heads), ylim=(layout.num_layers, 0))
    label_axes(axes, layout)
    _separate_groups(axes, layout, group_size)
    return axes, mesh


def draw_bar(
    figure: Figure, layout: HeadsLayout, corner: tuple[float, float], mesh: Any, label: str, remark: str
) -> None:
    """The color bar of the panel at `corner`; `remark` takes a line of its own beside a low panel."""
    left, bottom = corner
    left += layout.panel_width + layout.bar_gap
    axes = figure.add_axes(layout.fraction(left, bottom, layout.bar_width, layout.panel_height))
    bar = figure.colorbar(mesh, cax=axes)
    bar.outline.set_visible(False)
    ticks = (even_ticks if mesh.norm.gamma == 1 else bar_ticks)(mesh.norm.vmax, layout.panel_height)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=7, length=2, color=MUTED, labelcolor=INK)
    separator = " " if layout.panel_height > 3 else "\n"
    bar.set_label(f"{label}{separator}{remark}", size=7.5, color=MUTED)


def outline_head(axes: Axes, layout: HeadsLayout, gid: str, head: tuple[int, int, float], is_dashed: bool) -> None:
    """Outline a head just outside its cell."""
    from matplotlib.patches import Rectangle

    row, column, _ = head
    width, height = layout.panel_width / layout.num_heads, layout.cell_height
    points = 1.4 if height < 0.15 else 1.8
    x_pad, y_pad = points / 144 / width, points / 144 / height
    corner = (column - x_pad, row - y_pad)
    outline = Rectangle(corner, 1 + 2 * x_pad, 1 + 2 * y_pad, gid=gid, clip_on=False, zorder=3)
    outline.set(fill=False, edgecolor=MARK, linewidth=points, joinstyle="round")
    if is_dashed:
        # The dark line beneath keeps the gaps visible on bright cells and over a neighbor's solid outline.
        outline.set(linestyle=DASHES, zorder=3.5)
        under = Rectangle(corner, 1 + 2 * x_pad, 1 + 2 * y_pad, clip_on=False, zorder=3.4)
        under.set(fill=False, edgecolor=INK, linewidth=points, joinstyle="round")
        axes.add_patch(under)
    axes.add_patch(outline)


def number_head(axes: Axes, layout: HeadsLayout, color: Any, rank: int, head: tuple[int, int, float]) -> None:
    """Write a head's rank in its cell of this color."""
    row, column, _ = head
    width, height = layout.panel_width / layout.num_heads, layout.cell_height
    red, green, blue, _ = color
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    size = min(8.0, 0.6 * 72 * height, 72 * width / (0.75 * len(str(rank)) + 0.25))
    number = axes.text(column + 0.5, row + 0.53, str(rank), ha="center", va="center_baseline", zorder=4)
    number.set(fontsize=size, fontweight="bold", color="white" if is_dark else INK)


def label_axes(axes: Axes, layout: HeadsLayout, across: str = "query head") -> None:
    """Number layers and heads; `across` says which heads."""
    columns = tick_step(layout.panel_width / layout.num_heads)
    rows = tick_step(layout.cell_height)
    heads, layers = range(0, layout.num_heads, columns), range(0, layout.num_layers, rows)
    axes.set_xticks([head + 0.5 for head in heads], [str(head) for head in heads])
    axes.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=2, color=MUTED, labelcolor=INK, pad=2)
    axes.set_xlabel(across, size=8, color=MUTED, labelpad=3)
    axes.set_ylabel("layer", size=8, color=MUTED, labelpad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _separate_groups(axes: Axes, layout: HeadsLayout, group_size: int) -> None:
    """Draw a line between the query heads of two KV heads, and number the KV heads above."""
    if group_size == 1:
        return
    groups = range(layout.num_heads // group_size)
    axes.vlines([i * group_size for i in groups[1:]], 0, layout.num_layers, color="white", linewidth=0.9)
    step = tick_step(layout.panel_width / len(groups))
    above = axes.secondary_xaxis("top")
    above.set_xticks([(i + 0.5) * group_size for i in groups[::step]], [str(i) for i in groups[::step]])
    above.tick_params(labelsize=7, length=0, labelcolor=MUTED, pad=2)
    above.spines["top"].set_visible(False)
    x, y = -0.06 / layout.panel_width, 1 + 0.035 / layout.panel_height
    axes.text(x, y, "KV head", transform=axes.transAxes, ha="right", va="bottom", size=7, color=MUTED)
