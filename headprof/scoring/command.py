"""What `headprof score` is asked for, checked before any model work, and carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headprof.errors import UsageError
from headprof.models import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.probes.haystack import Haystack
from headprof.probes.needles import load_needles
from headprof.profile import HeadProfile, profile_filename
from headprof.scoring.run import PRESETS, Progress, score_heads


@dataclass(frozen=True)
class ScoreRequest:
    """The options of a scoring run that shape its probes; `None` leaves one to the preset."""

    preset: str
    probes: int | None
    lengths: tuple[int, ...] | None
    needles: Path | None
    haystack: Path | None
    pack: int | None
    seed: int

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: an unknown preset, or a needle file or haystack folder that cannot be read.
        """
        if self.preset not in PRESETS:
            raise UsageError(f"There is no preset {self.preset!r}: choose one of {', '.join(PRESETS)}.")
        if self.needles is not None:
            load_needles(self.needles)
        if self.haystack is not None:
            Haystack.from_folder(self.haystack)


def build_probes(loaded: LoadedModel, request: ScoreRequest) -> ProbeBuilder:
    """The builder of a run's probes.

    Raises:
        UsageError: the probes do not fit the model's context, or the needles not the length.
    """
    preset = PRESETS[request.preset]
    needles = load_needles(request.needles) if request.needles else None
    pack = request.pack or preset.needles_per_context
    if needles is not None:
        pack = request.pack or 1  # other people's needles may name the same things
    settings = ProbeSettings(
        probes=request.probes or preset.probes,
        lengths=request.lengths or preset.lengths,
        needles_per_context=pack,
        seed=request.seed,
        split="profile",
    )
    return ProbeBuilder(
        loaded.tokenizer,
        settings,
        max_positions=loaded.max_positions,
        needles=needles,
        haystack=Haystack.from_folder(request.haystack) if request.haystack else None,
    )


def default_output(name: str) -> Path:
    """Where a model's profile goes when nothing is said: `./profiles/MODEL.safetensors`."""
    return Path("profiles") / profile_filename(name)


def score_to_file(
    loaded: LoadedModel,
    builder: ProbeBuilder,
    target: Path,
    *,
    decode: str,
    include_failed: bool,
    resume: bool,
    command: str,
    on_progress: Callable[[Progress], None],
) -> HeadProfile:
    """Score, and write the profile; what an interrupted run has done stays in `TARGET.partial`."""
    profile = score_heads(
        loaded,
        builder,
        decode=decode,
        include_failed=include_failed,
        partial_file=target.with_name(target.name + ".partial"),
        resume=resume,
        on_progress=on_progress,
        command=command,
    )
    profile.save(target)
    return profile
