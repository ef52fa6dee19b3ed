"""Families of needles: reading the files that hold them, and choosing some by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headprof.errors import ProbeError, UsageError
from headprof.probes.needles import KINDS, Family, Kind, Variant
from headprof.probes.slots import KNOWN, SlotLists, slots_of
from headprof.utils.assets import asset_dir
from headprof.utils.files import read_text

NONLITERAL = "nonliteral"
"""What the families of `load_nonliteral` are called together."""


def load_families(path: str | Path | None = None) -> list[Family]:
    """The families in folder `path` (default: the shipped ones): `slots.json`, `retrieval.json`, `reasoning.json`.

    Raises:
        UsageError: a file is missing or is not JSON.
        ProbeError: a family does not fit its slot lists.
    """
    folder = _folder(path)
    lists = SlotLists(_read_json(folder / "slots.json"))
    return [_parse_family(raw, kind, lists) for kind in KINDS for raw in _read_json(folder / f"{kind}.json")]


def load_nonliteral(path: str | Path | None = None) -> list[Family]:
    """The families in `nonliteral.json`, of kind "retrieval": their questions share no word with their needles.

    After NoLiMa (Modarressi et al. 2025, arXiv 2502.05167): what leads from the question to the needle is common
    knowledge, such as which country a city is in, or what `Dr.` stands for.

    Raises:
        UsageError: a file is missing or is not JSON.
        ProbeError: a family does not fit its slot lists.
    """
    folder = _folder(path)
    lists = SlotLists(_read_json(folder / "slots.json"))
    return [_parse_family(raw, "retrieval", lists) for raw in _read_json(folder / "nonliteral.json")]


def choose_families(names: Sequence[str] | None) -> list[Family]:
    """The shipped families of these names; `NONLITERAL` stands for all of that file. `None`: all that are literal.

    Raises:
        UsageError: there is no family of a name.
    """
    literal = load_families()
    if not names:
        return literal
    nonliteral = load_nonliteral()
    known = {family.name: [family] for family in (*literal, *nonliteral)} | {NONLITERAL: nonliteral}
    if unknown := next((name for name in names if name not in known), None):
        raise UsageError(f"There is no needle family {unknown!r}; use some of {', '.join(sorted(known))}.")
    return list({family.name: family for name in names for family in known[name]}.values())


def _folder(path: str | Path | None) -> Path:
    return Path(path) if path is not None else asset_dir("data") / "needles"


def _parse_family(raw: Mapping[str, Any], kind: Kind, lists: SlotLists) -> Family:
    variants = tuple(
        Variant(
            needle=variant["needle"],
            question=variant["question"],
            answer_prefix=variant["answer_prefix"],
        )
        for variant in ({**raw, **variant} for variant in raw["variants"])
    )
    family = Family(raw["name"], kind, raw["description"], dict(raw["slots"]), variants, lists)
    _check_family(family)
    return family


def _check_family(family: Family) -> None:
    unknown = [source for source in family.slots.values() if source not in family.lists]
    if unknown:
        raise ProbeError(f"The family {family.name!r} uses the slot list {unknown[0]!r}; add that list to slots.json.")
    tells = [slot for slot, source in family.slots.items() if family.lists.has_known(source)]
    allowed = {*family.slots, *(slot + KNOWN for slot in tells)}
    for variant in family.variants:
        slots = list(slots_of(variant.needle))
        if slots.count("answer") != 1 or variant.needle.startswith("{answer}"):
            raise ProbeError(
                f"A needle of the family {family.name!r} must hold {{answer}} once, not as its first word; reword it."
            )
        for slot in (*slots, *slots_of(variant.question), *slots_of(variant.answer_prefix)):
            if slot not in allowed:
                raise ProbeError(
                    f"A text of the family {family.name!r} uses the slot {slot!r}; list it under its slots."
                )


def _read_json(path: Path) -> Any:
    try:
        if not path.exists():
            raise UsageError(f"The needle families file {path} does not exist; give a folder that holds it.")
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The needle families file {path} is not JSON ({error}); mend it.") from None
