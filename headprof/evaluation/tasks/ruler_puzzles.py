"""The puzzles of RULER's tasks: what is hidden in a document, and what is asked about it."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from math import ceil
from typing import Protocol

from headprof.evaluation.tasks.ruler_text import (
    Grown,
    Prose,
    compounds,
    distinct,
    made_up_word,
    unmistakable_words,
    vocabulary,
)

FULL_LENGTH = 4096
"""Length from which on the paper's parameters are used where shorter prompts need smaller ones."""


@dataclass(frozen=True)
class Puzzle:
    """An example whose document can be made longer and longer.

    Attributes:
        before, after, reply, answers: as in `Example`.
        document: the document with that much filler; each unit of it takes about a token or a few.
    """

    before: str
    document: Callable[[int], str]
    after: str
    reply: str
    answers: tuple[str, ...]


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
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
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
            document=Prose(needles, rng),
            after=f"\n\nWhich {'numbers' if many else 'number'} of {things} does the text state?",
            reply=f"The text states {'these numbers' if many else 'this number'} of {things}:",
            answers=answers,
        )


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in prose: a number goes from variable to variable.

    Attributes:
        chains: how many there are; all but the one asked for are distractors.
        hops: assignments of a chain after the first, so it has one more variable, and all are wanted.
    """

    chains: int = 1
    hops: int = 4
    max_new_tokens: int = 30

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        numbers = rng.sample(range(10_000, 100_000), self.chains)
        names = list(islice(distinct(partial(_letters, rng)), self.chains * (self.hops + 1)))
        variables = [names[at :: self.chains] for at in range(self.chains)]
        statements = [
            [f"Let {to} = {value}." for to, value in zip(own, [str(number), *own[:-1]], strict=True)]
            for number, own in zip(numbers, variables, strict=True)
        ]
        return Puzzle(
            before=(
                "In the text below numbers are assigned to variables, and variables to other variables. Keep track of "
                "which number each variable has.\n\n"
            ),
            document=Prose(_merged(statements, rng), rng),
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
    """

    common: int = 10
    common_repeats: int = 30
    other_repeats: int = 3
    max_new_tokens: int = 120

    def puzzle(self, rng: random.Random, length: int) -> Puzzle:
        common = rng.sample(unmistakable_words(), self.common)
        known = [word for word in vocabulary() if word not in common]
        rng.shuffle(known)
        taken = set(vocabulary())
        made_up = (word for word in distinct(partial(made_up_word, rng)) if word not in taken)
        others = Grown(chain(known, made_up))  # the made-up ones come into very long lists alone
        share = min(1.0, length / (FULL_LENGTH - self.max_new_tokens))
        fewest = max(1, round(self.other_repeats * share))
        most = max(2 * fewest + 1, round(self.common_repeats * share))
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
