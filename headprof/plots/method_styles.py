"""Colors and markers of the methods, the same in every picture."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from headprof.plots.style import INK


@dataclass(frozen=True)
class LineStyle:
    """How a method is drawn in every picture. `strong` is for those that need a head profile."""

    color: str
    marker: str
    strong: bool = False
    hollow: bool = False


STYLES = {
    # Strong ones of Okabe and Ito's palette, which color-blind people can tell apart.
    "headkv-r2": LineStyle("#d55e00", "o", strong=True),
    "headkv": LineStyle("#0072b2", "s", strong=True),
    "headkv-ems": LineStyle("#009e73", "D", strong=True),
    # The others are many: paler, each with a marker of its own.
    "ems": LineStyle("#cc79a7", "P"),
    "snapkv": LineStyle("#56a5d8", "^"),
    "adakv": LineStyle("#c9a227", "v"),
    "pyramidkv": LineStyle("#8c7cc0", "<"),
    "tova": LineStyle("#b5846b", ">"),
    "h2o": LineStyle("#86a04c", "X"),
    "knorm": LineStyle("#9a9a9a", "p"),
    "streamingllm": LineStyle("#55606b", "*"),
    "full": LineStyle(INK, ""),
}
_SPARE_MARKERS = "osDPX^v<>ph*"


def style_of(method: str) -> LineStyle:
    """The style of a method; one with parameters, `ems:mass=false`, gets hue and marker from the letters alone."""
    if method in STYLES:
        return STYLES[method]
    number = crc32(method.encode())
    red, green, blue = colorsys.hls_to_rgb(number % 997 / 997, 0.36 + 0.04 * (number // 997 % 5), 0.55)
    color = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
    return LineStyle(color, _SPARE_MARKERS[number // 5003 % len(_SPARE_MARKERS)], hollow=True)


def marker_of(style: LineStyle) -> dict[str, Any]:
    """The marker as matplotlib's `plot` takes it."""
    face, edge = ("white", style.color) if style.hollow else (style.color, "white")
    size = 8.0 if style.marker == "*" else 5.5  # a star's arms are thin
    return {
        "marker": style.marker,
        "markersize": size,
        "markerfacecolor": face,
        "markeredgecolor": edge,
        "markeredgewidth": 1.0 if style.hollow else 0.4,
    }
