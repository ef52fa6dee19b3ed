"""A scoring run: probes through the model, results kept on disk, a head profile at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from headprof._version import __version__
from headprof.errors import UsageError
from headprof.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.averages import MIN_COUNTED, SEED_OF_RESAMPLES, counted_values, make_profile
from headprof.scoring.passes import Passes
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import Prober, ProbeResult
from headprof.utils.bootstrap import expected_change
from headprof.utils.resuming import KeptResults
from headprof.utils.team import Team

ROUND = 4
"""Groups of contexts between two looks at the ranking, and, at least, between two meetings of a team."""


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
    together: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    command: str = "",
) -> HeadProfile:
    """Score every head of a model on a builder's probes.

    The outcome depends on the model and the settings alone, not on interruptions or on how many processes share the
    work; where contexts share passes, as on a GPU, but for rounding.

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
        together: contexts of one length that share a forward pass; `None` for `Prober.most_together`.
        on_progress: called after each pass, by process 0.
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
    run = _Run(loaded, builder, decode, include_failed, stop, team or Team(), together, on_progress, results_path)
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
        no_write=run.no_write,
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
        together: int | None,
        on_progress: Callable[[Progress], None],
        results_path: Path | None,
    ):
        self.loaded, self.builder, self.decode, self.team = loaded, builder, decode, team
        self.include_failed, self.stop, self.on_progress = include_failed, stop, on_progress
        self.together = together
        self.kept = kept_results(loaded, builder, decode, results_path if team.rank == 0 else None)
        self.change: dict[str, float] = {}
        self.no_write = "The results kept from before hold no write scores, which a run without --resume finds."
        """Why no probe has write scores, where none has."""

    @property
    def is_stable(self) -> bool:
        return self.stop is not None and bool(self.change) and max(self.change.values()) <= self.stop.tolerance

    def work(self) -> list[int]:
        """Ask all probes, or as many as it takes; the contexts whose results count, in order."""
        groups, done = self.builder.groups(), 0
        with Prober(self.loaded.model, self.loaded.shape, self.decode, self.loaded.tokenizer) as prober:
            passes = Passes.settled(self.builder, prober, self.team, self.together)
            size = ROUND if self.stop is not None else max(ROUND, passes.enough)
            while done < len(groups) and not self.is_stable:
                self._round(passes, groups[:done], groups[done : done + size])
                done = min(done + size, len(groups))
                if self.stop is not None:
                    self.change = self._expected_changes(groups[:done])
                self._report(groups[:done])
        return list(chain.from_iterable(groups[:done]))

    def results_of(self, contexts: Iterable[int]) -> list[ProbeResult]:
        """Results of these contexts, in order."""
        return [result for context in contexts for result in self.kept.results[context]]

    def _round(self, passes: Passes, before: Sequence[range], groups: Sequence[range]) -> None:
        """Ask the probes of `groups`, those that have no results yet, and tell all processes of the outcome."""
        missing = [group for group in groups if not self._has(group)]
        mine: dict[int, list[ProbeResult]] = {}
        if missing and isinstance(path := passes.prober.write_path(), str):
            self.no_write = path
        for contexts in self.team.claim(passes.of(missing)):
            new = passes.ask(contexts)
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
            changes[kind] = expected_change(scores, clusters, self.stop.top, SEED_OF_RESAMPLES)
        return changes


def clusters_of(builder: ProbeBuilder, contexts: Sequence[int]) -> list[int]:
    """For each probe of `contexts`, the number of the filler that it shares with others."""
    return [context // builder.group_size for context in contexts for _ in range(builder.count(context))]


def kept_results(
    loaded: LoadedModel, builder: ProbeBuilder, decode: str, path: Path | None
) -> KeptResults[int, list[ProbeResult]]:
    """What a run has found so far, and the file, if there is a path, in which that is kept."""
    key = run_key(loaded, builder, decode)
    return KeptResults(key, None if path is None else ProbesFile(path), unsaid=_UNSAID)


_UNSAID = ("weights", "tokenizer", "needles and haystack")
"""Entries of `run_key` that the first files did not have."""


def run_key(loaded: LoadedModel, builder: ProbeBuilder, decode: str) -> dict[str, Any]:
    """Everything that a probe's result depends on, as JSON has it; how many are asked is left out."""
    depends = {name: value for name, value in asdict(builder.settings).items() if name != "probes"}
    return {
        "version": __version__,
        "model": loaded.name,
        "fingerprint": loaded.shape.to_dict(),
        "dtype": str(loaded.model.dtype),
        "weights": weights_fingerprint(loaded.model),
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "needles and haystack": builder.texts,
        "settings": json.loads(json.dumps(depends)),  # without tuples
        "decode": decode,
    }
