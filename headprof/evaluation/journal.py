"""The file of an evaluation's answers, question by question, from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprof.errors import UsageError
from headprof.evaluation.perplexity import Loss
from headprof.evaluation.results import Answer
from headprof.utils.files import append_text, write_text
from headprof.utils.resuming import Earlier, Words

QuestionKey = tuple[str, int]
"""A task, and the number of a question in it."""
Results = list[Answer] | list[Loss]
"""What one question came to, under each candidate."""

_KINDS = {"answers": Answer, "losses": Loss}


class Journal:
    """A file of JSON lines: first what the run is, then a line for each question, in the order in which they were done.

    A `ResultsFile`, to which each answer is written at once.

    Attributes:
        path: the file.
        digest: of the data that a question was made from; empty where there is none, or the question is not known.
    """

    words = Words("answers", "to", "questions", "folder")

    def __init__(self, path: Path, digest: Callable[[QuestionKey], str] = lambda question: ""):
        self.path = path
        self.digest = digest
        self._digests: dict[QuestionKey, str] = {}

    def count(self, results: dict[QuestionKey, Results]) -> int:
        """Number of questions."""
        return len(results)

    def read(self) -> Earlier[QuestionKey, Results]:
        """What the file holds; a last line that was cut off is left out.

        Raises:
            UsageError: it is damaged or cannot be read.
        """
        try:
            *lines, _ = self.path.read_bytes().split(b"\n")  # after the last newline: nothing, or half a line
            rows = [json.loads(line) for line in lines]
            results, digests = {}, {}
            for row in rows[1:]:
                question = row["task"], row["number"]
                results[question], digests[question] = _results(row), row.get("data", "")
            return Earlier(rows[0]["run"], results, digests)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"The answers in {self.path} are damaged: delete that file, or run without --resume."
            ) from error
        except OSError as error:
            raise UsageError(
                f"The answers in {self.path} cannot be read ({error.strerror}): choose another folder with -o."
            ) from error

    def accept(self, earlier: Earlier[QuestionKey, Results]) -> None:
        """Go on from these answers.

        Raises:
            UsageError: the data that a question was made from has changed.
        """
        for question, digest in earlier.digests.items():
            if self.digest(question) not in ("", digest):
                raise UsageError(
                    f"The data of {question[0]} is not that of the answers in {self.path}: restore it, choose another "
                    "folder with -o, or run without --resume to start anew."
                )
        self._digests |= earlier.digests

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


def _results(row: dict[str, Any]) -> Results:
    kind = "losses" if "losses" in row else "answers"
    return [_KINDS[kind](**values) for values in row[kind]]
