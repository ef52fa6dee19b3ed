"""RULER's thirteen tasks (Hsieh et al., COLM 2024): eleven generated, for prompts of any length, and two of questions.

Names, kinds of task, parameters, lengths of the answers and the metric are RULER's; haystack, words and wording are
this project's own. As there, a worked example comes first in `vt` and `cwe`. What the answer depends on is drawn from a
seed, the task, the length and the example's number alone, so an example stays the same however many are asked for.

Tasks of `EARLIER` are what this project had before: the same without worked examples, variables in prose, and common
words that get fewer in proportion to the length. They are asked by name alone, and their examples stay as they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from headprof.errors import UsageError
from headprof.evaluation.tasks.example import DEFAULT_LENGTHS, Example, Task, TaskRequest
from headprof.evaluation.tasks.ruler_puzzles import (
    Codes,
    CommonWords,
    FrequentWords,
    Generator,
    Needles,
    NeedlesAmongNeedles,
    Puzzle,
    VariableTracking,
)
from headprof.evaluation.tasks.ruler_questions import QUESTION_SETS
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.units import format_length

EXAMPLES = 100
"""How many examples of a length there are unless told otherwise."""
_CLOSE_ENOUGH = 0.005
_LEAST_PASSAGES = 0.98

GENERATED: dict[str, Generator] = {
    "niah_single_1": Needles(noise=True),
    "niah_single_2": Needles(),
    "niah_single_3": Codes(),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": NeedlesAmongNeedles(),
    "niah_multikey_3": NeedlesAmongNeedles(codes=True),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
    "vt": VariableTracking(noise=True, worked=True),
    "cwe": CommonWords(short_repeats=(6, 1), worked=True),
    "fwe": FrequentWords(),
}
"""RULER's tasks that need no data."""
EARLIER: dict[str, Generator] = {
    "niah_single": Needles(),
    "niah_multikey": Needles(keys=4),
    "variable_tracking": VariableTracking(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
}
"""Tasks under the names and with the parameters of before."""
GENERATORS = GENERATED | EARLIER


def examples(name: str, request: TaskRequest) -> Iterator[Example]:
    """The examples of task `name` (`"niah_single_2"`), length by length.

    The whole prompt, chat template and beginning of the reply included, and the answer's tokens take as many as the
    length says, or the prompt up to 2 % less; in `niah_multikey_3` up to a line less.

    Raises:
        UsageError: a length is too short for the task, or longer than the model can read; or the questions of `qa_1` or
            `qa_2` cannot be had, or have too few passages for a length.
    """
    questions = QUESTION_SETS[name].read(f"ruler/{name}", request.data_dir) if name in QUESTION_SETS else None
    answer = (questions or GENERATORS[name]).max_new_tokens
    number_asked = request.limit or EXAMPLES
    numbers = range(number_asked if questions is None else min(number_asked, len(questions.questions)))
    for length in dict.fromkeys(request.lengths or DEFAULT_LENGTHS):
        if request.max_positions is not None and length > request.max_positions:
            raise UsageError(
                f"A length of {length} tokens is more than the {request.max_positions} positions of the model; use at "
                f"most {request.max_positions}."
            )
        for number in numbers:
            rng = random.Random(f"{request.seed}/{name}/{length}/{number}")
            puzzle = questions.puzzle(number, rng) if questions else GENERATORS[name].puzzle(rng, length - answer)
            yield Example(
                task=f"ruler/{name}",
                name=f"{length}:{number}",
                group=format_length(length),
                before=puzzle.before,
                document=_filled(puzzle, length, answer, request.tokenizer, name),
                after=puzzle.after,
                reply=puzzle.reply,
                answers=puzzle.answers,
                classes=(),
                metric="ruler.any" if questions else "ruler.all",
                max_new_tokens=answer,
                chat=True,
            )


TASKS = (
    *(
        Task(f"ruler/{name}", "", "generated; Apache-2.0 as this project", partial(examples, name))
        for name in GENERATORS
    ),
    *(Task(f"ruler/{name}", its.dataset, its.license, partial(examples, name)) for name, its in QUESTION_SETS.items()),
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
    filled = fill(puzzle.document, tokens, length - answer, puzzle.most)
    if puzzle.most is not None and tokens(filled) < length * _LEAST_PASSAGES - answer:
        raise UsageError(
            f"The questions of ruler/{name} have too few passages for prompts of {length} tokens: give the whole set "
            "with --data-dir, or a shorter length."
        )
    return filled


def fill(document: Callable[[int], str], tokens: Callable[[str], int], room: int, most: int | None = None) -> str:
    """Of `document(0)`, `document(1)`, ... the longest that takes at most `room` tokens, or nearly.

    Sizes are guessed from the tokens of other sizes, which grow about evenly. `document(0)` must not take more.

    Args:
        document: the document of a size.
        tokens: how many a document takes.
        room: tokens that there may be.
        most: the largest size; `None` if there is none.
    """
    low, best = 0, document(0)
    taken = tokens(best)
    high, too_many = None, 0
    per_unit = 16.0  # more than there can be: a short text is tried before a long one
    while room - taken > room * _CLOSE_ENOUGH and high != low + 1 and low != most:
        if high is not None:
            per_unit = (too_many - taken) / (high - low)
        size = low + max(1, int((room - taken) / per_unit))
        if high is not None:
            size = min(size, high - 1)
        if most is not None:
            size = min(size, most)
        text = document(size)
        found = tokens(text)
        if found > room:
            high, too_many = size, found
        else:
            if found > taken:
                per_unit = (found - taken) / (size - low)
            low, best, taken = size, text, found
    return best
