"""The picture of a head profile: layers by heads, KV groups visible, the best heads marked and listed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headprof.plots.certainty import check_known, half_width, is_unsure
from headprof.plots.heads_cells import DASHES, draw_bar, draw_cells, number_head, outline_head
from headprof.plots.heads_layout import HeadsLayout
from headprof.plots.heads_list import draw_list
from headprof.plots.heads_page import write_page
from headprof.plots.style import (
    INK,
    MARK,
    MUTED,
    SCORE_COLORMAP,
    SCORE_GAMMA,
    UNCERTAINTY_COLORMAP,
    checked_path,
    new_figure,
    probe_facts,
    save_picture,
    shape_fact,
    write_line,
)
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".html")


def heatmap(
    profile: HeadProfile, path: str | Path, which: str = "all", top: int = 10, uncertainty: bool = False
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
        which: a kind of score; `all` for those that the profile holds; or `both` for retrieval and reasoning (the one
            that it holds, for a profile with one of these).
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
    kinds = _chosen_kinds(profile, which)
    best = {kind: profile.top_heads(kind, top) for kind in kinds}
    if uncertainty:
        check_known(profile, kinds)
    if path.suffix.lower() == ".html":
        return write_page(profile, path, kinds, top, uncertainty)
    save_picture(lambda: _draw(profile, best, uncertainty), path)
    return path


def _chosen_kinds(profile: HeadProfile, which: str) -> tuple[str, ...]:
    if which == "all":
        return profile.kinds
    of_probes = tuple(kind for kind in PROBE_KINDS if kind in profile.scores)
    return (of_probes or PROBE_KINDS) if which == "both" else (which,)


def _draw(profile: HeadProfile, best: dict[str, list[tuple[int, int, float]]], uncertainty: bool = False) -> Figure:
    shape = profile.shape
    num_listed = max(len(heads) for heads in best.values())
    layout = HeadsLayout(shape.num_layers, shape.num_heads, len(best), num_listed, uncertainty)
    figure = new_figure(layout.width, layout.height)
    _draw_title(figure, layout, profile, list(best))
    for panel, (kind, heads) in enumerate(best.items()):
        dashed = is_unsure(profile, kind, len(heads)) if uncertainty else [False] * len(heads)
        _draw_panel(figure, layout, panel, profile, kind, heads, dashed)
        if uncertainty:
            _draw_uncertainty(figure, layout, panel, profile, kind, heads, dashed)
            _draw_key(figure, layout, panel, len(heads))
        draw_list(figure, layout, panel, profile, kind, heads)
    return figure


def _draw_title(figure: Figure, layout: HeadsLayout, profile: HeadProfile, kinds: list[str]) -> None:
    facts = [shape_fact(profile), *probe_facts(profile, kinds)]
    margins = layout.left, layout.right
    write_line(figure, profile.model_name, margins, below=0.36, fontsize=14, color=INK, weight="bold")
    # A line of this size takes about 0.07 inches a letter.
    fits = 0.07 * len("  ·  ".join(facts)) <= layout.text_width
    for i, line in enumerate([facts] if fits else [facts[:1], facts[1:]]):
        write_line(figure, "  ·  ".join(line), margins, below=0.65 + 0.18 * i, fontsize=9, color=MUTED)


def _draw_panel(
    figure: Figure,
    layout: HeadsLayout,
    panel: int,
    profile: HeadProfile,
    kind: str,
    heads: list[tuple[int, int, float]],
    dashed: list[bool],
) -> None:
    """The scores, the best heads outlined and numbered; `dashed` says which outlines are."""
    corner = layout.panel_left(panel), layout.panel_bottom
    scores = profile.scores[kind].detach().cpu().numpy()
    axes, mesh = draw_cells(figure, layout, corner, scores, SCORE_COLORMAP, SCORE_GAMMA, profile.shape.group_size)
    _write_heading(axes, layout, kind.capitalize())
    for rank, (head, is_dashed) in enumerate(zip(heads, dashed, strict=True), 1):
        outline_head(axes, layout, f"top-{kind}-{rank}", head, is_dashed)
        number_head(axes, layout, mesh.cmap(mesh.norm(head[2])), rank, head)
    draw_bar(figure, layout, corner, mesh, f"{kind} score", "(square-root color scale)")


def _draw_uncertainty(
    figure: Figure,
    layout: HeadsLayout,
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
    axes, mesh = draw_cells(figure, layout, corner, values, UNCERTAINTY_COLORMAP, 1, profile.shape.group_size)
    _write_heading(axes, layout, f"{kind.capitalize()}: uncertainty")
    for rank, (head, is_dashed) in enumerate(zip(heads, dashed, strict=True), 1):
        outline_head(axes, layout, f"uncertainty-{kind}-{rank}", head, is_dashed)
    # Beside a panel of few layers the whole phrase would run into the heading.
    is_low = layout.panel_height < 1.6
    label = ("half width of", "the interval") if is_low else ("half width of the 95 % interval", f"({kind} score)")
    draw_bar(figure, layout, corner, mesh, *label)


def _draw_key(figure: Figure, layout: HeadsLayout, panel: int, top: int) -> None:
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
        swatch.set(fill=False, edgecolor=MARK, linewidth=1.4, linestyle=DASHES if is_dashed else "solid")
        figure.add_artist(swatch)
        x, y, _, _ = layout.fraction(x + 0.28, y, 0, 0)
        figure.text(x, y, meaning, va="center_baseline", size=7.5, color=MUTED)


def _write_heading(axes: Axes, layout: HeadsLayout, text: str) -> None:
    axes.text(0, 1 + 0.32 / layout.panel_height, text, transform=axes.transAxes, size=11, weight="bold", color=INK)
