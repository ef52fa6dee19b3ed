"""The interactive heatmap: one HTML page that holds the profile, and everything to look at it, without a network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.plots.certainty import half_width, interval_of, is_unsure
from headprof.plots.page import escape, with_policy
from headprof.plots.style import (
    GRID,
    INK,
    MARK,
    SCORE_COLORMAP,
    SCORE_GAMMA,
    UNCERTAINTY_COLORMAP,
    bar_ticks,
    even_ticks,
    probe_facts,
    shape_fact,
)
from headprof.profile.head_profile import HeadProfile
from headprof.utils.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

_BAR_INCHES = 2.9
"""Length of the page's color bar: 280 of CSS's pixels."""


def write_page(profile: HeadProfile, path: Path, kinds: Sequence[str], top: int, uncertainty: bool) -> Path:
    """Write the page of a profile atomically; the same profile gives the same bytes.

    Args:
        profile: what to show.
        path: the page.
        kinds: kinds of score to show; the profile must hold them.
        top: number of heads to mark and list, 0 or more.
        uncertainty: begin with the uncertainty of the first kind, which must be known.

    Returns:
        `path`.

    Raises:
        HeadprofError: the disk refused.
    """
    write_text(path, render_page(page_data(profile, kinds, top, uncertainty)))
    return path


def render_page(data: dict[str, Any]) -> str:
    """The page around `data`, which may hold any text."""
    template = files("headprof.plots").joinpath("heatmap.html").read_text(encoding="utf-8")
    values = {"title": escape(data["model"]), "data": embed_json(data), "ink": INK, "mark": MARK, "grid": GRID}
    # In one pass, so that a value that looks like a placeholder stays as it is.
    return with_policy(re.sub(r"%%(\w+)%%", lambda match: values[match[1]], template))


def embed_json(value: Any) -> str:
    """JSON in ASCII that can stand inside an HTML script element: no letter of it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(profile: HeadProfile, kinds: Sequence[str], top: int, uncertainty: bool = False) -> dict[str, Any]:
    """All that the page shows, as values that JSON can hold.

    Keys: `model`, `facts` (the provenance, as phrases), `layers`, `heads`, `kvHeads`, `kinds` (a `kind_data` each),
    `colors` (256 colors, hexadecimal, of the score and of the uncertainty), `gamma` (of the score's color scale) and
    `uncertainty` (whether to begin with it).
    """
    shape = profile.shape
    date = profile.metadata.get("date")
    return {
        "model": profile.model_name,
        "facts": [shape_fact(profile), *probe_facts(profile, kinds), *([date] if date else [])],
        "layers": shape.num_layers,
        "heads": shape.num_heads,
        "kvHeads": shape.num_kv_heads,
        "kinds": [kind_data(profile, kind, top) for kind in kinds],
        "colors": {"score": color_table(SCORE_COLORMAP), "uncertainty": color_table(UNCERTAINTY_COLORMAP)},
        "gamma": SCORE_GAMMA,
        "uncertainty": uncertainty,
    }


def kind_data(profile: HeadProfile, kind: str, top: int) -> dict[str, Any]:
    """What the page shows of one kind of score.

    Lists over heads are flat, in order of layer, then head: `scores`, `ranks` (from 1; equal scores in that order) and,
    where the uncertainty is known, `low` and `high` (ends of the 95 % interval) and `uncertainty` (half its width), or
    null. `errors` holds the standard errors of a profile without intervals, else null. `top` holds the flat indices of
    the best heads, best first, and `unsure` whether each one's membership is uncertain. `decimals` are for printing.
    Kinds of one `unit` are drawn to one scale.
    """
    scores = profile.scores_of(kind)
    interval = interval_of(profile, kind)
    low, high = interval or (None, None)
    widths = half_width(profile, kind)
    errors = profile.standard_errors.get(kind) if kind not in profile.intervals else None
    order = [layer * profile.shape.num_heads + head for layer, head, _ in profile.top_heads(kind, scores.numel())]
    ranks = [0] * len(order)
    for rank, index in enumerate(order, 1):
        ranks[index] = rank
    highest = float(scores.max()) or 1.0
    widest = 0.0 if widths is None else float(widths.max())
    return {
        "name": kind,
        "unit": "logits" if kind == "write" else "",
        "scores": _shorten(scores),
        "ranks": ranks,
        "low": _shorten(low),
        "high": _shorten(high),
        "errors": _shorten(errors),
        "uncertainty": _shorten(widths),
        "top": order[:top],
        "unsure": is_unsure(profile, kind, top),
        "highest": _short(highest),
        "widest": _short(widest or 1.0),
        "scoreTicks": bar_ticks(highest, _BAR_INCHES, apart=0.42),
        "uncertaintyTicks": even_ticks(widest or 1.0, _BAR_INCHES, apart=0.55),
        "decimals": min(8, max(0, 2 - math.floor(math.log10(highest)))),
    }


def color_table(colormap: str) -> str:
    """The 256 colors of a matplotlib color map, dark to bright, as six hexadecimal digits each, in one text."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return "".join(to_hex(colormaps[colormap](i)).removeprefix("#") for i in range(256))


def _shorten(values: Tensor | None) -> list[float] | None:
    return None if values is None else [_short(value) for value in values.detach().cpu().flatten().tolist()]


def _short(value: float) -> float:
    """`value` to five significant digits."""
    return float(f"{value:.5g}")
