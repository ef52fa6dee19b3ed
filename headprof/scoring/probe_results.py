"""Results of a scoring run, probe by probe, kept on disk: an interrupted run goes on, and a longer one adds to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from headprof.errors import UsageError
from headprof.scoring.prober import ProbeResult
from headprof.utils.files import atomic_write


class RunResults:
    """Results by context number, in memory, and in a file when asked.

    Attributes:
        path: the file; none to keep none.
        key: everything that a probe's result depends on, except which probe it is.
        contents: results of each context.
    """

    def __init__(self, path: Path | None, key: str):
        self.path = path
        self.key = key
        self.contents: dict[int, list[ProbeResult]] = {}

    def load(self) -> None:
        """Take in what the file holds, if there is one.

        Raises:
            UsageError: the file is of a run with another model or other settings, or cannot be read.
        """
        if self.path is None or not self.path.exists():
            return
        key, found = _read(self.path)
        if key != self.key:
            raise UsageError(
                f"The results in {self.path} are of another model or other settings: give the same options again, or "
                "run without --resume to start anew."
            )
        self.contents |= found

    def count(self, context: int) -> int:
        """Number of probes of this context that have results."""
        return len(self.contents.get(context, ()))

    def of(self, contexts: Iterable[int]) -> list[ProbeResult]:
        """Results of these contexts, in order."""
        return [result for context in contexts for result in self.contents[context]]

    def __len__(self) -> int:
        """Number of probes."""
        return sum(map(len, self.contents.values()))

    def save(self) -> None:
        """Write what there is, atomically; nothing when there is nothing, or no file to keep."""
        if self.path is None or not self.contents:
            return
        flat = [(context, result) for context in sorted(self.contents) for result in self.contents[context]]
        names = sorted({name for _, result in flat for name in (result.kind, result.family)})
        tensors = {
            "scores": torch.stack([result.scores for _, result in flat]),
            "answered": torch.tensor([result.answered for _, result in flat]),
            "context": torch.tensor([context for context, _ in flat]),
            "kind": torch.tensor([names.index(result.kind) for _, result in flat]),
            "family": torch.tensor([names.index(result.family) for _, result in flat]),
        }
        content = save(tensors, metadata={"key": self.key, "names": "\n".join(names)})
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(content)


def results_file(profile: Path) -> Path:
    """Where the results behind a profile are kept: `NAME.probes.safetensors` beside `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}.probes.safetensors")


def probes_kept(path: Path, key: str) -> int:
    """How many probes of the run `key` a file holds; 0 when it is of another run, damaged or not there."""
    if not path.exists():
        return 0
    with contextlib.suppress(UsageError):
        found_key, found = _read(path)
        return sum(map(len, found.values())) if found_key == key else 0
    return 0


def _read(path: Path) -> tuple[str, dict[int, list[ProbeResult]]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = metadata["names"].split("\n")
        by_context: dict[int, list[ProbeResult]] = {}
        for row, context in enumerate(tensors["context"].tolist()):
            by_context.setdefault(context, []).append(
                ProbeResult(
                    kind=names[tensors["kind"][row]],
                    family=names[tensors["family"][row]],
                    answered=bool(tensors["answered"][row]),
                    scores=tensors["scores"][row],
                )
            )
    except (SafetensorError, OSError, KeyError) as error:
        raise UsageError(f"The results in {path} cannot be read: delete that file, or run without --resume.") from error
    return metadata.get("key", ""), by_context
