"""What the command line shows: progress and tables on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Report = Callable[[str, int, int], None]
"""Takes a description, the work done and the work in all."""


class Terminal:
    """Where the command line writes.

    Attributes:
        quiet: no progress, no tables, no remarks; results and errors only.
        debug: let errors through with their traceback.
    """

    def __init__(self, *, quiet: bool = False, debug: bool = False):
        self.configure(quiet=quiet, debug=debug)

    def configure(self, *, quiet: bool, debug: bool) -> None:
        """Begin anew with these."""
        self.quiet = quiet
        self.debug = debug
        self.stderr = _console(stderr=True, quiet=quiet)

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
        self.stderr.print(text, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table on stderr; columns after the first are right-aligned."""
        self.stderr.print(_table(columns, rows, title))

    def result_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table on stdout, for commands whose result is a table."""
        _console().print(_table(columns, rows, title))

    def write(self, text: str) -> None:
        """Text on stdout, as it is, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def result(self, text: str) -> None:
        """A line on stdout."""
        self.write(text + "\n")

    def json(self, value: Any) -> None:
        self.result(json.dumps(value, indent=2, ensure_ascii=False))

    def error(self, message: str) -> None:
        """One sentence on stderr, also when quiet."""
        _console(stderr=True).print(f"Error: {message}", markup=False)


def _console(**options: Any) -> Console:
    """A console that folds nothing: in a pipe or a log, lines are as long as they are."""
    console = Console(highlight=False, soft_wrap=True, **options)
    if not console.is_terminal:
        console.width = 160
    return console


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold", box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
