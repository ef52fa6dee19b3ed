"""What the documents of RULER's tasks are made of: prose with sentences hidden in it, and words of several kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, count, islice
from uuid import UUID

from headprof.probes.families import load_families
from headprof.probes.haystack import Haystack, join_sentences
from headprof.probes.slots import SPLITS

_VOCABULARY_SENTENCES = 3000
_SHORTEST_WORD = 5
_NAMED = ("adjective", "creature", "object", "building", "job", "sport", "food", "material", "goods")
_NOISE = (
    "The kettle is on the stove.",
    "Rain runs down the window.",
    "A clock ticks in the hall.",
    "Nobody is in a hurry.",
    "The day goes by as the last one did.",
)


class Prose:
    """Given sentences in prose, at random depths but in their order; called with the number of the prose's words."""

    def __init__(self, sentences: Sequence[str], rng: random.Random) -> None:
        self._sentences = sentences
        self._depths = sorted(rng.random() for _ in sentences)
        self._filler = Grown(_haystack().sentences(random.Random(rng.random())))

    def __call__(self, words: int) -> str:
        filler = self._first_words(words)
        placed = list(filler)
        for shift, (sentence, depth) in enumerate(zip(self._sentences, self._depths, strict=True)):
            placed.insert(round(depth * len(filler)) + shift, sentence)
        return join_sentences(placed)[0]

    def _first_words(self, words: int) -> list[str]:
        """Sentences of so many words in all; of the last one as many words as are left."""
        sentences = []
        for number in count():
            sentence = self._filler.at(number)
            parts = sentence.split()
            if len(parts) > words:
                break
            sentences.append(sentence)
            words -= len(parts)
        return sentences + ([" ".join(parts[:words]).rstrip(",;:.") + "."] if words else [])


class Noise:
    """Given sentences among the same few ones, which come over and over, a round of them a line.

    Each given one has a line of its own, at a random depth but in their order; called with the number of the other
    sentences.
    """

    def __init__(self, sentences: Sequence[str], rng: random.Random) -> None:
        self._sentences = sentences
        self._depths = sorted(rng.random() for _ in sentences)

    def __call__(self, fillers: int) -> str:
        rounds, rest = divmod(fillers, len(_NOISE))
        lines = [*[" ".join(_NOISE)] * rounds, *([" ".join(_NOISE[:rest])] if rest else [])]
        return _placed(self._sentences, self._depths, lines)


class Lines:
    """Given lines among others that look like them, at random depths but in their order.

    Called with the number of the other lines.
    """

    def __init__(self, lines: Sequence[str], others: Iterator[str], rng: random.Random) -> None:
        self._lines = lines
        self._depths = sorted(rng.random() for _ in lines)
        self._others = Grown(others)

    def __call__(self, others: int) -> str:
        return _placed(self._lines, self._depths, self._others.first(others))


def _placed(sentences: Sequence[str], depths: Sequence[float], lines: Sequence[str]) -> str:
    placed = list(lines)
    for shift, (sentence, depth) in enumerate(zip(sentences, depths, strict=True)):
        placed.insert(round(depth * len(lines)) + shift, sentence)
    return "\n".join(placed)


class Grown:
    """The items of an endless iterator, kept to be read again."""

    def __init__(self, items: Iterator[str]) -> None:
        self._items = items
        self._kept: list[str] = []

    def first(self, number: int) -> list[str]:
        self._kept += islice(self._items, max(0, number - len(self._kept)))
        return self._kept[:number]

    def at(self, number: int) -> str:
        if number >= len(self._kept):
            self.first(2 * number + 1)
        return self._kept[number]


def distinct(make: Callable[[], str]) -> Iterator[str]:
    """What `make` returns, call by call, without repeats and without end."""
    seen: set[str] = set()
    while True:
        item = make()
        if item not in seen:
            seen.add(item)
            yield item


def made_up_word(rng: random.Random) -> str:
    """Six letters, such as "bakoti"."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


def random_uuid(rng: random.Random) -> str:
    """Thirty-two hexadecimal digits in five groups, of version 4."""
    return str(UUID(int=rng.getrandbits(128), version=4))


@cache
def _haystack() -> Haystack:
    return Haystack.composed()


@cache
def compounds() -> list[str]:
    """Names such as "amber falcon", of values that no profile is made from."""
    lists = load_families()[0].lists
    adjectives, creatures = lists.values("adjective", "eval"), lists.values("creature", "eval")
    return [f"{adjective} {creature}" for adjective in adjectives for creature in creatures]


def many_names(rng: random.Random) -> Iterator[str]:
    """Names such as "amber falcon" in random order, each once and without end, of values that no profile is made from.

    After thousands of them the second word is a made-up one.
    """
    lists = load_families()[0].lists
    adjectives = lists.values("adjective", "eval")
    nouns = dict.fromkeys(noun for name in _NAMED[1:] for noun in lists.values(name, "eval"))
    names = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
    return chain(rng.sample(names, len(names)), distinct(partial(_made_up_name, adjectives, rng)))


def _made_up_name(adjectives: Sequence[str], rng: random.Random) -> str:
    return f"{rng.choice(adjectives)} {made_up_word(rng)}"


@cache
def vocabulary() -> list[str]:
    """Words of the haystack and of the needles, but short ones, most of which carry no meaning."""
    sentences = islice(_haystack().sentences(random.Random(0)), _VOCABULARY_SENTENCES)
    lists = load_families()[0].lists
    named = [value for name in _NAMED for split in SPLITS for value in lists.values(name, split)]
    words = {word.strip(",;:.'").lower() for text in chain(sentences, named) for word in text.split()}
    return sorted(word for word in words if len(word) >= _SHORTEST_WORD and word.isascii() and word.isalpha())


@cache
def unmistakable_words() -> list[str]:
    """Words of the vocabulary that are no part of another one."""
    text = " ".join(vocabulary())
    return [word for word in vocabulary() if text.count(word) == 1]
