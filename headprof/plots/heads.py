"""The picture of a head profile: layers by heads, KV groups visible, the best heads marked and listed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.plots.certainty import check_known, half_width, interval_of, is_unsure
from headprof.plots.html import write_page
from headprof.plots.style import (
    GRID,
    INK,
    MARK,
    MUTED,
    SCORE_COLORMAP,
    SCORE_GAMMA,
    UNCERTAINTY_COLORMAP,
    bar_ticks,
    checked_path,
    even_ticks,
    probe_facts,
    save_picture,
    shape_fact,
    write_line,
)
from headprof.profile.head_profile import HeadProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".html")
_DASHES = (0, (2.0, 1.3))


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, in inches from the bottom left corner; cells are as square as legible panels allow."""

    num_layers: int
    num_heads: int
    num_kinds: int
    num_listed: int
    uncertainty: bool = False

    left, right, gap, top, bottom = 0.68, 0.3, 0.62, 1.5, 0.5
    bar_gap, bar_width, bar_label = 0.1, 0.13, 0.62
    row_height, list_title, list_bottom = 0.19, 0.42, 0.16

    @cached_property
    def cell_height(self) -> float:
        return min(max(6.2 / max(self.num_layers, self.num_heads), 0.11), 0.45)

    @cached_property
    def panel_width(self) -> float:
        square = self.num_heads * self.cell_height
        return min(max(square, 2.2), 1.4 * square)

    @cached_property
    def panel_height(self) -> float:
        return self.num_layers * self.cell_height

    @cached_property
    def slot_width(self) -> float:
        """A panel with its color bar."""
        return max(self.panel_width + self.bar_gap + self.bar_width + self.bar_label, 2.4)

    @cached_property
    def is_beside(self) -> bool:
        """Whether the panel of uncertainty stands beside a tall panel of scores, not beneath it."""
        return self.uncertainty and self.panel_height > 1.5 * self.panel_width

    @cached_property
    def kind_width(self) -> float:
        return 2 * self.slot_width + self.gap if self.is_beside else self.slot_width

    @cached_property
    def key_height(self) -> float:
        """The lines under a panel of scores that explain the outlines."""
        return 0.5 if self.uncertainty and self.num_listed else 0

    @cached_property
    def list_width(self) -> float:
        return 2.4 if self.uncertainty else 1.9

    @cached_property
    def list_columns(self) -> int:
        room = self.panel_width + 0.3 + (self.slot_width + self.gap if self.is_beside else 0)
        return max(1, min(int(room / self.list_width), math.ceil(self.num_listed / 4)))

    @cached_property
    def list_rows(self) -> int:
        return math.ceil(self.num_listed / self.list_columns)

    @cached_property
    def list_height(self) -> float:
        return self.list_title + self.list_rows * self.row_height if self.num_listed else 0

    @cached_property
    def width(self) -> float:
        panels = self.num_kinds * self.kind_width + (self.num_kinds - 1) * self.gap
        return max(self.left + panels + self.right, 4.6)

    @cached_property
    def text_width(self) -> float:
        return self.width - self.left - self.right

    @cached_property
    def height(self) -> float:
        return self.top + self.panel_height + self.panel_bottom

    def panel_left(self, panel: int) -> float:
        return self.left + panel * (self.kind_width + self.gap)

    def uncertainty_left(self, panel: int) -> float:
        return self.panel_left(panel) + (self.slot_width + self.gap if self.is_beside else 0)

    @cached_property
    def panel_bottom(self) -> float:
        beneath = self.uncertainty and not self.is_beside
        return self.uncertainty_bottom + (self.panel_height + self.bottom + self.key_height + 0.72 if beneath else 0)

    @cached_property
    def uncertainty_bottom(self) -> float:
        return self.bottom + self.list_height + self.list_bottom + (self.key_height if self.is_beside else 0)

    def fraction(self, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def heatmap(
    profile: HeadProfile, path: str | Path, which: str = "both", top: int = 10, uncertainty: bool = False
) -> Path:
    """Draw a profile as layers by query heads and write it atomically; the same profile gives the same bytes.

    The `top` best heads of each kind are outlined, numbered by rank and listed beneath. In SVG an outline has the id
    `top-<kind>-<rank>`. HTML is one page that needs no network, where the reader switches between the kinds and points
    at heads; it shows uncertainty wherever that is known.

    With `uncertainty`, a second panel of each kind shows half the width of each score's 95 % interval (1.96 standard
    errors where the profile holds no interval), the list gives the intervals, and a head of the top is outlined with
    dashes when its membership is uncertain: when its interval reaches down to that of any head outside the top. That
    is strict, since two intervals may touch where a paired test of the two heads would tell them apart.

    Args:
        profile: what to draw.
        path: the picture, PNG, SVG or HTML by its suffix.
        which: `retrieval`, `reasoning`, or `both` (the one it holds, for a profile of one kind).
        top: number of heads to mark in each panel.
        uncertainty: draw the panels of uncertainty too; in HTML, begin with uncertainty.

    Returns:
        `path`.

    Raises:
        UsageError: another suffix, an unknown `which`, a negative `top`, or `uncertainty` that the profile lacks.
        ProfileError: the profile lacks the kind of score asked for.
        HeadprofError: the disk refused.
    """
    path = checked_path(path, FORMATS, what="A heatmap", mend="choose one with -o")
    kinds = profile.kinds if which == "both" else (which,)
    best = {kind: profile.top_heads(kind, top) for kind in kinds}
    if uncertainty:
        check_known(profile, kinds)
    if path.suffix.lower() == ".html":
        return write_page(profile, path, kinds, top, uncertainty)
    save_picture(lambda: _draw(profile, best, uncertainty), path)
    return path


def _draw(profile: HeadProfile, best: dict[str, list[tuple[int, int, float]]], uncertainty: bool = False) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = profile.shape
    num_listed = max(len(heads) for heads in best.values())
    layout = _Layout(shape.num_layers, shape.num_heads, len(best), num_listed, uncertainty)
    figure = Figure(figsize=(layout.width, layout.height), facecolor="white")
    FigureCanvasAgg(figure)
    _draw_title(figure, layout, profile, list(best))
    for panel, (kind, heads) in enumerate(best.items()):
        dashed = is_unsure(profile, kind, len(heads)) if uncertainty else [False] * len(heads)
        _draw_panel(figure, layout, panel, profile, kind, heads, dashed)
        if uncertainty:
            _draw_uncertainty(figure, layout, panel, profile, kind, heads, dashed)
            _draw_key(figure, layout, panel, len(heads))
        _draw_list(figure, layout, panel, profile, kind, heads)
    return figure


def _draw_title(figure: Figure, layout: _Layout, profile: HeadProfile, kinds: list[str]) -> None:
    facts = [shape_fact(profile), *probe_facts(profile, kinds)]
    margins = layout.left, layout.right
    write_line(figure, profile.model_name, margins, below=0.36, fontsize=14, color=INK, weight="bold")
    # A line of this size takes about 0.07 inches a letter.
    fits = 0.07 * len("  ·  ".join(facts)) <= layout.text_width
    for i, line in enumerate([facts] if fits else [facts[:1], facts[1:]]):
        write_line(figure, "  ·  ".join(line), margins, below=0.65 + 0.18 * i, fontsize=9, color=MUTED)


def _draw_panel(
    figure: Figure,
    layout: _Layout,
    panel: int,
    profile: HeadProfile,
    kind: str,
    heads: list[tuple[int, int, float]],
    dashed: list[bool],
) -> None:
    """The scores, the best heads outlined and numbered; `dashed` says which outlines are."""
    corner = layout.panel_left(panel), layout.panel_bottom
    scores = profile.scores[kind].detach().cpu().numpy()
    axes, mesh = _draw_cells(figure, layout, corner, scores, SCORE_COLORMAP, SCORE_GAMMA, profile.shape.group_size)
    _write_heading(axes, layout, kind.capitalize())
    for rank, (head, is_dashed) in enumerate(zip(heads, dashed, strict=True), 1):
        _outline_head(axes, layout, f"top-{kind}-{rank}", head, is_dashed)
        _number_head(axes, layout, mesh.cmap(mesh.norm(head[2])), rank, head)
    _draw_bar(figure, layout, corner, mesh, f"{kind} score", "(square-root color scale)")


def _draw_uncertainty(
    figure: Figure,
    layout: _Layout,
    panel: int,
    profile: HeadProfile,
    kind: str,
    heads: list[tuple[int, int, float]],
    dashed: list[bool],
) -> None:
    """Half the width of each score's 95 % interval, the best heads outlined as in the panel of scores."""
    corner = layout.uncertainty_left(panel), layout.uncertainty_bottom
    widths = half_width(profile, kind)
    assert widths is not None  # The caller has checked.
    values = widths.detach().cpu().numpy()
    axes, mesh = _draw_cells(figure, layout, corner, values, UNCERTAINTY_COLORMAP, 1, profile.shape.group_size)
    _write_heading(axes, layout, f"{kind.capitalize()}: uncertainty")
    for rank, (head, is_dashed) in enumerate(zip(heads, dashed, strict=True), 1):
        _outline_head(axes, layout, f"uncertainty-{kind}-{rank}", head, is_dashed)
    # Beside a panel of few layers the whole phrase would run into the heading.
    is_low = layout.panel_height < 1.6
    label = ("half width of", "the interval") if is_low else ("half width of the 95 % interval", f"({kind} score)")
    _draw_bar(figure, layout, corner, mesh, *label)


def _draw_cells(
    figure: Figure,
    layout: _Layout,
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
    _label_axes(axes, layout)
    _separate_groups(axes, layout, group_size)
    return axes, mesh


def _write_heading(axes: Axes, layout: _Layout, text: str) -> None:
    axes.text(0, 1 + 0.32 / layout.panel_height, text, transform=axes.transAxes, size=11, weight="bold", color=INK)


def _draw_bar(figure: Figure, layout: _Layout, corner: tuple[float, float], mesh: Any, label: str, remark: str) -> None:
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


def _draw_key(figure: Figure, layout: _Layout, panel: int, top: int) -> None:
    """Say under a panel of scores what a solid and a dashed outline mean."""
    from matplotlib.patches import Rectangle

    if not top:
        return
    meanings = (
        (False, f"in the top {top}"),
        (True, "perhaps not: its 95 % interval meets one outside"),
    )
    for i, (is_dashed, meaning) in enumerate(meanings):
        x = layout.panel_left(panel)
        y = layout.panel_bottom - layout.bottom - 0.03 - 0.19 * i
        swatch = Rectangle((0, 0), 0, 0, transform=figure.transFigure)
        swatch.set_bounds(layout.fraction(x + 0.02, y - 0.055, 0.17, 0.11))
        swatch.set(fill=False, edgecolor=MARK, linewidth=1.4, linestyle=_DASHES if is_dashed else "solid")
        figure.add_artist(swatch)
        x, y, _, _ = layout.fraction(x + 0.28, y, 0, 0)
        figure.text(x, y, meaning, va="center_baseline", size=7.5, color=MUTED)


def _label_axes(axes: Axes, layout: _Layout) -> None:
    columns = _tick_step(layout.panel_width / layout.num_heads)
    rows = _tick_step(layout.cell_height)
    heads, layers = range(0, layout.num_heads, columns), range(0, layout.num_layers, rows)
    axes.set_xticks([head + 0.5 for head in heads], [str(head) for head in heads])
    axes.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=2, color=MUTED, labelcolor=INK, pad=2)
    axes.set_xlabel("query head", size=8, color=MUTED, labelpad=3)
    axes.set_ylabel("layer", size=8, color=MUTED, labelpad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tick_step(cell: float) -> int:
    """How many cells of `cell` inches from one label to the next, so that two labels do not touch."""
    return next((step for step in (1, 2, 4, 8, 16) if step * cell >= 0.19), 32)


def _separate_groups(axes: Axes, layout: _Layout, group_size: int) -> None:
    """Draw a line between the query heads of two KV heads, and number the KV heads above."""
    if group_size == 1:
        return
    groups = range(layout.num_heads // group_size)
    axes.vlines([i * group_size for i in groups[1:]], 0, layout.num_layers, color="white", linewidth=0.9)
    step = _tick_step(layout.panel_width / len(groups))
    above = axes.secondary_xaxis("top")
    above.set_xticks([(i + 0.5) * group_size for i in groups[::step]], [str(i) for i in groups[::step]])
    above.tick_params(labelsize=7, length=0, labelcolor=MUTED, pad=2)
    above.spines["top"].set_visible(False)
    x, y = -0.06 / layout.panel_width, 1 + 0.035 / layout.panel_height
    axes.text(x, y, "KV head", transform=axes.transAxes, ha="right", va="bottom", size=7, color=MUTED)


def _outline_head(axes: Axes, layout: _Layout, gid: str, head: tuple[int, int, float], is_dashed: bool) -> None:
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
        outline.set(linestyle=_DASHES, zorder=3.5)
        under = Rectangle(corner, 1 + 2 * x_pad, 1 + 2 * y_pad, clip_on=False, zorder=3.4)
        under.set(fill=False, edgecolor=INK, linewidth=points, joinstyle="round")
        axes.add_patch(under)
    axes.add_patch(outline)


def _number_head(axes: Axes, layout: _Layout, color: Any, rank: int, head: tuple[int, int, float]) -> None:
    """Write a head's rank in its cell of this color."""
    row, column, _ = head
    width, height = layout.panel_width / layout.num_heads, layout.cell_height
    red, green, blue, _ = color
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    size = min(8.0, 0.6 * 72 * height, 72 * width / (0.75 * len(str(rank)) + 0.25))
    number = axes.text(column + 0.5, row + 0.53, str(rank), ha="center", va="center_baseline", zorder=4)
    number.set(fontsize=size, fontweight="bold", color="white" if is_dark else INK)


def _draw_list(
    figure: Figure, layout: _Layout, panel: int, profile: HeadProfile, kind: str, heads: list[tuple[int, int, float]]
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
        decimals = _decimals([(high - low) / 2 for low, high in ends])
        texts = [
            f"{score:.{decimals}f}  [{low:.{decimals}f}, {high:.{decimals}f}]"
            for (_, _, score), (low, high) in zip(heads, ends, strict=True)
        ]
        return " (score, 95 % interval)", texts
    if (errors := profile.standard_errors.get(kind)) is not None:
        uncertain = [float(errors[layer, head]) for layer, head, _ in heads]
        decimals = _decimals(uncertain)
        texts = [
            f"{score:.{decimals}f} ± {error:.{decimals}f}"
            for (_, _, score), error in zip(heads, uncertain, strict=True)
        ]
        return " (score ± standard error)", texts
    decimals = _decimals([heads[0][2] / 10])
    return "", [f"{score:.{decimals}f}" for _, _, score in heads]


def _decimals(values: list[float]) -> int:
    """Decimals, 2 to 4, that show a digit of the smallest of `values` above 0."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(4, max(2, -math.floor(math.log10(smallest))))
