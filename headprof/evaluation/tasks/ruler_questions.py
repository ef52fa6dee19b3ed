"""The questions of RULER's `qa_1` and `qa_2`, from SQuAD's and HotpotQA's files as they were published.

The n-th example asks the file's n-th question that has an answer, as RULER does; the passages that the answer stands in
are hidden among others: first those that the file gives beside them (SQuAD: of the same article; HotpotQA: its own
distractors), then any.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from headprof.errors import UsageError
from headprof.evaluation.tasks.ruler_puzzles import Puzzle
from headprof.models.checkpoint import one_line
from headprof.utils.files import read_text

Value = TypeVar("Value")


@dataclass(frozen=True)
class PassageQuestion:
    """A question about passages.

    Attributes:
        question: its text.
        answers: any one of them is right.
        passages: what it is answered from; numbers of passages.
        near: other passages that the file gives beside them.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a file, and all its passages, each once."""

    questions: Sequence[PassageQuestion]
    passages: Sequence[str]
    max_new_tokens: int = 32

    def puzzle(self, number: int, rng: random.Random) -> Puzzle:
        """The question of this number; the document grows by the words of passages that it is not about."""
        asked = self.questions[number]
        others = list(self._others(asked, rng))
        return Puzzle(
            before=(
                "Use the passages below to answer a question. Write down the answer alone, not a word more.\n\n"
                "These are the passages.\n\n"
            ),
            document=_Passages([self.passages[at] for at in asked.passages], others, rng),
            after=(
                "\n\nUse the passages above to answer the question. Write down the answer alone, not a word more.\n\n"
                f"Question: {asked.question}"
            ),
            reply="The answer is:",
            answers=asked.answers,
            most=self._words - sum(len(self.passages[at].split()) for at in asked.passages),
        )

    @cached_property
    def _words(self) -> int:
        """Of all passages, which are many."""
        return sum(len(passage.split()) for passage in self.passages)

    def _others(self, asked: PassageQuestion, rng: random.Random) -> Iterator[str]:
        near = rng.sample(asked.near, len(asked.near))
        taken = {*asked.passages, *near}
        far = rng.sample(range(len(self.passages)), len(self.passages))
        return (self.passages[at] for at in chain(near, (at for at in far if at not in taken)))


class _Passages:
    """Numbered passages in random order; called with the number of words of those that the question is not about.

    The last of these is cut short where the words end.
    """

    def __init__(self, asked: Sequence[str], others: Sequence[str], rng: random.Random) -> None:
        self._asked = [(rng.random(), passage) for passage in asked]
        self._others = others
        self._order = rng.random()

    def __call__(self, words: int) -> str:
        rng = random.Random(self._order)
        placed = sorted([*self._asked, *((rng.random(), passage) for passage in self._first_words(words))])
        return "\n\n".join(f"Passage {number}:\n{passage}" for number, (_, passage) in enumerate(placed, 1))

    def _first_words(self, words: int) -> Iterator[str]:
        for passage in self._others:
            if words <= 0:
                return
            parts = passage.split()
            yield passage if len(parts) <= words else " ".join(parts[:words])
            words -= len(parts)


@dataclass(frozen=True)
class Published:
    """A set of questions as others publish it.

    Attributes:
        name: what it is called.
        files: names of its file in a folder; the first that is there is read.
        url: where it is to be had.
        dataset, license: as in `Task`.
        parse: makes questions of what the file holds; raises `_Malformed`.
    """

    name: str
    files: tuple[str, ...]
    url: str
    dataset: str
    license: str
    parse: Callable[[Any], QuestionSet]

    def read(self, task: str, data_dir: Path | None) -> QuestionSet:
        """The questions of the file in a folder, or in its subfolder `ruler`.

        Raises:
            UsageError: there is no such folder or file, it cannot be read, has another form, or has no answers.
        """
        get_it = f"put {self.files[0]} of {self.url} into a folder and give that with --data-dir"
        if data_dir is None:
            raise UsageError(
                f"{task} asks the questions of {self.name}, which do not come along: {get_it}, or ask for "
                "ruler-generated, the eleven tasks that need no data."
            )
        paths = [folder / file for folder in (data_dir, data_dir / "ruler") for file in self.files]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UsageError(
                f"{data_dir} has no {' or '.join(self.files)} for {task}: {get_it}, or ask for ruler-generated, the "
                "eleven tasks that need no data."
            )
        try:
            return self.parse(json.loads(read_text(path)))
        except _Malformed as error:
            raise UsageError(
                f"{path} is not in the form in which {self.name} was published ({error}): download it again from "
                f"{self.url}."
            ) from None
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} cannot be read as JSON ({one_line(error)}): download it again from {self.url}."
            ) from None


class _Malformed(Exception):
    """What a file lacks."""


class _Numbered:
    """Passages by the order in which they were first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, passage: str) -> int:
        return self._numbers.setdefault(passage, len(self._numbers))

    @property
    def passages(self) -> tuple[str, ...]:
        return tuple(self._numbers)


def parse_squad(content: Any) -> QuestionSet:
    """`{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}], "is_impossible"}]}]}]}`.

    Questions without an answer, which version 2 has, are left out.
    """
    number_of, questions = _Numbered(), []
    for at, article in enumerate(_field(content, "data", list, "the file")):
        where = f"data[{at}]"
        paragraphs = _field(article, "paragraphs", list, where)
        numbers = [number_of(_field(each, "context", str, f"{where}.paragraphs")) for each in paragraphs]
        for paragraph, number in zip(paragraphs, numbers, strict=True):
            near = tuple(dict.fromkeys(other for other in numbers if other != number))
            for asked in _field(paragraph, "qas", list, f"{where}.paragraphs"):
                place = f"{where}.paragraphs.qas"
                answers = [_field(each, "text", str, place) for each in _field(asked, "answers", list, place)]
                question = _field(asked, "question", str, place)
                if given := tuple(dict.fromkeys(answer for answer in answers if answer.strip())):
                    questions.append(PassageQuestion(question, given, (number,), near))
    return _not_empty(questions, number_of)


def parse_hotpotqa(content: Any) -> QuestionSet:
    """`[{"question", "answer", "context": [[title, sentences]], "supporting_facts": [[title, number]]}]`."""
    if not isinstance(content, list):
        raise _Malformed("the file is no list")
    number_of, questions = _Numbered(), []
    for at, row in enumerate(content):
        where = f"row {at}"
        question, answer = _field(row, "question", str, where), _field(row, "answer", str, where)
        supporting = {_pair(fact, where)[0] for fact in _field(row, "supporting_facts", list, where)}
        own: dict[int, str] = {}
        for title, sentences in (_pair(each, where) for each in _field(row, "context", list, where)):
            if not isinstance(title, str) or not isinstance(sentences, list) or not _texts(sentences):
                raise _Malformed(f"{where} has a context that is not [title, sentences]")
            own[number_of(f"{title}\n{''.join(sentences)}")] = title
        needed = tuple(number for number, title in own.items() if title in supporting)
        if not needed or not answer.strip():
            raise _Malformed(f"{where} has no answer, or none of its supporting facts in its context")
        near = tuple(number for number in own if number not in needed)
        questions.append(PassageQuestion(question, (answer,), needed, near))
    return _not_empty(questions, number_of)


def _not_empty(questions: list[PassageQuestion], number_of: _Numbered) -> QuestionSet:
    if not questions:
        raise _Malformed("it has no question with an answer")
    return QuestionSet(questions, number_of.passages)


def _field(value: Any, name: str, kind: type[Value], where: str) -> Value:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, kind):
        raise _Malformed(f"{where} has no {name!r}")
    return found


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise _Malformed(f"{where} has something else where a title and what belongs to it should be")
    return value[0], value[1]


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


QUESTION_SETS = {
    "qa_1": Published(
        "SQuAD",
        ("dev-v2.0.json", "dev-v1.1.json", "squad.json"),
        "https://rajpurkar.github.io/SQuAD-explorer/",
        "rajpurkar/squad_v2",
        "CC BY-SA 4.0",
        parse_squad,
    ),
    "qa_2": Published(
        "HotpotQA",
        ("hotpot_dev_distractor_v1.json", "hotpotqa.json"),
        "https://hotpotqa.github.io/",
        "hotpotqa/hotpot_qa",
        "CC BY-SA 4.0",
        parse_hotpotqa,
    ),
}
"""Where the questions of these tasks are from."""
