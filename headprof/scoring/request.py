"""What `headprof score` is asked for, checked before any model work, and carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.probes.families import choose_families
from headprof.probes.haystack import Haystack
from headprof.probes.needles import load_needles
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.probe_results import results_path
from headprof.scoring.reconstruction import with_learned_of
from headprof.scoring.run import PRESETS, Progress, StopRule, kept_results, score_heads
from headprof.utils.files import check_writable, remove_leftovers
from headprof.utils.team import Team

_DEPTHS_PER_FILLER = 8


@dataclass(frozen=True)
class ScoreRequest:
    """The options of a scoring run; `None` leaves one to the preset, and `pack` to the length."""

    preset: str
    probes: int | None = None
    lengths: tuple[int, ...] | None = None
    needles: Path | None = None
    families: tuple[str, ...] | None = None
    haystack: Path | None = None
    pack: int | None = None
    seed: int = 0
    decode: str = "teacher"
    include_failed: bool = False
    stop: StopRule | None = None

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: an unknown preset or needle family, a needle file or haystack folder that cannot be read, or an
                impossible `stop`.
        """
        if self.preset not in PRESETS:
            raise UsageError(f"There is no preset {self.preset!r}: choose one of {', '.join(PRESETS)}.")
        if self.stop is not None:
            self.stop.check()
        if self.needles is not None:
            if self.families:
                raise UsageError("Needles from a file are of no built-in family: leave --families or --needles away.")
            load_needles(self.needles)
        choose_families(self.families)
        if self.haystack is not None:
            Haystack.from_folder(self.haystack)

    def settings(self) -> ProbeSettings:
        """What probes to build. Needles from a file stand alone, since two of them may name the same things."""
        preset = PRESETS[self.preset]
        pack = 1 if self.needles is not None else self.pack
        return ProbeSettings(
            probes=self.probes or preset.probes,
            lengths=self.lengths or preset.lengths,
            families=None if not self.families else tuple(each.name for each in choose_families(self.families)),
            needles_per_context=pack,
            depths_per_filler=_DEPTHS_PER_FILLER if pack == 1 else 1,
            seed=self.seed,
            split="profile",
        )


def build_probes(loaded: LoadedModel, request: ScoreRequest) -> ProbeBuilder:
    """The builder of a run's probes.

    Raises:
        UsageError: the probes do not fit the model's context, or the needles not the length.
    """
    return ProbeBuilder(
        loaded.tokenizer,
        request.settings(),
        max_positions=loaded.max_positions,
        needles=load_needles(request.needles) if request.needles else None,
        haystack=Haystack.from_folder(request.haystack) if request.haystack else None,
    )


def starting_anew(loaded: LoadedModel, builder: ProbeBuilder, target: Path, decode: str) -> str:
    """A remark on what `resume` would take from this very run of before; empty if there is nothing."""
    return kept_results(loaded, builder, decode, results_path(target)).starting_anew()


def score_to_file(
    loaded: LoadedModel,
    builder: ProbeBuilder,
    request: ScoreRequest,
    target: Path,
    *,
    resume: bool,
    command: str,
    team: Team | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    learned: HeadProfile | None = None,
) -> HeadProfile:
    """Score, and write the profile; the results of each probe are kept beside it, in `NAME.probes.safetensors`.

    What the profile `learned` of the same model has from repetition stays in it.
    """
    team = team or Team()
    if team.rank == 0:
        for file in (target, results_path(target)):
            check_writable(file)
    profile = score_heads(
        loaded,
        builder,
        decode=request.decode,
        include_failed=request.include_failed,
        results_path=results_path(target),
        resume=resume,
        stop=request.stop,
        team=team,
        on_progress=on_progress,
        command=command,
    )
    if learned is not None:
        profile = with_learned_of(profile, learned)
    if team.rank == 0:
        remove_leftovers(target)
        profile.save(target)
    return profile
