"""The results of an evaluation on disk, question by question, so that an interrupted run goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headprof.errors import UsageError
from headprof.evaluation.perplexity import Loss
from headprof.evaluation.results import Answer
from headprof.utils.files import append_text, write_text

Place = tuple[str, int]
"""A task, and the number of a question in it."""
Results = list[Answer] | list[Loss]
"""What one question came to, under each candidate."""

_KINDS = {"answers": Answer, "losses": Loss}


class Journal:
    """A file of JSON lines: first what the run is, then a line for each question, in the order in which they were done.

    Attributes:
        path: the file; none to keep none.
        key: everything that all answers depend on.
        digest: of the data that a question was made from; empty where there is none, or the question is not known.
        results: of the questions done.
    """

    def __init__(self, path: Path | None, key: dict[str, Any], digest: Callable[[Place], str] = lambda place: ""):
        self.path = path
        self.key = key
        self.digest = digest
        self.results: dict[Place, Results] = {}
        self._digests: dict[Place, str] = {}

    def load(self) -> None:
        """Take in what the file holds, if there is one; a last line that was cut off is left out.

        Raises:
            UsageError: it is of another run, or of other data, or damaged.
        """
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # what cannot be looked for cannot be read either
            if not self.path.exists():
                return
        key, found, digests = _read(self.path)
        if key != self.key:
            raise UsageError(
                f"The answers in {self.path} are of another model or other settings ({_first_difference(key, self.key)}"
                "): give the same options again, choose another folder with -o, or run without --resume to start anew."
            )
        for place in found:
            if self.digest(place) not in ("", digests[place]):
                raise UsageError(
                    f"The data of {place[0]} is not that of the answers in {self.path}: restore it, choose another "
                    "folder with -o, or run without --resume to start anew."
                )
        self.results |= found
        self._digests |= digests

    def begin(self) -> None:
        """Write what there is, atomically; earlier answers that were not taken in are kept as `NAME.previous.jsonl`."""
        if self.path is None:
            return
        if not self.results:
            with contextlib.suppress(OSError):  # if the disk refuses, it says so at once
                if self.path.is_file():
                    self.path.replace(self.path.with_suffix(".previous.jsonl"))
        write_text(self.path, _line({"run": self.key}) + self._lines(self.results))

    def add(self, results: dict[Place, Results]) -> None:
        """Keep these too.

        Raises:
            HeadprofError: the disk refused; the file holds whole lines still, but for the last one.
        """
        if self.path is not None and results:
            append_text(self.path, self._lines(results))
        self.results |= results

    def _lines(self, results: dict[Place, Results]) -> str:
        return "".join(
            _result_line(place, each, self._digests.get(place) or self.digest(place)) for place, each in results.items()
        )

    def __len__(self) -> int:
        return len(self.results)


def answers_kept(path: Path, key: dict[str, Any]) -> int:
    """How many questions of the run `key` a file holds; 0 when it is of another run, damaged or not there."""
    with contextlib.suppress(UsageError):
        found_key, found, _ = _read(path)
        return len(found) if found_key == key else 0
    return 0


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _result_line(place: Place, results: Results, digest: str) -> str:
    task, number = place
    kind = "losses" if isinstance(results[0], Loss) else "answers"
    return _line({"task": task, "number": number, "data": digest, kind: [asdict(result) for result in results]})


def _read(path: Path) -> tuple[dict[str, Any], dict[Place, Results], dict[Place, str]]:
    """What the run was; results and digests of its questions."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")  # after the last newline: nothing, or half a line
        rows = [json.loads(line) for line in lines]
        results, digests = {}, {}
        for row in rows[1:]:
            place = row["task"], row["number"]
            results[place], digests[place] = _results(row), row.get("data", "")
        return rows[0]["run"], results, digests
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"The answers in {path} are damaged: delete that file, or run without --resume.") from error
    except OSError as error:
        raise UsageError(
            f"The answers in {path} cannot be read ({error.strerror}): choose another folder with -o."
        ) from error


def _results(row: dict[str, Any]) -> Results:
    kind = "losses" if "losses" in row else "answers"
    return [_KINDS[kind](**values) for values in row[kind]]


def _first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names: Iterable[str] = [*wanted, *(name for name in found if name not in wanted)]
    return next((name.replace("_", " ") for name in names if found.get(name) != wanted.get(name)), "")
