"""How a profile came by what it has learned from repeated texts, as its metadata say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headprof.utils.records import is_text, is_whole, parse_object

NOTE = "reconstruction"
"""The entry of the metadata."""
_MOST = 2**53


@dataclass(frozen=True)
class Learning:
    """What was repeated, and how the budgets learned from it were mixed with those of HeadKV-R2.

    Attributes:
        texts: how many.
        lengths: of theirs, in tokens.
        seed: of theirs.
        folder: that they came from; empty for this project's own.
        date, command: of the run.
        mixes: weight of HeadKV-R2's budgets in the geometric mean, 0 to 1, at the smallest shares; 0 at the others.
        losses: at each of these shares what was lost with each weight that was tried, from 0 to 1, nats a token.
        probes: by how many that was measured.
        refined: at each of the smallest shares what was lost, on other probes, with these budgets and with the
            moved ones, which are kept where that is less, nats a token; empty where none were moved.
    """

    texts: int
    lengths: tuple[int, ...]
    seed: int
    folder: str
    date: str
    command: str
    mixes: tuple[float, ...] = ()
    losses: tuple[tuple[float, ...], ...] = ()
    probes: int = 0
    refined: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Learning | None:
        """What a profile's metadata say of it; `None` if they say nothing, or nothing that could be."""
        try:
            return _learning(parse_object(metadata[NOTE]))
        except (KeyError, ValueError):
            return None


def is_mixed(metadata: Mapping[str, str]) -> bool:
    """Whether budgets of HeadKV-R2, and so a profile's reasoning scores, may have gone into its learned ones."""
    learning = Learning.of(metadata)
    return NOTE in metadata if learning is None else any(learning.mixes)


def _learning(notes: dict[str, Any]) -> Learning:
    """Raises `ValueError` or `KeyError` for notes that could not be."""
    texts, lengths, seed = notes["texts"], notes["lengths"], notes["seed"]
    folder, date, command = (notes.get(name) or "" for name in ("folder", "date", "command"))
    mixes, probes = _numbers(notes.get("mixes", [])), notes.get("mix_probes", 0)
    losses = tuple(map(_numbers, _listed(notes.get("mix_losses", []))))
    refined = tuple(map(_numbers, _listed(notes.get("refine_losses", []))))
    counts = [texts, seed, probes, *_listed(lengths)]
    if not all(is_whole(count, 0, _MOST) for count in counts) or not all(map(is_text, (folder, date, command))):
        raise ValueError("it says what cannot be")
    if len(losses) != len(mixes) or not all(losses) or not all(refined) or max(mixes, default=0) > 1:
        raise ValueError("weights and losses are not of the same shares")
    return Learning(texts, tuple(lengths), seed, folder, date, command, mixes, losses, probes, refined)


def _listed(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError("a list is none")
    return values


def _numbers(values: Any) -> tuple[float, ...]:
    if not all(type(value) in (int, float) and value >= 0 for value in _listed(values)):
        raise ValueError("a number is none")
    return tuple(values)
