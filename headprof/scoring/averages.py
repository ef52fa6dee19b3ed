"""From the results of probes to a head profile: means over those that count, and how sure they are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from headprof.errors import ProbeError
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.prober import ProbeResult
from headprof.utils.bootstrap import bootstrap_interval, standard_error
from headprof.utils.run_record import library_versions, today

MIN_COUNTED = 8
"""Fewest answered probes of a kind from which a profile is made."""

SEED_OF_RESAMPLES = 0

Counted = tuple[torch.Tensor, list[int]]
"""Scores float32 `[n, L * H]` of the probes that count, and the cluster of each."""


def counted_values(results: Sequence[ProbeResult], clusters: Sequence[int], include_failed: bool) -> dict[str, Counted]:
    """Of each kind of probe, retrieval first, the scores of those that count."""
    counted = _counted(results, clusters, include_failed)
    kinds = sorted({result.kind for result in results}, reverse=True)
    return {kind: _stacked([(each.scores, at) for each, at in counted if each.kind == kind]) for kind in kinds}


def counted_writes(results: Sequence[ProbeResult], clusters: Sequence[int], include_failed: bool) -> Counted:
    """The write scores of the probes that count, of all kinds, where they are known."""
    counted = _counted(results, clusters, include_failed)
    return _stacked([(each.write, at) for each, at in counted if each.write is not None])


def _counted(
    results: Sequence[ProbeResult], clusters: Sequence[int], include_failed: bool
) -> list[tuple[ProbeResult, int]]:
    pairs = zip(results, clusters, strict=True)
    return [(result, cluster) for result, cluster in pairs if result.answered or include_failed]


def _stacked(pairs: Sequence[tuple[torch.Tensor, int]]) -> Counted:
    rows = [scores.flatten() for scores, _ in pairs]
    return torch.stack(rows) if rows else torch.zeros(0, 0), [cluster for _, cluster in pairs]


@dataclass(frozen=True, eq=False)
class Mean:
    """Scores averaged over what counts, and how sure they are.

    Attributes:
        scores: float32 `[L, H]`, none below zero.
        error: standard errors, float32 `[L, H]`; `None` where all values are of one cluster.
        interval: the ends of the 95 % bootstrap intervals, float32 `[L, H]` each; `None` likewise.
    """

    scores: torch.Tensor
    error: torch.Tensor | None = None
    interval: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, values: torch.Tensor, clusters: Sequence[int], grid: tuple[int, int]) -> Mean:
        """The mean of values `[n, L * H]` of some clusters."""
        scores = values.mean(dim=0).view(grid).clamp(min=0)
        if len(set(clusters)) < 2:
            return cls(scores)
        low, high = bootstrap_interval(values, clusters, SEED_OF_RESAMPLES)
        ends = low.view(grid).clamp(min=0), high.view(grid).clamp(min=0)
        return cls(scores, standard_error(values, clusters).view(grid), ends)


def make_profile(
    loaded: LoadedModel,
    settings: ProbeSettings,
    results: Sequence[ProbeResult],
    include_failed: bool = False,
    *,
    clusters: Sequence[int] | None = None,
    decode: str = "teacher",
    stop: dict | None = None,
    command: str = "",
    no_write: str = "",
) -> HeadProfile:
    """Average the counted probes of each kind into a profile, with standard errors and intervals of the mean.

    These stay unknown where all probes share one context, which says nothing of others. Write scores are averaged over
    the probes of both kinds; where a head writes against the answer on average, a profile says zero.

    Args:
        loaded, settings, decode, stop, command: noted in the profile.
        no_write: why the profile has no write scores, if it has none; noted in it too.
        results: of all probes.
        include_failed: let probes count that were answered wrongly.
        clusters: which context each probe belongs to; `None` if each has its own.

    Raises:
        ProbeError: fewer than `MIN_COUNTED` probes of a kind count.
    """
    if clusters is None:
        clusters = range(len(results))
    counted = counted_values(results, clusters, include_failed)
    for kind, (values, _) in counted.items():
        asked = sum(result.kind == kind for result in results)
        if len(values) < min(MIN_COUNTED, asked) or not len(values):
            raise ProbeError(
                f"The model answered {len(values)} of {asked} {kind} probes, too few for a profile: try shorter "
                "--lengths, more --probes or easier needles, or count failed ones too with --resume --include-failed; "
                "--reconstruction --no-probes needs none."
            )
    writes = counted_writes(results, clusters, include_failed)
    if len(writes[0]) >= min(MIN_COUNTED, max(1, len(results))):
        counted["write"] = writes
        no_write = ""
    means = {kind: Mean.of(*each, (loaded.shape.num_layers, loaded.shape.num_heads)) for kind, each in counted.items()}
    noted = {"decode": decode, "include_failed": include_failed, "asked": len(results)}
    return HeadProfile(
        model_name=loaded.name,
        shape=loaded.shape,
        given=loaded.given,
        scores={kind: mean.scores for kind, mean in means.items()},
        standard_errors={kind: mean.error for kind, mean in means.items() if mean.error is not None},
        intervals={kind: mean.interval for kind, mean in means.items() if mean.interval is not None},
        probes_used={kind: len(values) for kind, (values, _) in counted.items()},
        metadata={
            "settings": json.dumps(asdict(settings) | noted | ({} if stop is None else {"until_stable": stop})),
            "seed": str(settings.seed),
            "accuracy": json.dumps(family_accuracy(results)),
            "versions": json.dumps(library_versions()),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "date": today(),
            "command": command,
        }
        | ({"no_write_scores": no_write} if no_write else {}),
    )


def family_accuracy(results: Sequence[ProbeResult]) -> dict[str, list[int]]:
    """Probes answered and probes asked, per family: `{"family": [answered, asked]}`."""
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in results:
        tally[result.family][0] += result.answered
        tally[result.family][1] += 1
    return dict(sorted(tally.items()))
