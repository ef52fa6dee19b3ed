"""Needles: the facts that probes hide and ask for, sampled from families or read from a JSONL file."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from string import Formatter
from typing import Literal, get_args

from headprof.errors import ProbeError, UsageError
from headprof.probes.slots import KNOWN, SlotLists, Split
from headprof.utils.files import read_text
from headprof.utils.records import is_text, parse_json, shortened

Kind = Literal["retrieval", "reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)

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


@dataclass(frozen=True)
class Family:
    """A kind of needle: wordings with slots, and the lists that fill them.

    The slot `answer` holds the right answer; slots whose names begin with `other` hold the distractors. `{slot.known}`
    stands for what is known of a slot's value, of which the needle says nothing.
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
            if (known := self.lists.known(source, drawn[0])) is not None:
                values[slot + KNOWN] = known
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


def _fill(template: str, values: Mapping[str, str]) -> tuple[str, list[tuple[str, int, int]]]:
    """Fill the slots of `template`: the text, and `(slot, start, stop)` in characters for each slot."""
    text, spans = "", []
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            spans.append((slot, len(text), len(text) + len(values[slot])))
            text += values[slot]
    return text, spans
