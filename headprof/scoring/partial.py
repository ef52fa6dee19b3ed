"""Results of a scoring run so far, kept on disk so that an interrupted run can go on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headprof.errors import UsageError
from headprof.files import atomic_write
from headprof.scoring.probing import ProbeResult


class PartialRun:
    """Results by context number, in memory, and in a file when asked."""

    def __init__(self, path: Path | None, key: str):
        self.path = path
        self.key = key
        self._results: dict[int, list[ProbeResult]] = {}

    @classmethod
    def start(cls, path: Path | None, key: str, *, resume: bool) -> PartialRun:
        """An empty run, or with `resume` the one that `path` holds, if there is one.

        Raises:
            UsageError: the file is of a run with another model or other settings, or cannot be read.
        """
        run = cls(path, key)
        if resume and path is not None and path.exists():
            run._load()
        return run

    def __contains__(self, index: int) -> bool:
        return index in self._results

    def add(self, index: int, results: list[ProbeResult]) -> None:
        self._results[index] = results

    def results(self) -> list[ProbeResult]:
        """All results, in the order of their contexts."""
        return [result for index in sorted(self._results) for result in self._results[index]]

    @property
    def num_probes(self) -> int:
        return sum(len(results) for results in self._results.values())

    @property
    def num_answered(self) -> int:
        return sum(result.answered for result in self.results())

    def save(self) -> None:
        """Write what there is, atomically; nothing when the run is empty or keeps no file."""
        if self.path is None or not self._results:
            return
        flat = [(index, result) for index in sorted(self._results) for result in self._results[index]]
        names = sorted({name for _, result in flat for name in (result.kind, result.family)})
        tensors = {
            "scores": torch.stack([result.scores for _, result in flat]),
            "answered": torch.tensor([result.answered for _, result in flat]),
            "context": torch.tensor([index for index, _ in flat]),
            "kind": torch.tensor([names.index(result.kind) for _, result in flat]),
            "family": torch.tensor([names.index(result.family) for _, result in flat]),
        }
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary, metadata={"key": self.key, "names": "\n".join(names)})

    def remove(self) -> None:
        """Delete the file, once its results are in a profile."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        assert self.path is not None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"The partial results in {self.path} cannot be read: delete that file, or run without --resume."
            ) from error
        if metadata.get("key") != self.key:
            raise UsageError(
                f"The partial results in {self.path} are of another model or other settings: give the same options "
                "again, or run without --resume to start anew."
            )
        names = metadata["names"].split("\n")
        for row, index in enumerate(tensors["context"].tolist()):
            self._results.setdefault(index, []).append(
                ProbeResult(
                    kind=names[tensors["kind"][row]],
                    family=names[tensors["family"][row]],
                    answered=bool(tensors["answered"][row]),
                    scores=tensors["scores"][row],
                )
            )
