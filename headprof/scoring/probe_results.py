"""The file of a scoring run's results, probe by probe: an interrupted run goes on, and a longer one adds to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.probes.needles import KINDS
from headprof.profile.faults import LARGEST_SCORE
from headprof.scoring.prober import ProbeResult
from headprof.utils.records import parse_object
from headprof.utils.resuming import Earlier, Words
from headprof.utils.tensor_files import Stored, TensorFile, is_altered, open_tensors
from headprof.utils.tensor_results import TensorResults

_LARGEST_FILE = 2**33
_MOST_NAMES, _LONGEST_NAME = 10_000, 1000

Results = dict[int, list[ProbeResult]]
"""Of each context, by its number, the results of its probes."""


class ProbesFile(TensorResults[ProbeResult]):
    """A safetensors file of all results: scores `[n, L, H]`, and of each probe its context, kind, family and answer.

    Write scores `[n, L, H]` are there if any probe has them; those of a probe without are not a number. Files from
    before there were any are read too.

    A `ResultsFile`.
    """

    words = Words("results", "of", "probes", "file")

    def read(self) -> Earlier[int, list[ProbeResult]]:
        """What the file holds; raises `UsageError` when it is damaged, altered or cannot be read."""
        mend = "delete that file, or run without --resume"
        try:
            with open_tensors(self.path, "results", mend, ValueError) as file:
                metadata = file.metadata
                key, names = _key_of(metadata), _names_of(metadata)
                _check_stored(file, key)
                tensors = file.read_all()
            _check_numbers(tensors, names, key)
        except ValueError as error:
            raise UsageError(f"The results in {self.path} cannot be read: {mend}.") from error
        if is_altered(tensors, metadata):
            raise UsageError(f"The results in {self.path} have been altered since they were written: {mend}.")
        return Earlier(key, _results_of(tensors, names))

    def stored(self, results: list[tuple[int, ProbeResult]]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        names = sorted({name for _, result in results for name in (result.kind, result.family)})
        tensors = {
            "scores": torch.stack([result.scores for _, result in results]),
            "answered": torch.tensor([result.answered for _, result in results]),
            "context": torch.tensor([context for context, _ in results]),
            "kind": torch.tensor([names.index(result.kind) for _, result in results]),
            "family": torch.tensor([names.index(result.family) for _, result in results]),
        }
        if any(result.write is not None for _, result in results):
            unknown = torch.full_like(tensors["scores"][0], torch.nan)
            writes = [unknown if result.write is None else result.write for _, result in results]
            tensors["write"] = torch.stack(writes)
        return tensors, {"names": "\n".join(names)}


def results_path(profile: Path) -> Path:
    """Where the results behind a profile are kept: `NAME.probes.safetensors` beside `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}.probes.safetensors")


def _key_of(metadata: dict[str, str]) -> dict[str, Any]:
    """What the run was; empty where that is unreadable."""
    try:
        return parse_object(metadata.get("key", ""))
    except ValueError:
        return {}


def _names_of(metadata: dict[str, str]) -> list[str]:
    """The kinds and families that the tensors number; raises `ValueError` for what no names are."""
    names = metadata.get("names", "").split("\n")
    if len(names) > _MOST_NAMES or max(map(len, names)) > _LONGEST_NAME or len(set(names)) < len(names):
        raise ValueError("its names are not those of families")
    return names


def _check_stored(file: TensorFile, key: dict[str, Any]) -> None:
    """Look at types and sizes before anything is read; raises `ValueError` when they are not a run's."""
    scores = file.stored.get("scores", Stored("", ()))
    count = scores.shape[:1]
    grid = scores.shape[1:]
    if "fingerprint" in key:
        shape = HeadShape.from_dict(key["fingerprint"])
        grid = (shape.num_layers, shape.num_heads)
    numbers = Stored("I64", count)
    wanted = {
        "scores": Stored("F32", (*count, *grid)),
        "answered": Stored("BOOL", count),
        "context": numbers,
        "kind": numbers,
        "family": numbers,
    }
    if "write" in file.stored:
        wanted["write"] = wanted["scores"]
    if file.stored != wanted or len(scores.shape) != 3 or file.size > _LARGEST_FILE:
        raise ValueError("its tensors are not those of probes")


def _check_numbers(tensors: dict[str, torch.Tensor], names: list[str], key: dict[str, Any]) -> None:
    """Look at the numbers; raises `ValueError` when they are not those of a run with this key."""
    scores, context = tensors["scores"], tensors["context"]
    if not ((scores >= 0) & (scores <= LARGEST_SCORE)).all() or (context < 0).any():
        raise ValueError("its scores or contexts are no such numbers")
    write = tensors.get("write", scores)
    if not ((write.abs() <= LARGEST_SCORE) | write.isnan().all(dim=(1, 2), keepdim=True)).all():
        raise ValueError("its write scores are no such numbers")
    for part in ("kind", "family"):
        if ((tensors[part] < 0) | (tensors[part] >= len(names))).any():
            raise ValueError(f"a {part} has no name")
    settings = key.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    for part, known in (("kind", settings.get("kinds", KINDS)), ("family", settings.get("families"))):
        found = [names[number] for number in tensors[part].unique().tolist()]
        if isinstance(known, list | tuple) and any(name not in known for name in found):
            raise ValueError(f"a {part} is none that this run asks")


def _results_of(tensors: dict[str, torch.Tensor], names: list[str]) -> Results:
    by_context: Results = {}
    columns = (tensors[name].tolist() for name in ("context", "kind", "family", "answered"))
    count = len(tensors["scores"])
    writes = (
        [None if each.isnan().all() else each for each in tensors["write"]] if "write" in tensors else [None] * count
    )
    rows = zip(zip(*columns, strict=True), tensors["scores"], writes, strict=True)
    for (context, kind, family, answered), scores, write in rows:
        by_context.setdefault(context, []).append(ProbeResult(names[kind], names[family], answered, scores, write))
    return by_context
