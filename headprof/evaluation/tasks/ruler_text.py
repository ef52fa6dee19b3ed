"""What the documents of RULER's tasks are made of: prose with sentences hidden in it, and words of several kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, count, islice

from headprof.probes.haystack import Haystack, join_sentences
from headprof.probes.needles import SPLITS, load_families

_VOCABULARY_SENTENCES = 3000
_SHORTEST_WORD = 5
_NAMED = ("adjective", "creature", "object", "building", "job", "sport", "food", "material", "goods")


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


@cache
def _haystack() -> Haystack:
    return Haystack.composed()


@cache
def compounds() -> list[str]:
    """Names such as "amber falcon", of values that no profile is made from."""
    lists = load_families()[0].lists
    adjectives, creatures = lists.values("adjective", "eval"), lists.values("creature", "eval")
    return [f"{adjective} {creature}" for adjective in adjectives for creature in creatures]


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
