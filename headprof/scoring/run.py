"""A scoring run: probes through the model, results kept on disk, a head profile at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from headprof._version import __version__
from headprof.errors import ProbeError, UsageError
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import Prober, ProbeResult
from headprof.utils.bootstrap import bootstrap_interval, expected_change, standard_error
from headprof.utils.resuming import KeptResults
from headprof.utils.run_record import library_versions, today
from headprof.utils.team import Team

MIN_COUNTED = 8
"""Fewest answered probes of a kind from which a profile is made."""

ROUND = 4
"""Groups of contexts between two looks at the ranking, and between two meetings of a team."""

_SEED_OF_RESAMPLES = 0


@dataclass(frozen=True)
class Preset:
    """How much work a scoring run does.

    Attributes:
        probes: number of probes, retrieval and reasoning together.
        lengths: context lengths in tokens.
    """

    probes: int
    lengths: tuple[int, ...]


PRESETS = {
    "quick": Preset(432, (1024,)),
    "standard": Preset(1440, (1024, 2048)),
    "thorough": Preset(7200, (1024, 2048, 4096)),
}


@dataclass(frozen=True)
class StopRule:
    """When a run has seen enough: of the `top` heads of each kind, other probes would change no more than `tolerance`.

    What they would change is estimated by resampling the contexts seen so far (`expected_change`).
    """

    top: int = 10
    tolerance: float = 0.05

    def check(self) -> None:
        """
        Raises:
            UsageError: `top` is not positive, or `tolerance` is not a share between 0 and 1.
        """
        if self.top < 1 or not 0 < self.tolerance < 1:
            raise UsageError(
                f"A ranking of {self.top} heads cannot be stable to {self.tolerance:g}: give at least 1 head and a "
                "share of them between 0 and 1, such as 0.05."
            )


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        done: probes done.
        total: of how many.
        answered: how many of those done were answered right.
        change: with a `StopRule`, the share of each kind's top heads that other probes would change; may be empty.
    """

    done: int
    total: int
    answered: int
    change: dict[str, float]


def score_heads(
    loaded: LoadedModel,
    builder: ProbeBuilder,
    *,
    decode: str = "teacher",
    include_failed: bool = False,
    results_path: Path | None = None,
    resume: bool = False,
    stop: StopRule | None = None,
    team: Team | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    command: str = "",
) -> HeadProfile:
    """Score every head of a model on a builder's probes.

    The outcome depends on the model and the settings alone, not on interruptions or on how many processes share the
    work.

    Args:
        loaded: the model.
        builder: makes the probes.
        decode: `"teacher"` or `"greedy"`, see `Prober`.
        include_failed: let probes count that the model answered wrongly.
        results_path: where the results of each probe are kept, written every ten seconds, when interrupted, and at the
            end; a run for more probes begins with them.
        resume: begin with what `results_path` holds, if it is there.
        stop: end as soon as the ranking is stable; the builder's probes are the most that are asked.
        team: the processes that share the work; each must call this with the same arguments.
        on_progress: called after each group of contexts, by process 0.
        command: written into the profile, so that it says how it was made.

    Raises:
        ProbeError: fewer than `MIN_COUNTED` probes of a kind were answered.
        UsageError: `results_path` is of a run with other settings, `decode` is neither of the two, or `stop` asks for
            something impossible.
        InterruptedRun: Ctrl-C; what there is has been written.
    """
    if decode not in ("teacher", "greedy"):
        raise UsageError(f"There is no way to decode called {decode!r}: choose teacher or greedy.")
    if stop is not None:
        stop.check()
    run = _Run(loaded, builder, decode, include_failed, stop, team or Team(), on_progress, results_path)
    run.kept.start(resume, run.team)
    with run.kept.keeping():  # saved before there is a profile: --resume --include-failed need not run the model again
        contexts = run.work()
    return make_profile(
        loaded,
        builder.settings,
        run.results_of(contexts),
        include_failed,
        clusters=clusters_of(builder, contexts),
        decode=decode,
        stop=None if stop is None else asdict(stop) | {"change": run.change, "stable": run.is_stable},
        command=command,
    )


class _Run:
    """The work of `score_heads` while it lasts."""

    def __init__(
        self,
        loaded: LoadedModel,
        builder: ProbeBuilder,
        decode: str,
        include_failed: bool,
        stop: StopRule | None,
        team: Team,
        on_progress: Callable[[Progress], None],
        results_path: Path | None,
    ):
        self.loaded, self.builder, self.decode, self.team = loaded, builder, decode, team
        self.include_failed, self.stop, self.on_progress = include_failed, stop, on_progress
        file = ProbesFile(results_path) if results_path is not None and team.rank == 0 else None
        self.kept: KeptResults[int, list[ProbeResult]] = KeptResults(run_key(loaded, builder.settings, decode), file)
        self.change: dict[str, float] = {}

    @property
    def is_stable(self) -> bool:
        return self.stop is not None and bool(self.change) and max(self.change.values()) <= self.stop.tolerance

    def work(self) -> list[int]:
        """Ask all probes, or as many as it takes; the contexts whose results count, in order."""
        groups, done = self.builder.groups(), 0
        with Prober(self.loaded.model, self.loaded.shape, self.decode, self.loaded.tokenizer) as prober:
            while done < len(groups) and not self.is_stable:
                self._round(prober, groups[:done], groups[done : done + ROUND])
                done = min(done + ROUND, len(groups))
                if self.stop is not None:
                    self.change = self._expected_changes(groups[:done])
                self._report(groups[:done])
        return list(chain.from_iterable(groups[:done]))

    def results_of(self, contexts: Iterable[int]) -> list[ProbeResult]:
        """Results of these contexts, in order."""
        return [result for context in contexts for result in self.kept.results[context]]

    def _round(self, prober: Prober, before: Sequence[range], groups: Sequence[range]) -> None:
        """Ask the probes of `groups`, those that have no results yet, and tell all processes of the outcome."""
        missing = [group for group in groups if not self._has(group)]
        mine: dict[int, list[ProbeResult]] = {}
        for group in self.team.claim(missing):
            new = {context: prober.run(self.builder.context(context), anew=context == group.start) for context in group}
            self.kept.add(new)
            mine |= new
            self._report([*before, *filter(self._has, groups)])
        for theirs in self.team.gather(mine):
            self.kept.add(theirs)

    def _has(self, group: range) -> bool:
        return all(len(self.kept.results.get(context, ())) == self.builder.count(context) for context in group)

    def _report(self, groups: Sequence[range]) -> None:
        if self.team.rank == 0:
            results = self.results_of(chain.from_iterable(groups))
            answered = sum(result.answered for result in results)
            self.on_progress(Progress(len(results), self.builder.settings.probes, answered, self.change))

    def _expected_changes(self, groups: Sequence[range]) -> dict[str, float]:
        """`expected_change` of each kind's top heads; empty while a kind has too few counted probes or contexts."""
        assert self.stop is not None
        changes = {}
        contexts = list(chain.from_iterable(groups))
        values = counted_values(self.results_of(contexts), clusters_of(self.builder, contexts), self.include_failed)
        for kind, (scores, clusters) in values.items():
            if len(scores) < MIN_COUNTED or len(set(clusters)) < MIN_COUNTED:
                return {}
            changes[kind] = expected_change(scores, clusters, self.stop.top, _SEED_OF_RESAMPLES)
        return changes


def clusters_of(builder: ProbeBuilder, contexts: Sequence[int]) -> list[int]:
    """For each probe of `contexts`, the number of the filler that it shares with others."""
    return [context // builder.group_size for context in contexts for _ in range(builder.count(context))]


def run_key(loaded: LoadedModel, settings: ProbeSettings, decode: str) -> dict[str, Any]:
    """Everything that a probe's result depends on, as JSON has it; how many are asked is left out."""
    depends = {name: value for name, value in asdict(settings).items() if name != "probes"}
    return {
        "version": __version__,
        "model": loaded.name,
        "fingerprint": loaded.shape.to_dict(),
        "dtype": str(loaded.model.dtype),
        "settings": json.loads(json.dumps(depends)),  # without tuples
        "decode": decode,
    }


def counted_values(
    results: Sequence[ProbeResult], clusters: Sequence[int], include_failed: bool
) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """Of each kind, retrieval first, the scores float32 `[n, L * H]` of the probes that count, and their clusters."""
    values = {}
    for kind in sorted({result.kind for result in results}, reverse=True):
        counted = [
            (result.scores.flatten(), cluster)
            for result, cluster in zip(results, clusters, strict=True)
            if result.kind == kind and (result.answered or include_failed)
        ]
        rows = [scores for scores, _ in counted]
        values[kind] = (torch.stack(rows) if rows else torch.zeros(0, 0), [cluster for _, cluster in counted])
    return values


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
) -> HeadProfile:
    """Average the counted probes of each kind into a profile, with standard errors and intervals of the mean.

    These stay unknown where all probes share one context, which says nothing of others.

    Args:
        loaded, settings, decode, stop, command: noted in the profile.
        results: of all probes.
        include_failed: let probes count that were answered wrongly.
        clusters: which context each probe belongs to; `None` if each has its own.

    Raises:
        ProbeError: fewer than `MIN_COUNTED` probes of a kind count.
    """
    scores: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    intervals: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    counted_probes: dict[str, int] = {}
    grid = (loaded.shape.num_layers, loaded.shape.num_heads)
    if clusters is None:
        clusters = range(len(results))
    for kind, (values, of_values) in counted_values(results, clusters, include_failed).items():
        asked = sum(result.kind == kind for result in results)
        if len(values) < min(MIN_COUNTED, asked) or not len(values):
            raise ProbeError(
                f"The model answered {len(values)} of {asked} {kind} probes, too few for a profile: try shorter "
                "--lengths, more --probes or easier needles, or count failed ones too with --resume --include-failed."
            )
        scores[kind] = values.mean(dim=0).view(grid)
        if len(set(of_values)) > 1:
            errors[kind] = standard_error(values, of_values).view(grid)
            low, high = bootstrap_interval(values, of_values, _SEED_OF_RESAMPLES)
            intervals[kind] = (low.view(grid), high.view(grid))
        counted_probes[kind] = len(values)
    noted = {"decode": decode, "include_failed": include_failed, "asked": len(results)}
    return HeadProfile(
        model_name=loaded.name,
        shape=loaded.shape,
        scores=scores,
        standard_errors=errors,
        intervals=intervals,
        probes_used=counted_probes,
        metadata={
            "settings": json.dumps(asdict(settings) | noted | ({} if stop is None else {"until_stable": stop})),
            "seed": str(settings.seed),
            "accuracy": json.dumps(family_accuracy(results)),
            "versions": json.dumps(library_versions()),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "date": today(),
            "command": command,
        },
    )


def family_accuracy(results: Sequence[ProbeResult]) -> dict[str, list[int]]:
    """Probes answered and probes asked, per family: `{"family": [answered, asked]}`."""
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in results:
        tally[result.family][0] += result.answered
        tally[result.family][1] += 1
    return dict(sorted(tally.items()))
