"""Results of a long run in one safetensors file, which is written anew now and then."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from headprof.utils.files import atomic_write, remove_leftovers
from headprof.utils.resuming import Earlier
from headprof.utils.tensor_files import with_checksum

if TYPE_CHECKING:
    from torch import Tensor

SAVE_EVERY = float(os.environ.get("HEADPROF_SAVE_EVERY", "10"))
"""Seconds between two writes of the results."""

Found = TypeVar("Found")
"""What there is of a part: a probe, an answer."""


class TensorResults(Generic[Found]):
    """What is common to the `ResultsFile`s of runs whose parts are numbered, and come to several results each.

    The metadata's `key` is everything that the results depend on.
    """

    def __init__(self, path: Path):
        self.path = path
        self._key: dict[str, Any] = {}
        self._results: dict[int, list[Found]] = {}
        self._saved_at = time.monotonic()

    def stored(self, results: list[tuple[int, Found]]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata, but for the key, of at least one result, each with the number of its part."""
        raise NotImplementedError

    def count(self, results: dict[int, list[Found]]) -> int:
        """Number of results."""
        return sum(map(len, results.values()))

    def accept(self, earlier: Earlier[int, list[Found]]) -> None:
        """Nothing to check: what is asked follows from the run's key."""

    def begin(self, key: dict[str, Any], results: dict[int, list[Found]]) -> None:
        """Note what there is; a file from before stays until there is something to write."""
        remove_leftovers(self.path)
        self._key, self._results = key, dict(results)
        self._saved_at = time.monotonic()

    def add(self, results: dict[int, list[Found]]) -> None:
        """Note these too, and write all of them now and then."""
        self._results |= results
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what there is, atomically; nothing when there is nothing."""
        from safetensors.torch import save

        if not self._results:
            return
        flat = [(number, found) for number in sorted(self._results) for found in self._results[number]]
        tensors, metadata = self.stored(flat)
        metadata = {**metadata, "key": json.dumps(self._key, sort_keys=True)}
        content = save(tensors, metadata=with_checksum(tensors, metadata))
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(content)
        self._saved_at = time.monotonic()
