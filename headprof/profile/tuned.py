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
    found = Tuned(**{**notes, "budgets": tuple(notes["budgets"])})
    counts = (*found.budgets, found.length, found.probes, found.seed)
    losses = (found.loss, found.usual_loss)
    if not all(is_whole(count, 0, _MOST) for count in counts) or not all(map(is_text, (found.date, found.command))):
        raise ValueError("it says what cannot be")
    if not all(type(loss) in (int, float) and 0 <= loss <= 1 for loss in losses):
        raise ValueError("a loss is no share")
    if not all(type(each) in (bool, int, float, str) for each in found.options.values()):
        raise ValueError("a parameter is none")
    return found
