"""The picture of a head profile: layers by heads, KV groups visible, the best heads marked and listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import UsageError
from headprof.files import atomic_write
from headprof.profile import HeadProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_DPI = 180
_COLORMAP = "magma"
_INK, _MUTED, _MARK = "#1b1720", "#6d6875", "#29d3c2"

# Set in full so that a user's own matplotlibrc does not change the picture.
_STYLE = {"font.family": "DejaVu Sans", "svg.hashsalt": "headprof", "svg.fonttype": "path", "axes.linewidth": 0.6}


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, in inches from the bottom left corner; cells are as square as legible panels allow."""

    num_layers: int
    num_heads: int
    num_panels: int
    num_listed: int

    left, right, gap, top, bottom = 0.68, 0.3, 0.62, 1.5, 0.5
    bar_gap, bar_width, bar_label = 0.1, 0.13, 0.62
    row_height, list_width, list_title, list_bottom = 0.19, 1.9, 0.42, 0.16

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
    def list_columns(self) -> int:
        return max(1, min(int((self.panel_width + 0.3) / self.list_width), math.ceil(self.num_listed / 4)))

    @cached_property
    def list_rows(self) -> int:
        return math.ceil(self.num_listed / self.list_columns)

    @cached_property
    def list_height(self) -> float:
        return self.list_title + self.list_rows * self.row_height if self.num_listed else 0

    @cached_property
    def width(self) -> float:
        panels = self.num_panels * self.slot_width + (self.num_panels - 1) * self.gap
        return max(self.left + panels + self.right, 4.6)

    @cached_property
    def text_width(self) -> float:
        return self.width - self.left - self.right

    @cached_property
    def height(self) -> float:
        return self.top + self.panel_height + self.panel_bottom

    def panel_left(self, panel: int) -> float:
        return self.left + panel * (self.slot_width + self.gap)

    @cached_property
    def panel_bottom(self) -> float:
        return self.bottom + self.list_height + self.list_bottom

    def fraction(self, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def heatmap(profile: HeadProfile, path: str | Path, which: str = "both", top: int = 10) -> Path:
    """Draw a profile as layers by query heads and write it atomically; the same profile gives the same bytes.

    The `top` best heads of each kind are outlined, numbered by rank and listed beneath. In SVG an outline has the id
    `top-<kind>-<rank>`.

    Args:
        profile: what to draw.
        path: the picture, PNG or SVG by its suffix.
        which: `retrieval`, `reasoning`, or `both` side by side (the one it holds, for a profile of one kind).
        top: number of heads to mark in each panel.

    Returns:
        `path`.

    Raises:
        UsageError: another suffix, an unknown `which`, or a negative `top`.
        ProfileError: the profile lacks the kind of score asked for.
        HeadprofError: the disk refused.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"A heatmap is written as {' or '.join(FORMATS)}, not as {path.name!r}: choose one with -o.")
    kinds = profile.kinds if which == "both" else (which,)
    best = {kind: profile.top_heads(kind, top) for kind in kinds}

    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), atomic_write(path) as temporary:
        figure = _draw(profile, best)
        # The date and the version of matplotlib would make equal pictures differ.
        undated: dict[str, Any] = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
        figure.savefig(temporary, format=suffix[1:], dpi=_DPI, metadata=undated)
    return path


def _draw(profile: HeadProfile, best: dict[str, list[tuple[int, int, float]]]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = profile.shape
    num_listed = max(len(heads) for heads in best.values())
    layout = _Layout(shape.num_layers, shape.num_heads, len(best), num_listed)
    figure = Figure(figsize=(layout.width, layout.height), facecolor="white")
    FigureCanvasAgg(figure)
    _draw_title(figure, layout, profile, list(best))
    for panel, (kind, heads) in enumerate(best.items()):
        _draw_panel(figure, layout, panel, profile, kind, heads)
        _draw_list(figure, layout, panel, profile, kind, heads)
    return figure


def _draw_title(figure: Figure, layout: _Layout, profile: HeadProfile, kinds: list[str]) -> None:
    shape = profile.shape
    heads = f"{shape.num_heads} query heads"
    if shape.group_size > 1:
        heads += f" on {shape.num_kv_heads} KV head{'s' * (shape.num_kv_heads != 1)}"
    facts = [f"{shape.num_layers} layers × {heads}", *_probe_facts(profile, kinds)]
    _fit_text(figure, layout, profile.model_name, below=0.36, fontsize=14, color=_INK, weight="bold")
    # A line of this size takes about 0.07 inches a letter.
    fits = 0.07 * len("  ·  ".join(facts)) <= layout.text_width
    for i, line in enumerate([facts] if fits else [facts[:1], facts[1:]]):
        _fit_text(figure, layout, "  ·  ".join(line), below=0.65 + 0.18 * i, fontsize=9, color=_MUTED)


def _probe_facts(profile: HeadProfile, kinds: list[str]) -> list[str]:
    facts = []
    counted = [f"{profile.probes_used[kind]} {kind}" for kind in kinds if profile.probes_used.get(kind)]
    if counted:
        facts.append(f"{' + '.join(counted)} probes")
    lengths = profile.settings.get("lengths")
    if isinstance(lengths, Sequence) and lengths and all(isinstance(length, int) for length in lengths):
        facts.append(f"contexts of {', '.join(_format_length(length) for length in lengths)} tokens")
    return facts


def _format_length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _fit_text(figure: Figure, layout: _Layout, text: str, below: float, fontsize: float, **style: Any) -> None:
    """Write a line `below` inches from the top of the figure, shrunk when it is wider than the figure."""
    x, y, _, _ = layout.fraction(layout.left, layout.height - below, 0, 0)
    line = figure.text(x, y, text, va="center", fontsize=fontsize, parse_math=False, **style)
    room = layout.text_width * figure.dpi
    if (width := line.get_window_extent().width) > room:
        line.set_fontsize(fontsize * room / width)


def _draw_panel(
    figure: Figure, layout: _Layout, panel: int, profile: HeadProfile, kind: str, heads: list[tuple[int, int, float]]
) -> None:
    from matplotlib.colors import PowerNorm

    scores = profile.scores[kind].detach().cpu().numpy()
    left = layout.panel_left(panel)
    axes = figure.add_axes(layout.fraction(left, layout.panel_bottom, layout.panel_width, layout.panel_height))
    # A few heads dwarf the rest: a linear scale would show those few and black.
    norm = PowerNorm(gamma=0.5, vmin=0, vmax=float(scores.max()) or 1.0)
    mesh = axes.pcolormesh(scores, cmap=_COLORMAP, norm=norm, edgecolors="#2a2238", linewidth=0.25)
    axes.set(xlim=(0, layout.num_heads), ylim=(layout.num_layers, 0))
    _label_axes(axes, layout)
    _separate_groups(axes, layout, profile.shape.group_size)
    above = 1 + 0.32 / layout.panel_height
    axes.text(0, above, kind.capitalize(), transform=axes.transAxes, size=11, weight="bold", color=_INK)
    for rank, head in enumerate(heads, 1):
        _mark_head(axes, layout, mesh.cmap(norm(head[2])), f"top-{kind}-{rank}", rank, head)
    bar_left = left + layout.panel_width + layout.bar_gap
    bar_axes = figure.add_axes(layout.fraction(bar_left, layout.panel_bottom, layout.bar_width, layout.panel_height))
    _draw_bar(bar_axes, mesh, layout, kind)


def _draw_bar(axes: Axes, mesh: Any, layout: _Layout, kind: str) -> None:
    bar = axes.figure.colorbar(mesh, cax=axes)
    bar.outline.set_visible(False)
    ticks = _bar_ticks(mesh.norm.vmax, layout.panel_height)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=7, length=2, color=_MUTED, labelcolor=_INK)
    separator = " " if layout.panel_height > 3 else "\n"
    bar.set_label(f"{kind} score{separator}(square-root color scale)", size=7.5, color=_MUTED)


def _bar_ticks(highest: float, height: float) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) from 0 to `highest`, apart on a square-root scale `height` long."""
    decade = math.floor(math.log10(highest))
    candidates = [digit * 10.0**exponent for exponent in range(decade, decade - 3, -1) for digit in (5, 2, 1)]
    ticks: list[float] = []
    last_place = math.inf
    for value in candidates:
        place = height * math.sqrt(value / highest)
        if value <= highest and min(place, last_place - place) >= 0.28:
            ticks.append(value)
            last_place = place
    return [0.0, *reversed(ticks)]


def _label_axes(axes: Axes, layout: _Layout) -> None:
    columns = _tick_step(layout.panel_width / layout.num_heads)
    rows = _tick_step(layout.cell_height)
    heads, layers = range(0, layout.num_heads, columns), range(0, layout.num_layers, rows)
    axes.set_xticks([head + 0.5 for head in heads], [str(head) for head in heads])
    axes.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
    axes.tick_params(labelsize=7, length=2, color=_MUTED, labelcolor=_INK, pad=2)
    axes.set_xlabel("query head", size=8, color=_MUTED, labelpad=3)
    axes.set_ylabel("layer", size=8, color=_MUTED, labelpad=3)
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
    above.tick_params(labelsize=7, length=0, labelcolor=_MUTED, pad=2)
    above.spines["top"].set_visible(False)
    x, y = -0.06 / layout.panel_width, 1 + 0.035 / layout.panel_height
    axes.text(x, y, "KV head", transform=axes.transAxes, ha="right", va="bottom", size=7, color=_MUTED)


def _mark_head(axes: Axes, layout: _Layout, color: Any, gid: str, rank: int, head: tuple[int, int, float]) -> None:
    """Outline a head just outside its cell and write its rank inside."""
    from matplotlib.patches import Rectangle

    row, column, _ = head
    width, height = layout.panel_width / layout.num_heads, layout.cell_height
    points = 1.4 if height < 0.15 else 1.8
    x_pad, y_pad = points / 144 / width, points / 144 / height
    corner = (column - x_pad, row - y_pad)
    outline = Rectangle(corner, 1 + 2 * x_pad, 1 + 2 * y_pad, gid=gid, clip_on=False, zorder=3)
    outline.set(fill=False, edgecolor=_MARK, linewidth=points, joinstyle="round")
    axes.add_patch(outline)

    red, green, blue, _ = color
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    size = min(8.0, 0.6 * 72 * height, 72 * width / (0.75 * len(str(rank)) + 0.25))
    number = axes.text(column + 0.5, row + 0.53, str(rank), ha="center", va="center_baseline", zorder=4)
    number.set(fontsize=size, fontweight="bold", color="white" if is_dark else _INK)


def _draw_list(
    figure: Figure, layout: _Layout, panel: int, profile: HeadProfile, kind: str, heads: list[tuple[int, int, float]]
) -> None:
    """List the marked heads under their panel, column by column: rank, head, score and standard error."""
    if not heads:
        return
    errors = profile.standard_errors.get(kind)
    uncertain = [] if errors is None else [float(errors[layer, head]) for layer, head, _ in heads]
    decimals = _decimals(uncertain or [heads[0][2] / 10])
    top = layout.list_bottom + layout.list_height - 0.1

    def write(x: float, y: float, text: str, **style: Any) -> None:
        x, y, _, _ = layout.fraction(layout.panel_left(panel) + x, y, 0, 0)
        figure.text(x, y, text, va="center_baseline", size=8, **style)

    write(0, top, f"Top {len(heads)} {kind} heads" + (" (score ± standard error)" if uncertain else ""), color=_MUTED)
    for i, (layer, head, score) in enumerate(heads):
        x = layout.list_width * (i // layout.list_rows)
        y = top - 0.27 - layout.row_height * (i % layout.list_rows)
        write(x + 0.17, y, f"{i + 1}", ha="right", color=_MUTED)
        write(x + 0.25, y, f"L{layer} H{head}", weight="bold", color=_INK)
        error = f" ± {uncertain[i]:.{decimals}f}" if uncertain else ""
        write(x + 0.88, y, f"{score:.{decimals}f}{error}", color=_INK)


def _decimals(values: list[float]) -> int:
    """Decimals, 2 to 4, that show a digit of the smallest of `values` above 0."""
    smallest = min((value for value in values if value > 0), default=1.0)
    return min(4, max(2, -math.floor(math.log10(smallest))))
