"""The file of a run that measures influence curves, answer by answer, so that an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.influence import MOST_POINTS
from headprof.tuning.asked import AnswerLosses
from headprof.tuning.exams import KINDS
from headprof.utils.records import parse_object
from headprof.utils.resuming import Earlier, Words
from headprof.utils.tensor_files import Stored, TensorFile, is_altered, open_tensors
from headprof.utils.tensor_results import TensorResults

FORMAT = "headprof.curves"
_LARGEST_FILE = 2**33
_MEND = "delete that file, or run without --resume"

Results = dict[int, list[AnswerLosses]]
"""Of each exam, by its number, what its answers lose."""


class CurvesFile(TensorResults[AnswerLosses]):
    """A safetensors file: `divergence` and `drop` `[n, L, K, N]`, `base` `[n, 2]`, and of each answer its exam, kind
    and cluster.

    A `ResultsFile`.
    """

    words = Words("influence curves", "of", "answers", "file")

    def read(self) -> Earlier[int, list[AnswerLosses]]:
        """What the file holds; raises `UsageError` when it is damaged, altered or cannot be read."""
        try:
            with open_tensors(self.path, "results", _MEND, ValueError) as file:
                metadata, key = file.metadata, parse_object(file.metadata.get("key", ""))
                _check_stored(file, key)
                tensors = file.read_all()
            _check_numbers(tensors)
        except ValueError as error:
            raise UsageError(f"The results in {self.path} cannot be read: {_MEND}.") from error
        if is_altered(tensors, metadata):
            raise UsageError(f"The results in {self.path} have been altered since they were written: {_MEND}.")
        return Earlier(key, _results_of(tensors))

    def stored(self, results: list[tuple[int, AnswerLosses]]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            "divergence": torch.stack([answer.divergence for _, answer in results]),
            "drop": torch.stack([answer.drop for _, answer in results]),
            "base": torch.stack([answer.base for _, answer in results]),
            "exam": torch.tensor([exam for exam, _ in results]),
            "kind": torch.tensor([KINDS.index(answer.kind) for _, answer in results]),
            "cluster": torch.tensor([answer.cluster for _, answer in results]),
        }
        return tensors, {"format": FORMAT}


def curve_results_path(profile: Path, situation: str) -> Path:
    """Where what curves were made from is kept: `NAME.curves-known.safetensors` beside `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}.curves-{situation}.safetensors")


def _check_stored(file: TensorFile, key: dict[str, Any]) -> None:
    """Look at types and sizes before anything is read; raises `ValueError` when they are not a run's."""
    divergence = file.stored.get("divergence", Stored("", ()))
    count, grid = divergence.shape[:1], divergence.shape[1:]
    if "fingerprint" in key and len(grid) == 3:
        shape = HeadShape.from_dict(key["fingerprint"])
        grid = (shape.num_layers, shape.num_kv_heads, *grid[2:])
    numbers, losses = Stored("I64", count), Stored("F32", (*count, *grid))
    wanted = {"divergence": losses, "drop": losses, "base": Stored("F32", (*count, 2))}
    wanted |= {"exam": numbers, "kind": numbers, "cluster": numbers}
    if file.stored != wanted or len(grid) != 3 or grid[2] > MOST_POINTS or file.size > _LARGEST_FILE:
        raise ValueError("its tensors are not those of answers")


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    """Look at the numbers; raises `ValueError` when they are none of losses, exams and kinds."""
    if any(not bool((tensors[name].abs() <= LARGEST_SCORE).all()) for name in ("divergence", "drop", "base")):
        raise ValueError("its losses are not finite")
    if bool((tensors["exam"] < 0).any()) or bool(((tensors["kind"] < 0) | (tensors["kind"] >= len(KINDS))).any()):
        raise ValueError("its exams or kinds are none")


def _results_of(tensors: dict[str, Tensor]) -> Results:
    by_exam: Results = {}
    numbers = zip(*(tensors[name].tolist() for name in ("exam", "kind", "cluster")), strict=True)
    losses = zip(*(tensors[name] for name in ("divergence", "drop", "base")), strict=True)
    for (exam, kind, cluster), (divergence, drop, base) in zip(numbers, losses, strict=True):
        by_exam.setdefault(exam, []).append(AnswerLosses(KINDS[kind], cluster, divergence, drop, base))
    return by_exam
