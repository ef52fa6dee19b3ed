"""LOCOS scores (Gema et al. 2026, arXiv 2607.01002): what a query head writes towards the answer from the needle.

`retrieval_heads/*_logit_contrib_*.json`: `{"meta": {...}, "scores": {"layer-head": [score per probe, ...]}}`, or the
scores alone as in the papers' JSON. A score is negative where more is written from beside the needle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.head_table import check_grid
from headprof.profile.imported_scores import ImportedScores, of_results
from headprof.profile.papers_json import parse_samples, read_json
from headprof.utils.records import plain

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape


def locos_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """The mean over the probes, with errors and intervals from their spread; a mean below zero counts as zero.

    Raises:
        ProfileError: the file is malformed, or its layers and heads are not the model's.
    """
    table, meta = _read(path)
    if isinstance(table, dict) and table and all(values == [] for values in table.values()):
        raise ProfileError(f"{path} holds the scores of no probe at all: give a file of probes that were answered.")
    samples = parse_samples(path, table, least=-LARGEST_SCORE)
    check_grid(path, samples.shape[:2], shape)
    negative = int((samples.mean(dim=-1) < 0).sum())
    remarks = (f"{negative} heads whose mean is below zero get 0.",) if negative else ()
    return of_results(samples, remarks, _model(meta))


def named_model(path: Path) -> str | None:
    """What the file calls its model, if it does; raises `ProfileError` when it is no JSON."""
    return _model(_read(path)[1])


def _read(path: Path) -> tuple[Any, Any]:
    """The scores, and what is said about them, `None` for nothing."""
    table = read_json(path)
    if isinstance(table, dict) and "scores" in table:
        return table["scores"], table.get("meta")
    return table, None


def _model(meta: Any) -> str | None:
    model = meta.get("model") if isinstance(meta, dict) else None
    return plain(model, 200) if isinstance(model, str) else None
