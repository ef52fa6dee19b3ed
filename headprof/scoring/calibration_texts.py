"""Texts that a model repeats while something is fitted to it: six kinds, of the half of the facts that profiles use."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from headprof.errors import UsageError
from headprof.models.text_encoder import TextEncoder
from headprof.probes.families import load_families
from headprof.probes.haystack import PARAGRAPH_BREAK, Haystack
from headprof.probes.needles import Family
from headprof.probes.slots import SlotLists, Split

_SPLIT: Split = "profile"
_SENTENCES_PER_FACT = (2, 6)
_BLOCK = 16
WORDS = re.compile(r"\s*\S+")
_NAMES = ("name", "city", "phrase", "object", "building", "job", "sport", "language", "food", "cargo", "ship")
_MONTHS = ("January", "March", "April", "June", "August", "September", "October", "December")

Writer = Callable[[random.Random, "_Facts"], Iterator[str]]


class _Facts:
    """Values, sentences and whole facts to write texts from."""

    def __init__(self) -> None:
        self.families: list[Family] = load_families()
        self._lists: SlotLists = self.families[0].lists
        self._haystack = Haystack.composed()

    def value(self, name: str, rng: random.Random) -> str:
        return self._lists.draw(name, rng, _SPLIT, ())[0]

    def number(self, rng: random.Random) -> str:
        return self.value("digits", rng)

    def day(self, rng: random.Random) -> str:
        return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1950, 2024)}"

    def needle(self, rng: random.Random) -> str:
        return rng.choice(self.families).sample(rng, _SPLIT).text

    def filler(self, rng: random.Random) -> Iterator[str]:
        return self._haystack.sentences(rng)


def _prose(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Running text with a fact every few sentences."""
    filler = facts.filler(rng)
    while True:
        for sentence in islice(filler, rng.randint(*_SENTENCES_PER_FACT)):
            yield sentence if sentence.endswith(PARAGRAPH_BREAK) else f"{sentence} "
        yield f"{facts.needle(rng)} "


def _records(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Entries of named fields, the same fields throughout."""
    fields = rng.sample(_NAMES, rng.randint(3, 6))
    title = rng.choice(("Entry", "Record", "File", "Card"))
    while True:
        lines = [f"{title} {facts.number(rng)}", *(f"{name}: {facts.value(name, rng)}" for name in fields)]
        yield "\n".join([*lines, f"date: {facts.day(rng)}"]) + "\n\n"


def _table(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Rows of cells under a head of columns."""
    columns = rng.sample(_NAMES, rng.randint(3, 5))
    cells = rng.choice((",", " | ", "\t"))
    yield cells.join(["number", *columns]) + "\n"
    while True:
        yield cells.join([facts.number(rng), *(facts.value(name, rng) for name in columns)]) + "\n"


def _lists(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Headings with points below them, numbered or not."""
    while True:
        name = rng.choice(_NAMES)
        yield f"{rng.choice(('Things about', 'Notes on', 'What is known of'))} the {facts.value('project', rng)} plan\n"
        numbered = rng.random() < 0.5
        for number in range(1, rng.randint(4, 9)):
            mark = f"{number}." if numbered else "-"
            yield f"{mark} {facts.value(name, rng)}, {facts.number(rng)}, {facts.value('city', rng)}\n"
        yield "\n"


def _dialogue(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Two people who take turns, one of whom knows something."""
    people = [facts.value("name", rng), facts.value("name", rng)]
    filler = facts.filler(rng)
    for turn, sentence in enumerate(filler):
        said = sentence.strip()
        if turn % 3 == 2:
            said = f"{facts.needle(rng)} {said}"
        if turn % 4 == 3:
            said = f"Did you know the {facts.value('phrase', rng)}? {said}"
        yield f"{people[turn % 2]}: {said}\n"


def _code(rng: random.Random, facts: _Facts) -> Iterator[str]:
    """Functions and tables as programs have them."""
    while True:
        name, item, other = ("_".join(facts.value(each, rng).split()) for each in ("phrase", "object", "goods"))
        yield f"def {name}({item}, {other}=None):\n"
        role, house = facts.value("job", rng), facts.value("building", rng)
        yield f'    """{role.capitalize()} of the {house}."""\n'
        yield f"    {item}_limit = {facts.number(rng)}\n"
        places = {facts.value("city", rng): int(facts.number(rng)) for _ in range(3)}
        yield f"    places = {places}\n"
        yield f"    if {other} is None or len({item}) > {item}_limit:\n"
        yield f"        return places[{rng.choice([*places])!r}]\n"
        yield f"    return {item} + {other}\n\n\n"


KINDS: dict[str, Writer] = {
    "prose": _prose,
    "records": _records,
    "dialogue": _dialogue,
    "table": _table,
    "lists": _lists,
    "code": _code,
}
"""What kinds of text there are, in the order in which they take turns."""


def calibration_texts(tokenizer: Any, lengths: Sequence[int], number: int, seed: int) -> list[str]:
    """Texts as documents are, to be framed and encoded as any (`PromptEncoder.document_ids`).

    Text `i` is of kind `i` of `KINDS`, its length one of `lengths`; both take turns, so that each kind meets each
    length. It depends on `i`, the tokenizer, the lengths and the seed, not on how many there are. What evaluation asks
    about is not in them: they draw on the half of the facts that profiles are made from.

    Args:
        tokenizer: the model's, which counts their tokens.
        lengths: most tokens of each, without what frames it; a text is shorter by less than a word.
        number: how many.
        seed: decides all of them.

    Raises:
        UsageError: a length is below one token, or there are none.
    """
    if not lengths or min(lengths) < 1:
        raise UsageError("Calibration texts need lengths of at least one token: give some with --lengths.")
    facts, encoder = _Facts(), TextEncoder(tokenizer)
    return [_text(at, lengths, seed, facts, encoder) for at in range(number)]


def kind_of(index: int) -> str:
    """The kind of text `index` of those that `calibration_texts` returns."""
    return list(KINDS)[index % len(KINDS)]


def _text(index: int, lengths: Sequence[int], seed: int, facts: _Facts, encoder: TextEncoder) -> str:
    rng = random.Random(f"calibration {seed} {index}")
    length = lengths[(index // len(KINDS) + index) % len(lengths)]
    return _first_tokens(KINDS[kind_of(index)](rng, facts), length, encoder)


def _first_tokens(pieces: Iterator[str], length: int, encoder: TextEncoder) -> str:
    """As many words as take at most `length` tokens; at least a character."""
    held: list[str] = []
    while len(encoder.ids("".join(held))) <= length:
        held += islice(pieces, _BLOCK)
    whole = first_parts(held, length, encoder)
    words = WORDS.findall(held[whole])
    rest = ["".join(held[:whole]), *words]
    return "".join(rest[: max(1, first_parts(rest, length, encoder))]).rstrip() or words[0].strip()[:1]


def first_parts(parts: Sequence[str], length: int, encoder: TextEncoder) -> int:
    """How many of the parts together take at most `length` tokens, if not all do."""
    low, high = 0, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encoder.ids("".join(parts[:middle]))) <= length else (low, middle)
    return low
