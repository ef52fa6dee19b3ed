"""The parameters that serve a model best, as its profile's metadata say them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headprof.utils.records import is_text, is_whole, parse_object

NOTE = "tuned"
"""The entry of the metadata."""
_MOST = 2**53

Options = Mapping[str, Any]
"""Parameters of a method by name: true or false, numbers and words."""


@dataclass(frozen=True)
class Refined:
    """How budgets were moved to where they lose less, and what that brought.

    Attributes:
        budgets: tokens per KV head.
        losses: mean divergence from the full cache on probes that moved nothing, nats a token: of each budget,
            before and after; where that is more, budgets are as before.
        probes: how many moved budgets, and how many saw whether that has helped.
        length: tokens of a prompt.
    """

    budgets: tuple[int, ...]
    losses: tuple[tuple[float, float], ...]
    probes: tuple[int, int]
    length: int


@dataclass(frozen=True)
class Tuned:
    """What was found, and how well it did beside the parameters that methods have otherwise.

    Attributes:
        options: parameters of HeadKV-R2's importance and budgets that differ from those.
        loss, usual_loss: share of the right answers' probability that is lost with these parameters and with the usual
            ones, mean over budgets and over the probes that both were tried on, 0 to 1.
        budgets: tokens per KV head that were tried.
        length: tokens of a prompt.
        probes: how many both were tried on.
        seed: of the probes.
        date, command: of the run.
        refined: what moving budgets brought; `None` if that was not done.
    """

    options: Options
    loss: float
    usual_loss: float
    budgets: tuple[int, ...]
    length: int
    probes: int
    seed: int
    date: str = ""
    command: str = ""
    refined: Refined | None = None

    def note(self) -> str:
        """The same for a profile's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Tuned | None:
        """What a profile's metadata say of it; `None` if they say nothing, or nothing that could be."""
        try:
            return _tuned(parse_object(metadata[NOTE]))
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


def _tuned(notes: dict[str, Any]) -> Tuned:
    """Raises one of the errors that `Tuned.of` knows for notes that could not be."""
    refined = None if notes.get("refined") is None else _refined(notes["refined"])
    found = Tuned(**{**notes, "budgets": tuple(notes["budgets"]), "refined": refined})
    counts = (*found.budgets, found.length, found.probes, found.seed)
    losses = (found.loss, found.usual_loss)
    if not all(is_whole(count, 0, _MOST) for count in counts) or not all(map(is_text, (found.date, found.command))):
        raise ValueError("it says what cannot be")
    if not all(type(loss) in (int, float) and 0 <= loss <= 1 for loss in losses):
        raise ValueError("a loss is no share")
    if not all(type(each) in (bool, int, float, str) for each in found.options.values()):
        raise ValueError("a parameter is none")
    return found


def _refined(notes: dict[str, Any]) -> Refined:
    """Raises one of the errors that `Tuned.of` knows for notes that could not be."""
    losses = tuple((before, after) for before, after in notes["losses"])
    found = Refined(tuple(notes["budgets"]), losses, tuple(notes["probes"]), notes["length"])
    if not all(is_whole(count, 0, _MOST) for count in (*found.budgets, *found.probes, found.length)):
        raise ValueError("it says what cannot be")
    if len(losses) != len(found.budgets) or len(found.probes) != 2:
        raise ValueError("losses are not of its budgets")
    if not all(type(loss) in (int, float) and 0 <= loss < float("inf") for row in losses for loss in row):
        raise ValueError("a loss is none")
    return found
