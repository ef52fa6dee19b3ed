"""The lists that fill the slots of needles."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from string import Formatter
from typing import Literal, get_args

from headprof.errors import ProbeError

Split = Literal["profile", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)

KNOWN = ".known"
"""Behind a slot's name, in a question: what is known of its value."""

# A slot list may be a list of values, one of pairs (a value, and what is known of it), a pattern over other lists, or a
# range of numbers.
SlotSource = list[str] | list[list[str]] | str | dict[str, int]

_MAX_DRAWS = 400


class SlotLists:
    """The lists that fill slots, each cut in two halves that share no value: one per split."""

    def __init__(self, sources: Mapping[str, SlotSource]) -> None:
        self._sources: dict[str, list[str] | str | dict[str, int]] = {}
        self._known: dict[str, dict[str, str]] = {}
        for name, source in sources.items():
            if isinstance(source, list):
                self._sources[name] = [each if isinstance(each, str) else each[0] for each in source]
                if pairs := {each[0]: each[1] for each in source if not isinstance(each, str)}:
                    self._known[name] = pairs
            else:
                self._sources[name] = source

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def values(self, name: str, split: Split) -> list[str]:
        """All values of a plain list in `split`: every other one, so that both halves have the same mixture."""
        source = self._sources[name]
        if not isinstance(source, list):
            raise TypeError(f"slot list {name!r} is composed, not enumerated")
        return source[SPLITS.index(split) :: len(SPLITS)]

    def has_known(self, name: str) -> bool:
        """Whether a list says what is known of its values."""
        return name in self._known

    def known(self, name: str, value: str) -> str | None:
        """What is known of a value, where the list says so."""
        return self._known[name][value] if name in self._known else None

    def draw(self, name: str, rng: random.Random, split: Split, taken: Collection[str]) -> list[str]:
        """A value none of whose parts is in `taken`, nor what is known of it: `[value, *these]`."""
        source = self._sources[name]
        if isinstance(source, str):
            parts = {part: self.draw(part, rng, split, taken) for part in slots_of(source)}
            value = source.format(**{part: drawn[0] for part, drawn in parts.items()})
            return [value, *(text for drawn in parts.values() for text in drawn)]
        for _ in range(_MAX_DRAWS):
            value = (
                self._draw_number(source, rng, split)
                if isinstance(source, dict)
                else rng.choice(self.values(name, split))
            )
            known = self.known(name, value)
            if value not in taken and known not in taken:
                return [value] if known is None else [value, known]
        raise ProbeError(
            f"The slot list {name!r} has too few values for so many needles in one context; "
            "lower the number of needles per context."
        )

    @staticmethod
    def _draw_number(source: Mapping[str, int], rng: random.Random, split: Split) -> str:
        return str(rng.randrange(source["from"] + SPLITS.index(split), source["to"] + 1, len(SPLITS)))


def slots_of(template: str) -> Iterator[str]:
    """The names of the slots of a text, in order."""
    return (name for _, name, _, _ in Formatter().parse(template) if name is not None)
