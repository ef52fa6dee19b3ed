"""What pictures share: colors, scales, ways to write and save, and the words about where scores came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import UsageError
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS
from headprof.utils.files import atomic_write
from headprof.utils.printable import printable
from headprof.utils.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
"""What a picture may be written as, by its suffix."""

INK, MUTED, MARK = "#1b1720", "#6d6875", "#29d3c2"
GRID = "#2a2238"
SCORE_COLORMAP, UNCERTAINTY_COLORMAP = "magma", "cividis"
SCORE_GAMMA = 0.5
"""Exponent of the score's color scale. A few heads dwarf the rest: a linear scale would show those few and black."""

DPI = 180

# Set in full so that a user's own matplotlibrc does not change the picture.
_STYLE = {"font.family": "DejaVu Sans", "svg.hashsalt": "headprof", "svg.fonttype": "path", "axes.linewidth": 0.6}


def checked_path(
    path: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    what: str = "A picture",
    mend: str = "choose one of these",
) -> Path:
    """Complain about a picture that cannot be written, before any work is done.

    Raises:
        UsageError: another suffix than `formats`; `what` the picture is and the `mend` are for the message.
    """
    path = Path(path)
    if path.suffix.lower() not in formats:
        *others, last = formats
        raise UsageError(f"{what} is written as {', '.join(others)} or {last}, not as {path.name!r}: {mend}.")
    return path


def save_picture(draw: Callable[[], Figure], path: Path) -> None:
    """Draw in our style and write atomically as PNG or SVG, by the suffix; the same drawing gives the same bytes."""
    import matplotlib.style
    from matplotlib.text import Text

    suffix = path.suffix.lower()
    with matplotlib.style.context(["default", _STYLE]), atomic_write(path) as temporary:
        # The date and the version of matplotlib would make equal pictures differ.
        undated: dict[str, Any] = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
        figure = draw()
        for text in figure.findobj(Text):  # names from files may hold what no SVG does
            text.set_text(printable(text.get_text()))
        figure.savefig(temporary, format=suffix[1:], dpi=DPI, metadata=undated)


def new_figure(width: float, height: float) -> Figure:
    """An empty white picture, sizes in inches, that no window belongs to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_heading(figure: Figure, left: float, heading: str, facts: str, fontsize: float) -> None:
    """Write a heading at the top, `left` inches from the left, and facts in a line of this size beneath."""
    width, height = figure.get_size_inches()
    heading, facts = printable(heading), printable(facts)
    figure.text(left / width, 1 - 0.24 / height, heading, va="center", size=12, color=INK, weight="bold")
    figure.text(left / width, 1 - 0.47 / height, facts, va="center", size=fontsize, color=MUTED)


def write_line(
    figure: Figure, text: str, margins: tuple[float, float], below: float, fontsize: float, **style: Any
) -> None:
    """Write a line `below` inches from the top, shrunk when it is wider than what the margins leave.

    Args:
        figure, text, style: what to write where, and how.
        margins: to the left and to the right, in inches.
        below: inches.
        fontsize: points, if there is room.
    """
    width, height = figure.get_size_inches()
    left, right = margins
    x, y = left / width, 1 - below / height
    line = figure.text(x, y, printable(text), va="center", fontsize=fontsize, parse_math=False, **style)
    room = (width - left - right) * figure.dpi
    while (taken := line.get_window_extent().width) > room:  # small letters shrink unevenly
        line.set_fontsize(line.get_fontsize() * room / taken)


def lighten_axes(axes: Axes) -> None:
    """Pale horizontal lines behind what is drawn, and no frame but to the left and below."""
    axes.grid(axis="y", color="#e4e1e8", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)


def shape_fact(profile: HeadProfile) -> str:
    """`30 layers × 9 query heads on 3 KV heads`; without the KV heads where none is shared."""
    shape = profile.shape
    heads = f"{shape.num_heads} query heads"
    if shape.group_size > 1:
        heads += f" on {shape.num_kv_heads} KV head{'s' * (shape.num_kv_heads != 1)}"
    return f"{shape.num_layers} layers × {heads}"


def probe_facts(profile: HeadProfile, kinds: Sequence[str]) -> list[str]:
    """How many probes of which lengths (tokens) the scores of `kinds` rest on, as far as the profile says."""
    facts = []
    asked = [kind for kind in kinds if kind in PROBE_KINDS] or kinds  # whose probes write scores are of
    counted = [f"{profile.probes_used[kind]} {kind}" for kind in asked if profile.probes_used.get(kind)]
    if counted:
        facts.append(f"{' + '.join(counted)} probes")
    lengths = profile.settings.get("lengths")
    if isinstance(lengths, Sequence) and lengths and all(isinstance(length, int) for length in lengths):
        facts.append(f"contexts of {', '.join(format_length(length) for length in lengths)} tokens")
    return facts


def bar_ticks(highest: float, length: float, apart: float = 0.28) -> list[float]:
    """Ticks of the score's color bar: 0 and round values (1, 2, 5 times a power of ten) up to `highest`.

    Args:
        highest: value at the bar's far end, above 0.
        length: of the bar, in inches.
        apart: least distance between two ticks, in inches.
    """
    decade = math.floor(math.log10(highest))
    candidates = [digit * 10.0**exponent for exponent in range(decade, decade - 3, -1) for digit in (5, 2, 1)]
    ticks: list[float] = []
    last = math.inf  # of the ticks' distances from 0, in inches
    for value in candidates:
        distance = length * (value / highest) ** SCORE_GAMMA
        if value <= highest and min(distance, last - distance) >= apart:
            ticks.append(value)
            last = distance
    return [0.0, *reversed(ticks)]


def even_ticks(highest: float, length: float, apart: float = 0.4) -> list[float]:
    """Ticks of a linear color bar: seven at most, 0 and multiples of 1, 2 or 5 times a power of ten."""
    least = max(apart / length, 1 / 6) * highest
    decade = math.floor(math.log10(least))
    step = next(step for step in (Decimal(digit).scaleb(decade) for digit in (1, 2, 5, 10)) if step >= least)
    return [float(i * step) for i in range(int(Decimal(highest) / step) + 1)]
