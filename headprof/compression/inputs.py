"""What is read and asked: a text file, a compressed document, standard input, or the built-in document and question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from headprof.errors import UsageError
from headprof.utils.assets import asset_dir
from headprof.utils.files import decode_text, read_text
from headprof.utils.records import is_text, parse_object
from headprof.utils.units import human_bytes

_LARGEST_INPUT = 2**28  # bytes


def demo_document() -> tuple[str, str]:
    """The built-in document and the built-in question about it."""
    folder = asset_dir("data") / "demo"
    return (folder / "document.txt").read_text("utf-8").strip(), (folder / "question.txt").read_text("utf-8").strip()


def what_to_ask(
    file: Path | None, prompt: str | None, stdin: TextIO | None, about: Path | None = None
) -> tuple[str | None, str, bool]:
    """The document, if any, the prompt, and whether both are the built-in ones.

    The prompt is the one given, else what `stdin` holds if it is no terminal, else the built-in question.

    Raises:
        UsageError: the file cannot be used, the prompt is empty, or there is a file (or something else that the
            question should be `about`) but no question.
    """
    document = read_document(file) if file else None
    if prompt is None and stdin is not None and not stdin.isatty():
        prompt = _read_stream(stdin).strip() or None
    if prompt is not None:
        return document, checked_prompt(prompt), False
    if (about := about or file) is not None:
        raise UsageError(f'There is no question about {about}: ask one with --prompt "...".')
    return *demo_document(), True


def checked_prompt(text: str, option: str = "--prompt") -> str:
    """The text itself; raises `UsageError` when there is nothing in it."""
    if not text.strip():
        what = option.removeprefix("--")
        raise UsageError(f'The {what} is empty: give one with {option} "...".')
    return text


def _read_stream(stream: TextIO) -> str:
    """All of standard input, read as a file is, whatever encoding the system is set to."""
    if hasattr(stream, "buffer"):
        data = stream.buffer.read(_LARGEST_INPUT + 1)
    else:
        data = stream.read(_LARGEST_INPUT + 1).encode("utf-8", "surrogateescape")
    if len(data) > _LARGEST_INPUT:
        raise UsageError(f"The standard input has more than {human_bytes(_LARGEST_INPUT)}: give a shorter text.")
    return decode_text(data, "The standard input")


def read_questions(path: Path, stdin: TextIO | None) -> list[str]:
    """Questions from a file, one a line; blank lines do not count. A `.jsonl` file has `{"question": ...}` a line.

    Args:
        path: the file; `-` for standard input.
        stdin: that.

    Raises:
        UsageError: the file is not there, is not a text file in UTF-8, has a line that is no question, or has none.
    """
    if str(path) == "-":
        text, name = "" if stdin is None else _read_stream(stdin), "The standard input"
    elif not path.exists():
        raise UsageError(f"There is no file {path}: check the path given with --questions.")
    else:
        text, name = read_text(path), str(path)
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        found = [_question_of(line, f"Line {number} of {name}") for number, line in lines]
    else:
        found = [line for _, line in lines]
    if not found:
        raise UsageError(f"{name} has no question in it: write one a line.")
    return found


def typed_lines(stdin: TextIO | None) -> Iterator[str]:
    """Lines of standard input that are not blank, each as soon as it is there.

    Raises:
        UsageError: a line is not UTF-8, or longer than any text may be.
    """
    source = () if stdin is None else getattr(stdin, "buffer", stdin)
    while source and (line := source.readline(_LARGEST_INPUT + 1)):
        data = line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line
        if len(data) > _LARGEST_INPUT:
            raise UsageError(f"A line has more than {human_bytes(_LARGEST_INPUT)}: ask a shorter question.")
        if text := decode_text(data, "The standard input").strip():
            yield text


def _question_of(line: str, where: str) -> str:
    try:
        question = parse_object(line).get("question")
    except ValueError:
        question = None
    if not isinstance(question, str) or not question.strip() or not is_text(question):
        raise UsageError(f'{where} has no question: write {{"question": "..."}} a line.')
    return question.strip()


def check_asking(prompt: str | None, questions: Path | None, chat: bool, cache: Path | None, save: Path | None) -> None:
    """
    Args:
        prompt: one question.
        questions: a file of many.
        chat: whether they are read while they are answered.
        cache: the compressed document that they are about.
        save: where to keep the conversation.

    Raises:
        UsageError: questions are to come from several places, or many of them are about no compressed document.
    """
    places = {"--prompt": prompt is not None, "--questions": questions is not None, "--chat": chat}
    given = [name for name, is_given in places.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"Questions come from one place: leave {' or '.join(given)} away.")
    if (questions is not None or chat) and cache is None:
        raise UsageError(
            f"{given[0]} asks about a compressed document: make one with `headprof compress`, and give it with --cache."
        )
    if save is not None and not chat:
        raise UsageError("Only a conversation can be saved: add --chat, or leave --save away.")


def check_sources(file: Path | None, cache: Path | None, compare: bool, compressing: Sequence[str] = ()) -> None:
    """
    Args:
        file: a document, as text.
        cache: a compressed one.
        compare: whether to answer with the full cache too.
        compressing: options that were given to say how to compress, such as `--budget` or `--keep`.

    Raises:
        UsageError: a compressed document is to be used together with what it stands for, or to be compressed.
    """
    if cache is not None and file is not None:
        raise UsageError("A compressed document and a file cannot be used together: leave --file or --cache away.")
    if cache is not None and compare:
        raise UsageError(
            "A compressed document cannot be compared with the full cache it no longer holds: leave --compare away."
        )
    if cache is not None and compressing:
        raise UsageError(f"A compressed document already says how it was compressed: leave {_named(compressing)} away.")


def check_answering(given: Sequence[str], asked: bool) -> None:
    """
    Args:
        given: options that were given to say how to answer questions about a document, such as `--batch`.
        asked: whether there are such questions.

    Raises:
        UsageError: there are options, but no questions.
    """
    if given and not asked:
        raise UsageError(
            f"Nothing is asked about the document: add --question or --questions, or leave {_named(given)} away."
        )


def _named(options: Sequence[str]) -> str:
    *others, last = options
    return f"{', '.join(others)} and {last}" if others else last


def read_document(path: Path) -> str:
    """A document, from a text file.

    Raises:
        UsageError: it is not there, is not a text file in UTF-8, or is empty.
    """
    if not path.exists():
        raise UsageError(f"There is no file {path}: check the path given with --file.")
    text = read_text(path).strip()
    if not text:
        raise UsageError(f"{path} is empty: give a file with text in it.")
    return text
