"""The puzzles of RULER's tasks: what is hidden in a document, and what is asked about it."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from math import ceil
from typing import Protocol

from headprof.evaluation.tasks.ruler_text import (
    Grown,
    Lines,
    Noise,
    Prose,
    compounds,
    distinct,
    made_up_word,
    many_names,
    random_uuid,
    unmistakable_words,
    vocabulary,
)

FULL_LENGTH = 4096
"""Length from which on the paper's parameters are used where shorter prompts need smaller ones."""

_WORKED_FILLER = 25


@dataclass(frozen=True)
class Puzzle:
    """An example whose document can be made longer and longer.

    Attributes:
        before, after, reply, answers: as in `Example`.
        document: the document with that much filler; each unit of it takes about a token or a few.
        most: the largest size of a document; `None` if there is always more filler.
    """

    before: str
    document: Callable[[int], str]
    after: str
    reply: str
    answers: tuple[str, ...]
    most: int | None = None


class Generator(Protocol):
    """A kind of task; its fields are its parameters."""

    @property
    def max_new_tokens(self) -> int: ...

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        """A puzzle for a prompt of about `length` tokens."""
        ...


@dataclass(frozen=True)
class Needles:
    """Numbers of seven digits, hidden in prose, that belong to named things.

    Attributes:
        keys: how many things there are; those not asked for are distractors.
        values: numbers of each thing.
        queries: how many things are asked for; all their numbers are wanted.
        noise: whether a few sentences over and over stand in place of the prose.
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
    noise: bool = False
    max_new_tokens: int = 128

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        keys = rng.sample(compounds(), self.keys)
        numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), self.keys * self.values)]
        of_key = {key: numbers[at * self.values : (at + 1) * self.values] for at, key in enumerate(keys)}
        needles = [f"A number of the {key} is {number}." for key in keys for number in of_key[key]]
        rng.shuffle(needles)
        asked = keys[: self.queries]
        things = _listed([f"the {key}" for key in asked])
        answers = tuple(number for key in asked for number in of_key[key])
        many = len(answers) > 1
        return Puzzle(
            before="The text below states numbers of certain things. Remember them; a question about them follows.\n\n",
            document=(Noise if self.noise else Prose)(needles, rng),
            after=f"\n\nWhich {'numbers' if many else 'number'} of {things} does the text state?",
            reply=f"The text states {'these numbers' if many else 'this number'} of {things}:",
            answers=answers,
        )


@dataclass(frozen=True)
class Codes:
    """A code of 32 hexadecimal digits (a UUID), hidden in prose, that belongs to a named thing."""

    max_new_tokens: int = 128

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        key, code = rng.choice(compounds()), random_uuid(rng)
        return _asked_for(f"the {key}", "code", code, Prose([f"A code of the {key} is {code}."], rng))


@dataclass(frozen=True)
class NeedlesAmongNeedles:
    """A needle in a document that is made of needles alone, a line each, all of different keys.

    Attributes:
        codes: whether keys and values are UUIDs; else keys are names, and values numbers of seven digits.
    """

    codes: bool = False
    max_new_tokens: int = 128

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        what = "code" if self.codes else "number"
        keys = distinct(partial(random_uuid, rng)) if self.codes else (f"the {name}" for name in many_names(rng))
        values = distinct(partial(random_uuid if self.codes else _seven_digits, rng))
        pairs = zip(keys, values, strict=False)
        key, value = next(pairs)
        needle = f"A {what} of {key} is {value}."
        others = (f"A {what} of {other} is {its}." for other, its in pairs)
        return _asked_for(key, what, value, Lines([needle], others, random.Random(rng.random())))


def _asked_for(thing: str, what: str, value: str, document: Callable[[int], str]) -> Puzzle:
    """A document that states one value of a thing, or of many, and the question about this one."""
    return Puzzle(
        before=f"The text below states {what}s of certain things. Remember them; a question about them follows.\n\n",
        document=document,
        after=f"\n\nWhich {what} of {thing} does the text state?",
        reply=f"The text states this {what} of {thing}:",
        answers=(value,),
    )


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in prose: a number goes from variable to variable.

    Attributes:
        chains: how many there are; all but the one asked for are distractors.
        hops: assignments of a chain after the first, so it has one more variable, and all are wanted.
        noise: whether a few sentences over and over stand in place of the prose.
        worked: whether a short example with its answer comes first, with other variables and another number.
    """

    chains: int = 1
    hops: int = 4
    noise: bool = False
    worked: bool = False
    max_new_tokens: int = 30

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        numbers = rng.sample(range(10_000, 100_000), self.chains + self.worked)
        names = distinct(partial(_letters, rng))
        puzzle = self._tracked(numbers[: self.chains], names, rng)
        if not self.worked:
            return puzzle
        example = self._tracked(numbers[self.chains :], names, rng)
        return replace(puzzle, before=f"{_solved(example, _WORKED_FILLER)}{puzzle.before}")

    def _tracked(self, numbers: Sequence[int], names: Iterator[str], rng: random.Random) -> Puzzle:
        chains = len(numbers)
        own = list(islice(names, chains * (self.hops + 1)))
        variables = [own[at::chains] for at in range(chains)]
        statements = [
            [f"Let {to} = {value}." for to, value in zip(own, [str(number), *own[:-1]], strict=True)]
            for number, own in zip(numbers, variables, strict=True)
        ]
        return Puzzle(
            before=(
                "In the text below numbers are assigned to variables, and variables to other variables. Keep track of "
                "which number each variable has.\n\n"
            ),
            document=(Noise if self.noise else Prose)(_merged(statements, rng), rng),
            after=f"\n\nWhich variables have the value {numbers[0]}, directly or through others? Name all of them.",
            reply=f"The {len(variables[0])} variables with the value {numbers[0]} are:",
            answers=tuple(variables[0]),
        )


@dataclass(frozen=True)
class CommonWords:
    """A numbered list of words in which some occur far more often than the rest.

    Attributes:
        common: how many such words there are; all are wanted.
        common_repeats, other_repeats: how often a common word occurs, and any other, at a length of `FULL_LENGTH` or
            more, answer included; less often in shorter prompts.
        short_repeats: the same two of all shorter prompts; `None` for the above in proportion to the length.
        worked: whether a short example with its answer comes first, with other common words.
    """

    common: int = 10
    common_repeats: int = 30
    other_repeats: int = 3
    short_repeats: tuple[int, int] | None = None
    worked: bool = False
    max_new_tokens: int = 120

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        common = rng.sample(unmistakable_words(), self.common)
        puzzle = self._list_of(common, self._repeats(length), rng)
        if not self.worked:
            return puzzle
        short = length + self.max_new_tokens < FULL_LENGTH
        shown = rng.sample([word for word in unmistakable_words() if word not in common], self.common)
        # The example's other words are half of its different ones if it is short, else three quarters.
        example = self._list_of(shown, (3, 1) if short else (10, 3), rng, without=common)
        return replace(puzzle, before=f"{_solved(example, self.common * (1 if short else 3))}{puzzle.before}")

    def _repeats(self, length: int) -> tuple[int, int]:
        """How often a common word occurs, and any other."""
        share = min(1.0, length / (FULL_LENGTH - self.max_new_tokens))
        if share < 1 and self.short_repeats is not None:
            return self.short_repeats
        fewest = max(1, round(self.other_repeats * share))
        return max(2 * fewest + 1, round(self.common_repeats * share)), fewest

    def _list_of(
        self, common: list[str], repeats: tuple[int, int], rng: random.Random, without: Sequence[str] = ()
    ) -> Puzzle:
        known = [word for word in vocabulary() if word not in common and word not in without]
        rng.shuffle(known)
        taken = set(vocabulary())
        made_up = (word for word in distinct(partial(made_up_word, rng)) if word not in taken)
        others = Grown(chain(known, made_up))  # the made-up ones come into very long lists alone
        most, fewest = repeats
        order = rng.random()

        def document(size: int) -> str:
            words = [*common * most, *others.first(size) * fewest]
            random.Random(order).shuffle(words)
            return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))

        return Puzzle(
            before="Below is a numbered list of words. Some of them occur far more often than the rest.\n\n",
            document=document,
            after=f"\n\nWhich {self.common} words of this list occur most often?",
            reply=f"The {self.common} words that occur most often are:",
            answers=tuple(common),
        )


@dataclass(frozen=True)
class FrequentWords:
    """Made-up words, the `k`-th of which occurs in proportion to `k ** -alpha` (a zeta distribution).

    The most frequent one is replaced by dots, which are to be ignored.

    Attributes:
        asked: how many of the most frequent words are wanted.
    """

    alpha: float = 2.0
    asked: int = 3
    max_new_tokens: int = 50

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        words = Grown(chain(["..."], distinct(partial(made_up_word, rng))))
        order = rng.random()
        last = self.asked + 1
        # Enough words that the last one asked for occurs more often than the next one.
        least = ceil(_zeta(self.alpha) / (last**-self.alpha - (last + 1) ** -self.alpha))

        def document(size: int) -> str:
            counts = zeta_counts(least + size, self.alpha)
            text = [word for word, times in zip(words.first(len(counts)), counts, strict=True) for _ in range(times)]
            random.Random(order).shuffle(text)
            return " ".join(text)

        return Puzzle(
            before=(
                "The text below is made of code words. Count how often each of them occurs; the dots '...' are no "
                "words.\n\n"
            ),
            document=document,
            after=f"\n\nWhich {self.asked} code words occur most often? Ignore the dots, and explain nothing.",
            reply=f"The {self.asked} code words that occur most often are:",
            answers=tuple(words.first(last)[1:]),
        )


def zeta_counts(total: int, alpha: float) -> list[int]:
    """How often the most frequent word, the next one, and so on occur in about `total` words; no zeros."""
    scale = total / _zeta(alpha)
    return [times for rank in range(1, ceil(scale ** (1 / alpha)) + 1) if (times := int(scale * rank**-alpha))]


@cache
def _zeta(alpha: float, terms: int = 10_000) -> float:
    """Riemann's zeta function for `alpha` > 1: a sum, and an integral for its tail."""
    return sum(k**-alpha for k in range(1, terms)) + (terms - 0.5) ** (1 - alpha) / (alpha - 1)


def _solved(example: Puzzle, filler: int) -> str:
    """A worked example: the whole prompt with that much filler, and its answer."""
    asked = f"{example.before}{example.document(filler)}{example.after}"
    return f"{asked}\n{example.reply} {', '.join(example.answers)}\n\n"


def _seven_digits(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _merged(chains: Sequence[Sequence[str]], rng: random.Random) -> list[str]:
    """The statements of all chains in one random order that keeps each chain's own."""
    turns = [number for number, statements in enumerate(chains) for _ in statements]
    rng.shuffle(turns)
    left = [iter(statements) for statements in chains]
    return [next(left[turn]) for turn in turns]


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=5))
