"""The file of a scoring run's results, probe by probe: an interrupted run goes on, and a longer one adds to them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from headprof.errors import UsageError
from headprof.scoring.prober import ProbeResult
from headprof.utils.files import atomic_write
from headprof.utils.resuming import Earlier, Words

SAVE_EVERY = float(os.environ.get("HEADPROF_SAVE_EVERY", "10"))
"""Seconds between two writes of the results."""

Results = dict[int, list[ProbeResult]]
"""Of each context, by its number, the results of its probes."""


class ProbesFile:
    """A safetensors file of all results: scores `[n, L, H]`, and of each probe its context, kind, family and answer.

    A `ResultsFile`, written anew every `SAVE_EVERY` seconds.
    """

    words = Words("results", "of", "probes", "file")

    def __init__(self, path: Path):
        self.path = path
        self._key: dict[str, Any] = {}
        self._results: Results = {}
        self._saved_at = time.monotonic()

    def count(self, results: Results) -> int:
        """Number of probes."""
        return sum(map(len, results.values()))

    def read(self) -> Earlier[int, list[ProbeResult]]:
        """What the file holds; raises `UsageError` when it cannot be read."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Earlier(_key_of(metadata), _results_of(tensors, metadata["names"].split("\n")))
        except (SafetensorError, OSError, KeyError) as error:
            raise UsageError(
                f"The results in {self.path} cannot be read: delete that file, or run without --resume."
            ) from error

    def accept(self, earlier: Earlier[int, list[ProbeResult]]) -> None:
        """Nothing to check: probes follow from the run's key."""

    def begin(self, key: dict[str, Any], results: Results) -> None:
        """Note what there is; a file from before stays until there is something to write."""
        self._key, self._results = key, dict(results)
        self._saved_at = time.monotonic()

    def add(self, results: Results) -> None:
        """Note these too, and write all of them now and then."""
        self._results |= results
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what there is, atomically; nothing when there is nothing."""
        if not self._results:
            return
        flat = [(context, result) for context in sorted(self._results) for result in self._results[context]]
        names = sorted({name for _, result in flat for name in (result.kind, result.family)})
        tensors = {
            "scores": torch.stack([result.scores for _, result in flat]),
            "answered": torch.tensor([result.answered for _, result in flat]),
            "context": torch.tensor([context for context, _ in flat]),
            "kind": torch.tensor([names.index(result.kind) for _, result in flat]),
            "family": torch.tensor([names.index(result.family) for _, result in flat]),
        }
        metadata = {"key": json.dumps(self._key, sort_keys=True), "names": "\n".join(names)}
        content = save(tensors, metadata=metadata)
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(content)
        self._saved_at = time.monotonic()


def results_path(profile: Path) -> Path:
    """Where the results behind a profile are kept: `NAME.probes.safetensors` beside `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}.probes.safetensors")


def _key_of(metadata: dict[str, str]) -> dict[str, Any]:
    """What the run was; empty where that is unreadable."""
    try:
        key = json.loads(metadata.get("key", ""))
    except ValueError:
        return {}
    return key if isinstance(key, dict) else {}


def _results_of(tensors: dict[str, torch.Tensor], names: list[str]) -> Results:
    by_context: Results = {}
    for row, context in enumerate(tensors["context"].tolist()):
        by_context.setdefault(context, []).append(
            ProbeResult(
                kind=names[tensors["kind"][row]],
                family=names[tensors["family"][row]],
                answered=bool(tensors["answered"][row]),
                scores=tensors["scores"][row],
            )
        )
    return by_context
