"""JSON that somebody else may have written: taken for what it says only if it says what it should."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

Record = TypeVar("Record")

_MOST_DIGITS = 40
_DEEPEST = 32


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says, if every number in it is finite and every object has each name once.

    Raises:
        ValueError: it is no JSON, nested too deep, gives a name twice, or holds a number that no file needs.
    """
    try:
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole, object_pairs_hook=_each_once
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(value, _DEEPEST)
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """As `parse_json`, of a JSON object; raises `ValueError` for another value too."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def make_record(kind: type[Record], values: Any, ranges: dict[str, tuple[float, float]] | None = None) -> Record:
    """A dataclass of numbers, texts, true or false, and what may be missing, made of a JSON object.

    Args:
        kind: the dataclass.
        values: what `parse_json` gave.
        ranges: for some fields the least and the most that their numbers may be.

    Raises:
        ValueError: a field is missing, unknown, not of its type or out of range; the message names it.
    """
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    hints, required = _fields_of(kind)  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"it has an unknown field {shortened(unknown[0])}")
    if missing := sorted(required - values.keys()):
        raise ValueError(f"its {missing[0]} is missing")
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"its {name} cannot be {shortened(value)}")
        low, high = (ranges or {}).get(name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"its {name} cannot be {shortened(value)}")
    return kind(**values)


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number (true and false are none) from `low` to `high`."""
    return type(value) is int and low <= value <= high


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written: without halves of characters, as JSON's escapes can make."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode("utf-8") == value


def shortened(value: Any, most: int = 40) -> str:
    """A value as messages show it: escaped, and not longer than it helps."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else f"{text[:most]}..."


def plain(text: str, most: int = 40) -> str:
    """As `shortened`, of a text, without quotation marks."""
    return repr(text[:most])[1:-1] + "..." * (len(text) > most)


@cache
def _fields_of(kind: Any) -> tuple[dict[str, tuple[type, ...]], frozenset[str]]:
    """The types that each field of a dataclass may have, and the fields that have no default."""
    hints = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(kind).items()}
    own = fields(kind)
    required = frozenset(each.name for each in own if each.default is MISSING and each.default_factory is MISSING)
    return {each.name: hints[each.name] for each in own}, required


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if value is None:
        return NoneType in kinds
    return type(value) in kinds or (type(value) is int and float in kinds)


def _check_depth(value: Any, most: int) -> None:
    if isinstance(value, dict | list):
        if most == 0:
            raise ValueError("it is nested too deep")
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, most - 1)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with these names and values."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it gives {shortened(name)} twice")
        values[name] = value
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("a number has too many digits")
    return int(text)
