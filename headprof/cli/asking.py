"""Many questions to one compressed document, from a file or in turns, and how their answers are shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.cli.context import terminal
from headprof.cli.tables.generate import answers_table
from headprof.errors import UsageError

if TYPE_CHECKING:
    from headprof.compression.conversation import Conversation
    from headprof.compression.generation import Generation


def show_answers(label: str, questions: list[str], answers: Iterable[Generation], json: bool) -> None:
    """Write answers as they come, one a line in the order of the questions; or all of them at the end, as JSON."""
    start, made = time.perf_counter(), []
    for answer in answers:
        made.append(answer)
        if not json:
            terminal.write(one_line(answer.text) + "\n")
    seconds = time.perf_counter() - start
    if json:
        pairs = zip(questions, made, strict=True)
        found = [{"question": question, "answer": answer.text.strip()} | _took(answer) for question, answer in pairs]
        terminal.json({"cache": label, "seconds": seconds, "questions": found})
    else:
        terminal.table(*answers_table(label, made, seconds))


def one_line(text: str) -> str:
    return " ".join(text.split())


def _took(answer: Generation) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if name != "text"}


def converse(conversation: Conversation, options: dict[str, Any], json: bool) -> list[dict[str, Any]]:
    """Answer questions from standard input, a line each, until it ends; an answer's text is written as it comes.

    At a terminal a question without room is said to be so, and another may be asked; elsewhere it is an error.
    """
    turns: list[dict[str, Any]] = []
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    for question in _lines(at_terminal):
        try:
            made = conversation.ask(question, **options, on_text=(lambda _: None) if json else terminal.write)
        except UsageError as error:
            if not at_terminal:
                raise
            terminal.remark(str(error))
            continue
        turns.append({"question": question, "answer": made.text.strip()} | _took(made))
        if not json:
            terminal.write("\n")
    if not turns:
        raise UsageError("No question was asked: give one a line on the standard input.")
    return turns


def _lines(at_terminal: bool) -> Iterator[str]:
    """Questions, as they are typed or piped in."""
    from headprof.compression.inputs import typed_lines

    if at_terminal:
        terminal.remark("Ask one question a line; Ctrl-D ends.")
    yield from typed_lines(sys.stdin)


def show_conversation(label: str, turns: list[dict[str, Any]], saved: Path | None, json: bool) -> None:
    """Show what a conversation came to; without JSON its answers are on stdout already."""
    if json:
        terminal.json({"cache": label, "saved": None if saved is None else str(saved), "questions": turns})
        return
    if saved is not None:
        terminal.remark(f"\nThe conversation is {saved}: go on with --cache {saved}.")
