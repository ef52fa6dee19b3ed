"""What one file of somebody else's scores comes to: scores of query heads, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.head_profile import HeadProfile

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape


@dataclass(frozen=True, eq=False)
class ImportedScores:
    """The scores of one file.

    Attributes:
        scores: float32 `[L, H]`, zero or more.
        remarks: sentences about what has been made of what the file says.
        standard_errors: float32 `[L, H]`; `None` where unknown.
        interval: both ends of 95 % intervals, float32 `[L, H]` each; `None` where unknown.
        probes: results that a score is the mean of; 0 where unknown.
        distinct: how many of those differ, if some are alike.
        kept_shares: learned budgets, float32 `[S, L, K]` (see `headprof.profile.kept_shares`), if the file has any.
        model: what the file calls its model, if it does.
    """

    scores: Tensor
    remarks: tuple[str, ...] = ()
    standard_errors: Tensor | None = None
    interval: tuple[Tensor, Tensor] | None = None
    probes: int = 0
    distinct: int | None = None
    kept_shares: Tensor | None = None
    model: str | None = None


def of_kv_heads(
    table: Tensor, shape: HeadShape, remarks: tuple[str, ...] = (), kept_shares: Tensor | None = None
) -> ImportedScores:
    """Scores of KV heads `[L, K]` as those of query heads: each stands for all that share the KV head."""
    if shape.group_size > 1:
        said = f"A score is of a KV head, and stands for each of the {shape.group_size} query heads that share it."
        remarks = (said, *remarks)
    return ImportedScores(table.float().repeat_interleave(shape.group_size, dim=1), remarks, kept_shares=kept_shares)


def of_results(values: Tensor, remarks: tuple[str, ...] = (), model: str | None = None) -> ImportedScores:
    """The mean of every probe's results, with errors and 95 % bootstrap intervals from their spread.

    Equal results are drawn together. What is below zero counts as zero: a mean, or the end of an interval.

    Args:
        values: float64 `[L, H, N]`.
        remarks, model: as in `ImportedScores`.
    """
    from headprof.utils.bootstrap import bootstrap_interval, standard_error

    probes = values.flatten(0, 1).T  # [N, L * H]
    results, result_of = probes.unique(dim=0, return_inverse=True)
    errors = interval = None
    if len(results) > 1:
        clusters = result_of.tolist()
        errors = standard_error(probes, clusters).view(values.shape[:2])
        low, high = (end.view(values.shape[:2]).clamp(min=0) for end in bootstrap_interval(probes, clusters))
        interval = low, high
    return ImportedScores(
        scores=values.mean(dim=-1).float().clamp(min=0),
        remarks=remarks,
        standard_errors=errors,
        interval=interval,
        probes=len(probes) if len(probes) > 1 else 0,
        distinct=len(results) if len(results) < len(probes) else None,
        model=model,
    )


def to_profile(
    imported: Mapping[str, ImportedScores], paths: Mapping[str, Path], model_name: str, shape: HeadShape
) -> HeadProfile:
    """A profile of one file's scores for each kind; both kinds may be of the same file.

    Args:
        imported, paths: by kind; the same object where the file is the same.
        model_name: what the profile records as its model.
        shape: of that model.

    Raises:
        ProfileError: two files hold learned budgets.
    """
    learned = {id(each): each.kept_shares for each in imported.values() if each.kept_shares is not None}
    if len(learned) > 1:
        raise ProfileError("Both files hold learned budgets, of which a profile has one set: import them one by one.")
    metadata = {"imported_from": ", ".join(dict.fromkeys(Path(path).name for path in paths.values()))}
    if distinct := {kind: each.distinct for kind, each in imported.items() if each.distinct is not None}:
        metadata["distinct_results"] = ", ".join(f"{kind} {count}" for kind, count in distinct.items())
    return HeadProfile(
        model_name=model_name,
        shape=shape,
        scores={kind: each.scores for kind, each in imported.items()},
        standard_errors={
            kind: each.standard_errors for kind, each in imported.items() if each.standard_errors is not None
        },
        probes_used={kind: each.probes for kind, each in imported.items() if each.probes},
        metadata=metadata,
        intervals={kind: each.interval for kind, each in imported.items() if each.interval is not None},
        kept_shares=next(iter(learned.values()), None),
    )
