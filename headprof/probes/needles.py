"""Needles: the facts that probes hide and ask for, sampled from the shipped families or read from a JSONL file."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from headprof.errors import ProbeError, UsageError
from headprof.utils.assets import asset_dir
from headprof.utils.files import read_text
from headprof.utils.records import is_text, parse_json, shortened

Kind = Literal["retrieval", "reasoning"]
Split = Literal["profile", "eval"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)

# A slot list may be a list of values, a pattern over other lists, or a range of numbers.
SlotSource = list[str] | str | dict[str, int]

_MAX_DRAWS = 400
_LARGEST_FILE = 2**26
_LONGEST_NAME = 200
_REQUIRED_FIELDS = ("needle", "real_needle", "answer", "question")


@dataclass(frozen=True)
class Needle:
    """One fact and the question about it.

    Attributes:
        text: one or more sentences; of kind "reasoning" they hold premises, the right answer and the distractors.
        answer: the reply that is expected; in generated needles it is `text[answer_start:answer_stop]`.
        answer_start: character offset in `text` at which the answer, or the sentence that holds it, begins.
        answer_stop: character offset in `text` at which it ends.
        distractors: character spans `[start, stop)` in `text` of the wrong candidates.
        answer_prefix: the beginning of the reply, which is given; the answer follows after a blank. May be empty.
        values: what the slots were filled with; needles that share none can stand in one context.
    """

    family: str
    kind: Kind
    text: str
    answer: str
    answer_start: int
    answer_stop: int
    distractors: tuple[tuple[int, int], ...]
    question: str
    answer_prefix: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One wording of a needle; together the variants of a family balance where the right answer stands."""

    needle: str
    question: str
    answer_prefix: str


class SlotLists:
    """The lists that fill slots, each cut in two halves that share no value: one per split."""

    def __init__(self, sources: Mapping[str, SlotSource]) -> None:
        self._sources = dict(sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def values(self, name: str, split: Split) -> list[str]:
        """All values of a plain list in `split`: every other one, so that both halves have the same mixture."""
        source = self._sources[name]
        if not isinstance(source, list):
            raise TypeError(f"slot list {name!r} is composed, not enumerated")
        return source[SPLITS.index(split) :: len(SPLITS)]

    def draw(self, name: str, rng: random.Random, split: Split, taken: Collection[str]) -> list[str]:
        """A value none of whose parts is in `taken`: `[value, *parts]`."""
        source = self._sources[name]
        if isinstance(source, str):
            parts = {part: self.draw(part, rng, split, taken) for part in _slots_of(source)}
            value = source.format(**{part: drawn[0] for part, drawn in parts.items()})
            return [value, *(text for drawn in parts.values() for text in drawn)]
        for _ in range(_MAX_DRAWS):
            value = (
                self._draw_number(source, rng, split)
                if isinstance(source, dict)
                else rng.choice(self.values(name, split))
            )
            if value not in taken:
                return [value]
        raise ProbeError(
            f"The slot list {name!r} has too few values for so many needles in one context; "
            "lower the number of needles per context."
        )

    @staticmethod
    def _draw_number(source: Mapping[str, int], rng: random.Random, split: Split) -> str:
        return str(rng.randrange(source["from"] + SPLITS.index(split), source["to"] + 1, len(SPLITS)))


@dataclass(frozen=True)
class Family:
    """A kind of needle: wordings with slots, and the lists that fill them.

    The slot `answer` holds the right answer; slots whose names begin with `other` hold the distractors.
    """

    name: str
    kind: Kind
    description: str
    slots: Mapping[str, str]
    variants: tuple[Variant, ...]
    lists: SlotLists = field(repr=False)

    def sample(
        self,
        rng: random.Random,
        split: Split = "profile",
        taken: Collection[str] = (),
        turn: int | None = None,
    ) -> Needle:
        """A needle whose slot values belong to `split` and are not in `taken` (values of needles it must not meet).

        With `turn` the wordings take turns, so that over consecutive turns every position of the right answer comes
        up equally often; without it `rng` chooses one.

        Raises:
            ProbeError: `taken` leaves a slot list without values.
        """
        values, used = {}, set(taken)
        for slot, source in self.slots.items():
            drawn = self.lists.draw(source, rng, split, used)
            values[slot] = drawn[0]
            used.update(drawn)
        variant = rng.choice(self.variants) if turn is None else self.variants[turn % len(self.variants)]
        text, spans = _fill(variant.needle, values)
        start, stop = next((start, stop) for slot, start, stop in spans if slot == "answer")
        return Needle(
            family=self.name,
            kind=self.kind,
            text=text,
            answer=values["answer"],
            answer_start=start,
            answer_stop=stop,
            distractors=tuple((start, stop) for slot, start, stop in spans if slot.startswith("other")),
            question=_fill(variant.question, values)[0],
            answer_prefix=_fill(variant.answer_prefix, values)[0],
            values=tuple(sorted(used.difference(taken))),
        )


def load_families(path: str | Path | None = None) -> list[Family]:
    """The families in folder `path` (default: the shipped ones): `slots.json`, `retrieval.json`, `reasoning.json`.

    Raises:
        UsageError: a file is missing or is not JSON.
        ProbeError: a family does not fit its slot lists.
    """
    folder = Path(path) if path is not None else asset_dir("data") / "needles"
    lists = SlotLists(_read_json(folder / "slots.json"))
    families = [_parse_family(raw, kind, lists) for kind in KINDS for raw in _read_json(folder / f"{kind}.json")]
    for family in families:
        _check_family(family)
    return families


def load_needles(path: str | Path) -> list[Needle]:
    """Needles from a JSONL file with the papers' fields `needle`, `real_needle`, `answer`, `question`.

    The answer span is `real_needle` as it stands in `needle`. Optional fields: `kind` (default "reasoning"),
    `answer_prefix` (default empty) and `family` (default: the file's name).

    Raises:
        UsageError: the file does not exist.
        ProbeError: a line is not such a needle, or there is none; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"The needle file {file} does not exist; give a JSONL file with one needle a line.")
    if file.stat().st_size > _LARGEST_FILE:
        raise UsageError(f"The needle file {file} is larger than {_LARGEST_FILE} bytes; give a smaller one.")
    lines = read_text(file, ProbeError).split("\n")  # JSON strings may hold other line separators, such as U+2028
    needles = [_parse_needle(line, f"Line {n} of {file}", file.stem) for n, line in enumerate(lines, 1) if line.strip()]
    if not needles:
        raise ProbeError(f"The needle file {file} is empty; write one JSON object with a needle on each line.")
    return needles


def _parse_needle(line: str, where: str, default_family: str) -> Needle:
    try:
        raw = parse_json(line)
    except JSONDecodeError as error:
        raise ProbeError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); write one object a line."
        ) from None
    except ValueError as error:
        raise ProbeError(
            f"{where} cannot be read ({error}); write one object a line, of short numbers and plain texts."
        ) from None
    if not isinstance(raw, dict):
        raise ProbeError(f'{where} is not a JSON object; write one such as {{"needle": ..., "answer": ...}} a line.')
    for name in _REQUIRED_FIELDS:
        if not isinstance(raw.get(name), str) or not raw[name].strip():
            raise ProbeError(f"{where} has no text in the field {name!r}; give all of {', '.join(_REQUIRED_FIELDS)}.")
    for name in (*_REQUIRED_FIELDS, "answer_prefix"):
        if not is_text(raw.get(name, "")):
            raise ProbeError(f"{where} has no text that could be written in the field {name!r}; mend it.")
    family = raw.get("family", default_family)
    if not is_text(family) or not family.isprintable() or len(family) > _LONGEST_NAME:
        raise ProbeError(f"{where} has the family {shortened(family)}; give a name of one line.")
    text, real = raw["needle"].strip(), raw["real_needle"].strip()
    if real not in text:
        raise ProbeError(
            f"{where} has a real_needle that is not in its needle; copy it from the needle, word for word."
        )
    kind = raw.get("kind", "reasoning")
    if kind not in KINDS:
        raise ProbeError(f"{where} has the kind {shortened(kind)}; use one of {', '.join(KINDS)}.")
    return Needle(
        family=family,
        kind=kind,
        text=text,
        answer=raw["answer"].strip(),
        answer_start=text.index(real),
        answer_stop=text.index(real) + len(real),
        distractors=(),
        question=raw["question"].strip(),
        answer_prefix=raw.get("answer_prefix", "").strip(),
    )


def _parse_family(raw: Mapping[str, Any], kind: Kind, lists: SlotLists) -> Family:
    variants = tuple(
        Variant(
            needle=variant["needle"],
            question=variant["question"],
            answer_prefix=variant["answer_prefix"],
        )
        for variant in ({**raw, **variant} for variant in raw["variants"])
    )
    return Family(raw["name"], kind, raw["description"], dict(raw["slots"]), variants, lists)


def _check_family(family: Family) -> None:
    unknown = [source for source in family.slots.values() if source not in family.lists]
    if unknown:
        raise ProbeError(f"The family {family.name!r} uses the slot list {unknown[0]!r}; add that list to slots.json.")
    for variant in family.variants:
        slots = _slots_of(variant.needle)
        if slots.count("answer") != 1 or variant.needle.startswith("{answer}"):
            raise ProbeError(
                f"A needle of the family {family.name!r} must hold {{answer}} once, not as its first word; reword it."
            )
        for slot in (*slots, *_slots_of(variant.question), *_slots_of(variant.answer_prefix)):
            if slot not in family.slots:
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


def _slots_of(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _fill(template: str, values: Mapping[str, str]) -> tuple[str, list[tuple[str, int, int]]]:
    """Fill the slots of `template`: the text, and `(slot, start, stop)` in characters for each slot."""
    text, spans = "", []
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            spans.append((slot, len(text), len(text) + len(values[slot])))
            text += values[slot]
    return text, spans
