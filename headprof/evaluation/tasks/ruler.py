"""Tasks after RULER (Hsieh et al., COLM 2024), generated for prompts of any length.

The kinds of task and their parameters are the paper's; haystack, words and wording are this project's own, and no
worked example comes first. What the answer depends on is drawn from a seed, the task, the length and the example's
number alone, so an example stays the same however many are asked for.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, count, islice
from math import ceil
from typing import Any, Protocol

from headprof.errors import UsageError
from headprof.evaluation.tasks.example import DEFAULT_LENGTHS, Example, Task, TaskRequest
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.haystack import Haystack, join_sentences
from headprof.probes.needles import SPLITS, load_families
from headprof.utils.units import format_length

EXAMPLES = 100
"""How many examples of a length there are unless told otherwise."""
FULL_LENGTH = 4096
"""Length from which on the paper's parameters are used where shorter prompts need smaller ones."""

_CLOSE_ENOUGH = 0.005
_VOCABULARY_SENTENCES = 3000
_SHORTEST_WORD = 5
_NAMED = ("adjective", "creature", "object", "building", "job", "sport", "food", "material", "goods")


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
        keys = rng.sample(_compounds(), self.keys)
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
            document=_Prose(needles, rng),
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
        names = list(islice(_distinct(partial(_letters, rng)), self.chains * (self.hops + 1)))
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
            document=_Prose(_merged(statements, rng), rng),
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
        common = rng.sample(_unmistakable_words(), self.common)
        known = [word for word in _vocabulary() if word not in common]
        rng.shuffle(known)
        taken = set(_vocabulary())
        made_up = (word for word in _distinct(partial(_made_up_word, rng)) if word not in taken)
        others = _Grown(chain(known, made_up))  # the made-up ones come into very long lists alone
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
        words = _Grown(chain(["..."], _distinct(partial(_made_up_word, rng))))
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


GENERATORS: dict[str, Generator] = {
    "niah_single": Needles(),
    "niah_multikey": Needles(keys=4),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
    "variable_tracking": VariableTracking(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
}


def examples(name: str, request: TaskRequest) -> Iterator[Example]:
    """The examples of task `name` (`"niah_single"`), length by length.

    The whole prompt, chat template and beginning of the reply included, and the answer's tokens take as many as the
    length says, or the prompt up to 2 % less.

    Raises:
        UsageError: a length is too short for the task, or longer than the model can read.
    """
    generator = GENERATORS[name]
    for length in dict.fromkeys(request.lengths or DEFAULT_LENGTHS):
        if request.max_positions is not None and length > request.max_positions:
            raise UsageError(
                f"A length of {length} tokens is more than the {request.max_positions} positions of the model; use at "
                f"most {request.max_positions}."
            )
        for number in range(request.limit or EXAMPLES):
            rng = random.Random(f"{request.seed}/{name}/{length}/{number}")
            puzzle = generator.puzzle(rng, length - generator.max_new_tokens)
            yield Example(
                task=f"ruler/{name}",
                name=f"{length}:{number}",
                group=format_length(length),
                before=puzzle.before,
                document=_filled(puzzle, length, generator.max_new_tokens, request.tokenizer, name),
                after=puzzle.after,
                reply=puzzle.reply,
                answers=puzzle.answers,
                classes=(),
                metric="ruler.all",
                max_new_tokens=generator.max_new_tokens,
                chat=True,
            )


TASKS = tuple(
    Task(f"ruler/{name}", "", "generated; Apache-2.0 as this project", partial(examples, name)) for name in GENERATORS
)


def prompt_tokens(before: str, document: str, after: str, reply: str, tokenizer: Any) -> int:
    """Tokens of a prompt with the chat template around it, if there is one, and the beginning of the reply."""
    encoder = PromptEncoder(tokenizer)
    after, reply = encoder.cued(after, reply)
    prompt = encoder.prompt_ids(f"{before}{document}{after}")
    return len(prompt) + len(tokenizer(reply, add_special_tokens=False, verbose=False).input_ids)


def _filled(puzzle: Puzzle, length: int, answer: int, tokenizer: Any, name: str) -> str:
    """The document with as much filler as `length` tokens hold beside the `answer` tokens that are generated."""

    def tokens(document: str) -> int:
        return prompt_tokens(puzzle.before, document, puzzle.after, puzzle.reply, tokenizer)

    document = puzzle.document(0)
    taken = tokens(document)
    if taken + answer > length:
        raise UsageError(f"A length of {length} tokens is too short for ruler/{name}: use at least {taken + answer}.")
    return fill(puzzle.document, tokens, length - answer)


def fill(document: Callable[[int], str], tokens: Callable[[str], int], room: int) -> str:
    """Of `document(0)`, `document(1)`, ... the longest that takes at most `room` tokens, or nearly.

    Sizes are guessed from the tokens of other sizes, which grow about evenly. `document(0)` must not take more.
    """
    low, best = 0, document(0)
    taken = tokens(best)
    high, too_many = None, 0
    per_unit = 16.0  # more than there can be: a short text is tried before a long one
    while room - taken > room * _CLOSE_ENOUGH and high != low + 1:
        if high is not None:
            per_unit = (too_many - taken) / (high - low)
        size = low + max(1, int((room - taken) / per_unit))
        if high is not None:
            size = min(size, high - 1)
        text = document(size)
        found = tokens(text)
        if found > room:
            high, too_many = size, found
        else:
            if found > taken:
                per_unit = (found - taken) / (size - low)
            low, best, taken = size, text, found
    return best


class _Prose:
    """Given sentences in prose, at random depths but in their order; called with the number of the prose's words."""

    def __init__(self, sentences: Sequence[str], rng: random.Random) -> None:
        self._sentences = sentences
        self._depths = sorted(rng.random() for _ in sentences)
        self._filler = _Grown(_haystack().sentences(random.Random(rng.random())))

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


class _Grown:
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


def _distinct(make: Callable[[], str]) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        item = make()
        if item not in seen:
            seen.add(item)
            yield item


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=5))


def _made_up_word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


@cache
def _haystack() -> Haystack:
    return Haystack.composed()


@cache
def _compounds() -> list[str]:
    """Names such as "amber falcon", of values that no profile is made from."""
    lists = load_families()[0].lists
    adjectives, creatures = lists.values("adjective", "eval"), lists.values("creature", "eval")
    return [f"{adjective} {creature}" for adjective in adjectives for creature in creatures]


@cache
def _vocabulary() -> list[str]:
    """Words of the haystack and of the needles, but short ones, most of which carry no meaning."""
    sentences = islice(_haystack().sentences(random.Random(0)), _VOCABULARY_SENTENCES)
    lists = load_families()[0].lists
    named = [value for name in _NAMED for split in SPLITS for value in lists.values(name, split)]
    words = {word.strip(",;:.'").lower() for text in chain(sentences, named) for word in text.split()}
    return sorted(word for word in words if len(word) >= _SHORTEST_WORD and word.isascii() and word.isalpha())


@cache
def _unmistakable_words() -> list[str]:
    """Words of the vocabulary that are no part of another one."""
    text = " ".join(_vocabulary())
    return [word for word in _vocabulary() if text.count(word) == 1]
