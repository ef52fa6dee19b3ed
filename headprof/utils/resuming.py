"""Results of a long run, kept on disk as they come, so that an interrupted run goes on where it stood.

`KeptResults` is what every such run does with them, and a `ResultsFile` the format in which it keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from headprof.errors import HeadprofError, InterruptedRun, UsageError
from headprof.utils.files import FileLock
from headprof.utils.team import Team

Part = TypeVar("Part", bound=Hashable)
"""What a run is made of, and done one after the other: a question, a context."""
Found = TypeVar("Found")
"""What a part came to."""


@dataclass(frozen=True)
class Words:
    """How messages speak of a run.

    Attributes:
        results, of, parts: "answers", "to" and "questions", as in "the answers to 5 questions".
        target: what the user names with `-o`, "folder" or "file".
    """

    results: str
    of: str
    parts: str
    target: str


@dataclass(frozen=True)
class Earlier(Generic[Part, Found]):
    """What a file holds of a run before.

    Attributes:
        key: all that its results depend on.
        results: of the parts that were done.
        digests: of the data that a part was made from, where the file says so.
    """

    key: dict[str, Any]
    results: dict[Part, Found]
    digests: dict[Part, str] = field(default_factory=dict)


class ResultsFile(Protocol[Part, Found]):
    """A file of results in a format of its own."""

    path: Path
    words: Words

    def count(self, results: dict[Part, Found]) -> int:
        """How many of `words.parts` these results are of."""
        ...

    def read(self) -> Earlier[Part, Found]:
        """What the file holds; raises `UsageError` when it is damaged or cannot be read."""
        ...

    def accept(self, earlier: Earlier[Part, Found]) -> None:
        """Go on from these; raises `UsageError` when the data that they were made from has changed."""
        ...

    def begin(self, key: dict[str, Any], results: dict[Part, Found]) -> None:
        """A run begins with these results; raises `HeadprofError` when the disk refuses."""
        ...

    def add(self, results: dict[Part, Found]) -> None:
        """Keep these too, on disk now or soon; raises `HeadprofError` when the disk refuses."""
        ...

    def save(self) -> None:
        """Have all that was added on disk; raises `HeadprofError` when the disk refuses."""
        ...


class KeptResults(Generic[Part, Found]):
    """What a run has found so far, in memory, and in a file if it is to go on after an interruption.

    Attributes:
        key: everything that all results depend on, as JSON has it.
        file: where they are kept; `None` to keep none, as in all processes of a team but the first.
        unsaid: entries of the key that files from before do not have, and then are not asked for.
        results: of the parts that are done.
    """

    def __init__(
        self, key: dict[str, Any], file: ResultsFile[Part, Found] | None = None, *, unsaid: Collection[str] = ()
    ):
        self.key = key
        self.file = file
        self.unsaid = unsaid
        self.results: dict[Part, Found] = {}
        self._lock = None if file is None else FileLock(file.path)

    def start(self, resume: bool, team: Team) -> None:
        """Begin with nothing, or with what the file holds; process 0 reads it for all.

        From now until the end of `keeping` no other run can write the file.

        Raises:
            UsageError: in all processes, as `load`; or another run writes the file.
            HeadprofError: likewise, when the disk refuses.
        """
        error = None
        if team.rank == 0:
            try:
                self._begin(resume)
            except HeadprofError as found:  # which the others must hear of too, or they would wait
                error = found
        error, self.results = team.share((error, self.results))
        if error is not None:
            raise error

    def _begin(self, resume: bool) -> None:
        self._take_lock()
        try:
            if resume:
                self.load()
            if self.file is not None:
                self.file.begin(self.key, self.results)
        except BaseException:
            self._release_lock()
            raise

    def _take_lock(self) -> None:
        if self.file is not None and self._lock is not None and not self._lock.take():
            words = self.file.words
            raise UsageError(
                f"Another run is writing its {words.results} to {self.file.path}: wait until it has ended, or choose "
                f"another {words.target} with -o."
            )

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def load(self) -> None:
        """Take in what the file holds, if there is one.

        Raises:
            UsageError: it is of another run, or of other data, or damaged.
        """
        if self.file is None or _is_missing(self.file.path):
            return
        earlier, words = self.file.read(), self.file.words
        if earlier.key != (wanted := self._wanted(earlier)):
            raise UsageError(
                f"The {words.results} in {self.file.path} are of another model or other settings "
                f"({first_difference(earlier.key, wanted)}): give the same options again, choose another "
                f"{words.target} with -o, or run without --resume to start anew."
            )
        self.file.accept(earlier)
        self.results |= earlier.results

    def _wanted(self, earlier: Earlier[Part, Found]) -> dict[str, Any]:
        """The key that a file's results must have, as far as a file like that says it."""
        unsaid = set(self.unsaid) - earlier.key.keys()
        return {name: value for name, value in self.key.items() if name not in unsaid}

    def add(self, results: dict[Part, Found]) -> None:
        """Keep these too; raises `HeadprofError` when the disk refuses."""
        if self.file is not None:
            self.file.add(results)
        self.results |= results

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Have what was added on disk at the end of the block, however it ends; then others may write there.

        Raises:
            InterruptedRun: Ctrl-C within the block; it says how much is kept.
        """
        try:
            try:
                yield
            finally:
                if self.file is not None:
                    self.file.save()
        except KeyboardInterrupt:
            raise InterruptedRun(self._interrupted()) from None
        finally:
            self._release_lock()

    def _interrupted(self) -> str:
        if self.file is None or not self.results:
            return "Interrupted before anything was kept."
        words, count = self.file.words, self.file.count(self.results)
        return (
            f"Interrupted: the {words.results} {words.of} {count} {words.parts} are kept in {self.file.path}; give the "
            "same command with --resume to go on."
        )

    def starting_anew(self) -> str:
        """A remark on what `resume` would take from the file; empty if that holds nothing of this very run."""
        if self.file is None or not (count := self.count_on_disk()):
            return ""
        parts, folder = self.file.words.parts, self.file.path.parent
        return f"Starting anew; with --resume, {count} {parts} would be taken from {folder} as they are."

    def count_on_disk(self) -> int:
        """How many parts of this very run the file holds; 0 when it is of another one, damaged or not there."""
        if self.file is None or _is_missing(self.file.path):
            return 0
        with contextlib.suppress(UsageError):
            earlier = self.file.read()
            return self.file.count(earlier.results) if earlier.key == self._wanted(earlier) else 0
        return 0


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Name of the first entry in which two keys differ, for messages; of an entry `settings` the one within it."""
    names = [*wanted, *(name for name in found if name not in wanted)]
    name = next((name for name in names if found.get(name) != wanted.get(name)), "")
    theirs, ours = found.get(name), wanted.get(name)
    if name == "settings" and isinstance(theirs, dict) and isinstance(ours, dict):
        return first_difference(theirs, ours)
    return name.replace("_", " ")


def _is_missing(path: Path) -> bool:
    with contextlib.suppress(OSError):  # what cannot be looked for cannot be read either
        return not path.exists()
    return False
