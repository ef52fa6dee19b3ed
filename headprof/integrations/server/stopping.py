"""Ending a text where one of some texts appears in it."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Hands a text on piece by piece, up to the first of some texts, which is left out.

    The first is the one that is complete first, and of those that end at one place the longest; so the cut does not
    depend on the pieces. What may turn out to be the beginning of one of them is held back.

    Args:
        stops: the texts, none of them empty.

    Attributes:
        found: whether one has appeared.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> str:
        """Take the next piece of the text; what can be handed on now."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        keep = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back of a text that has ended."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Characters at the end of a text with which a stop text begins."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
