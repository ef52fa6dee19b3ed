"""Tasks after RULER (Hsieh et al., COLM 2024), generated for prompts of any length.

The kinds of task and their parameters are the paper's; haystack, words and wording are this project's own, and no
worked example comes first. What the answer depends on is drawn from a seed, the task, the length and the example's
number alone, so an example stays the same however many are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from headprof.errors import UsageError
from headprof.evaluation.tasks.example import DEFAULT_LENGTHS, Example, Task, TaskRequest
from headprof.evaluation.tasks.ruler_puzzles import (
    CommonWords,
    FrequentWords,
    Generator,
    Needles,
    Puzzle,
    VariableTracking,
)
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.units import format_length

EXAMPLES = 100
"""How many examples of a length there are unless told otherwise."""
_CLOSE_ENOUGH = 0.005

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
