"""The file of an evaluation's answers, question by question, from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprof.errors import UsageError
from headprof.evaluation.perplexity import Loss
from headprof.evaluation.results import MULTI, OWN_TASKS, Answer
from headprof.evaluation.tasks import TASKS
from headprof.utils.files import append_text, write_text
from headprof.utils.records import is_text, is_whole, make_record, parse_object
from headprof.utils.resuming import Earlier, Words

QuestionKey = tuple[str, int]
"""A task, and the number of a question in it."""
Results = list[Answer] | list[Loss]
"""What one question came to, under each candidate."""

_KINDS = {"answers": Answer, "losses": Loss}
_ALL_TASKS = {*OWN_TASKS, "perplexity", *TASKS}
_SHARE, _COUNT = (0, 1), (0, 2**53)
_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "answers": {
        "score": _SHARE,
        "agreement": _SHARE,
        "depth": _SHARE,
        "prompt_tokens": _COUNT,
        "cache_bytes": _COUNT,
        "second_tier_bytes": _COUNT,
    },
    "losses": {"document": _COUNT, "tokens": (1, 2**53), "nll": (0, math.inf), "cache_bytes": _COUNT},
}
_SHOWN = ("task", "group", "method", "budget", "family")
"""Texts that stand in tables."""
_LONGEST_LINE = 2**26
_LONGEST_NAME = 1000


class Journal:
    """A file of JSON lines: first what the run is, then a line for each question, in the order in which they were done.

    A `ResultsFile`, to which each answer is written at once.

    Attributes:
        path: the file.
        digest: of the data that a question was made from; empty where there is none, or the question is not known.
        candidates: the method and the budget of each result of a question, in order; `None` to take any.
    """

    words = Words("answers", "to", "questions", "folder")

    def __init__(
        self,
        path: Path,
        digest: Callable[[QuestionKey], str] = lambda question: "",
        candidates: Sequence[tuple[str, str]] | None = None,
    ):
        self.path = path
        self.digest = digest
        self.candidates = candidates
        self._digests: dict[QuestionKey, str] = {}

    def count(self, results: dict[QuestionKey, Results]) -> int:
        """Number of questions."""
        return len(results)

    def read(self) -> Earlier[QuestionKey, Results]:
        """What the file holds; a last line that was cut off is left out.

        Raises:
            UsageError: it is damaged or cannot be read.
        """
        damaged = f"The answers in {self.path} are damaged: delete that file, or run without --resume."
        try:
            if self.path.exists() and not self.path.is_file():
                raise UsageError(damaged)
            rows = self._rows()
            run = next(rows)["run"]
            if not isinstance(run, dict):
                raise UsageError(damaged)
            results, digests = {}, {}
            for row in rows:
                question, digest, found = _parse_row(row)
                if question in results:
                    raise UsageError(damaged)
                results[question], digests[question] = found, digest
            return Earlier(run, results, digests)
        except (ValueError, KeyError, StopIteration) as error:
            raise UsageError(damaged) from error
        except OSError as error:
            raise UsageError(
                f"The answers in {self.path} cannot be read ({error.strerror}): choose another folder with -o."
            ) from error

    def _rows(self) -> Iterator[dict[str, Any]]:
        """The file's whole lines; raises `ValueError` for one that is no JSON object."""
        with self.path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if line.endswith(b"\n"):
                    yield parse_object(line)
                elif len(line) == _LONGEST_LINE:
                    raise ValueError("a line is too long")

    def accept(self, earlier: Earlier[QuestionKey, Results]) -> None:
        """Go on from these answers.

        Raises:
            UsageError: the data that a question was made from has changed; or an answer is of no candidate of this run.
        """
        for question, results in earlier.results.items():
            found = [(result.method, result.budget) for result in results]
            if self.candidates is not None and not self._is_of(question[0], found):
                raise UsageError(
                    f"The answers to question {question[1]} of {question[0]} in {self.path} are not of this run's "
                    "tasks, methods and budgets: choose another folder with -o, or run without --resume to start anew."
                )
        for question, digest in earlier.digests.items():
            if self.digest(question) not in ("", digest):
                raise UsageError(
                    f"The data of {question[0]} is not that of the answers in {self.path}: restore it, choose another "
                    "folder with -o, or run without --resume to start anew."
                )
        self._digests |= earlier.digests

    def _is_of(self, task: str, found: list[tuple[str, str]]) -> bool:
        """Whether results are those of the candidates, in order: once, or once for each question about a document."""
        assert self.candidates is not None
        times = len(found) // len(self.candidates) if task == MULTI else 1
        return task in _ALL_TASKS and found == [*self.candidates] * times

    def begin(self, key: dict[str, Any], results: dict[QuestionKey, Results]) -> None:
        """Write what there is, atomically; earlier answers that were not taken in are kept as `NAME.previous.jsonl`."""
        if not results:
            with contextlib.suppress(OSError):  # if the disk refuses, it says so at once
                if self.path.is_file():
                    self.path.replace(self.path.with_suffix(".previous.jsonl"))
        write_text(self.path, _line({"run": key}) + self._lines(results))

    def add(self, results: dict[QuestionKey, Results]) -> None:
        """Write these too.

        Raises:
            HeadprofError: the disk refused; the file holds whole lines still, but for the last one.
        """
        if results:
            append_text(self.path, self._lines(results))

    def save(self) -> None:
        """Nothing is left to do."""

    def _lines(self, results: dict[QuestionKey, Results]) -> str:
        return "".join(
            _result_line(question, each, self._digests.get(question) or self.digest(question))
            for question, each in results.items()
        )


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _result_line(question: QuestionKey, results: Results, digest: str) -> str:
    task, number = question
    kind = "losses" if isinstance(results[0], Loss) else "answers"
    return _line({"task": task, "number": number, "data": digest, kind: [asdict(result) for result in results]})


def _parse_row(row: dict[str, Any]) -> tuple[QuestionKey, str, Results]:
    """A question, the digest of its data, and what it came to; raises `ValueError` or `KeyError` for no such row."""
    kind = "losses" if "losses" in row else "answers"
    task, number, digest, results = row["task"], row["number"], row.get("data", ""), row[kind]
    if row.keys() - {"data"} != {"task", "number", kind}:
        raise ValueError("a row has other fields")
    if not is_whole(number, 0, 2**53) or not isinstance(digest, str) or (kind == "losses") != (task == "perplexity"):
        raise ValueError("a row is of no question")
    if not isinstance(results, list) or not results:
        raise ValueError("a row has no results")
    found: list[Any] = [make_record(_KINDS[kind], values, _RANGES[kind]) for values in results]
    for result in found:
        shown = [getattr(result, name) for name in _SHOWN if hasattr(result, name)]
        if not all(is_text(text) and len(text) <= _LONGEST_NAME for text in shown):
            raise ValueError("a name is none that could be shown")
        if (result.document if isinstance(result, Loss) else result.task) != (number if kind == "losses" else task):
            raise ValueError("a result is of another question")
    return (task, number), digest, found
