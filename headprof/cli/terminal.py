"""What the command line shows: progress and tables on stderr, results on stdout."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from headprof.errors import HeadprofError
from headprof.utils.printable import printable, printable_json

Report = Callable[[str, int, int], None]
"""Takes a description, the work done and the work in all."""

_LONGEST_WORD, _END_OF_WORD = 300, 20
_PATIENCE = 15.0
"""Seconds within which a launcher ends all processes once one of them has failed."""


class Terminal:
    """Where the command line writes.

    Attributes:
        quiet: no progress, no tables, no remarks; results and errors only.
        debug: let errors through with their traceback.
        mute: nothing at all, since another process says the same; but for an error that this one meets alone.
        has_failed: whether an error has been said.
    """

    def __init__(self, *, quiet: bool = False, debug: bool = False):
        self.configure(quiet=quiet, debug=debug)

    def configure(self, *, quiet: bool, debug: bool, mute: bool = False) -> None:
        """Begin anew with these."""
        self.quiet = quiet or mute
        self.debug = debug
        self.mute = mute
        self.has_failed = False
        self.stderr = _console(stderr=True, quiet=self.quiet)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A progress bar on stderr for work that reports itself; silent when stderr is no terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        shown = self.stderr.is_terminal and not self.quiet
        with Progress(*columns, console=self.stderr, disable=not shown, transient=True) as progress:
            task = progress.add_task("", total=None, visible=False)

            def report(description: str, done: int, total: int) -> None:
                progress.update(task, description=description, completed=done, total=total or None, visible=True)

            yield report

    def remark(self, text: str) -> None:
        """A line on stderr."""
        self.stderr.print(printable(text), markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table on stderr; columns after the first are right-aligned."""
        self.stderr.print(_table(columns, rows, title))

    def result_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table on stdout, for commands whose result is a table."""
        if self.mute:
            return
        with _standard_output():
            _console().print(_table(columns, rows, title))

    def write(self, text: str) -> None:
        """A model's text on stdout, at once: as it is, but for control characters that would reach a terminal."""
        self._write(printable(text) if sys.stdout is not None and sys.stdout.isatty() else text)

    def result(self, text: str) -> None:
        """A line on stdout."""
        self._write(printable(text) + "\n")

    def json(self, value: Any) -> None:
        """JSON on stdout, in ASCII where stdout cannot show every character."""
        text = json.dumps(value, indent=2, ensure_ascii=not _shows_everything(sys.stdout))
        self._write(printable_json(text) + "\n")

    def _write(self, text: str) -> None:
        if self.mute:
            return
        with _standard_output():
            sys.stdout.write(text)

    def error(self, message: str) -> None:
        """One sentence on stderr, also when quiet."""
        self.has_failed = True
        if self.mute:  # if the first process fails too, it says so, and the launcher ends this one
            time.sleep(_PATIENCE)
        words = [_cut(word) for word in printable(message).split(" ")]
        _console(stderr=True).print(f"Error: {' '.join(words)}", markup=False)


def _cut(word: str) -> str:
    """A word of a message; what somebody gave as an argument, or wrote into a file, may be as long as a book."""
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}...{word[-_END_OF_WORD:]}"


@contextmanager
def _standard_output() -> Iterator[None]:
    """Write to stdout and flush it; a pipe that nobody reads any more ends the program quietly, as is usual.

    Raises:
        HeadprofError: it is closed, or the disk behind it is full.
    """
    check_stdout()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        raise
    except OSError as error:
        _discard_output()
        raise HeadprofError(
            f"The standard output cannot be written ({error.strerror}): free some space, or send it elsewhere."
        ) from error


def check_stdout() -> None:
    """Raise `HeadprofError` when stdout was closed before the program began."""
    if sys.stdout is None or sys.stdout.closed:
        raise HeadprofError("The standard output is closed: leave it open, or send it to a file.")


def _discard_output() -> None:
    """Have what is still to be written go nowhere, so that Python's own flush at the end does not complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _shows_everything(stream: Any) -> bool:
    try:
        return codecs.lookup(stream.encoding).name.startswith("utf-")
    except (AttributeError, LookupError, TypeError):
        return stream is not None and getattr(stream, "encoding", None) is None  # in memory


def _console(**options: Any) -> Console:
    """A console that folds nothing: in a pipe or a log, lines are as long as they are."""
    console = Console(highlight=False, soft_wrap=True, **options)
    if not console.is_terminal:
        console.width = 160
    return console


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(
        title=printable(title) or None, title_justify="left", title_style="bold", header_style="bold", box=None
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table
