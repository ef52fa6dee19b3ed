"""Where everything stands in the picture of a head profile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class HeadsLayout:
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


def tick_step(cell: float) -> int:
    """How many cells of `cell` inches from one label to the next, so that two labels do not touch."""
    return next((step for step in (1, 2, 4, 8, 16) if step * cell >= 0.19), 32)
