"""A scoring run: probes through the model, partial results kept on disk, a head profile at the end."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from headprof import __version__
from headprof.errors import InterruptedRun, ProbeError, UsageError
from headprof.models import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile import HeadProfile
from headprof.scoring.partial import PartialRun
from headprof.scoring.probing import Prober, ProbeResult

MIN_COUNTED = 8
"""Fewest answered probes of a kind from which a profile is made."""

SAVE_EVERY = float(os.environ.get("HEADPROF_SAVE_EVERY", "10"))
"""Seconds between two writes of the partial results."""


@dataclass(frozen=True)
class Preset:
    """How much work a scoring run does.

    Attributes:
        probes: number of probes, retrieval and reasoning together.
        lengths: context lengths in tokens.
        needles_per_context: probes that share one prefill.
    """

    probes: int
    lengths: tuple[int, ...]
    needles_per_context: int


PRESETS = {
    "quick": Preset(432, (1024,), 12),
    "standard": Preset(1440, (1024, 2048), 12),
    "thorough": Preset(7200, (1024, 2048, 4096), 12),
}


@dataclass(frozen=True)
class Progress:
    """Where a run stands: probes done, of how many, and how many of those done were answered right."""

    done: int
    total: int
    answered: int


def score_heads(
    loaded: LoadedModel,
    builder: ProbeBuilder,
    *,
    decode: str = "teacher",
    include_failed: bool = False,
    partial_file: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    command: str = "",
) -> HeadProfile:
    """Score every head of a model on a builder's probes.

    The outcome depends on the model and the builder's settings alone, not on interruptions.

    Args:
        loaded: the model.
        builder: makes the probes.
        decode: `"teacher"` or `"greedy"`, see `Prober`.
        include_failed: let probes count that the model answered wrongly.
        partial_file: where results so far are kept, every ten seconds and when interrupted; removed at the end.
        resume: continue from `partial_file` if it is there.
        on_progress: called after each context.
        command: written into the profile, so that it says how it was made.

    Raises:
        ProbeError: fewer than `MIN_COUNTED` probes of a kind were answered.
        UsageError: `partial_file` is of a run with other settings, or `decode` is neither of the two.
    """
    if decode not in ("teacher", "greedy"):
        raise UsageError(f"There is no way to decode called {decode!r}: choose teacher or greedy.")
    partial = PartialRun.start(partial_file, _run_key(loaded, builder.settings, decode), resume=resume)
    total = builder.settings.probes
    last_save = time.monotonic()
    with Prober(loaded.model, loaded.shape, decode, loaded.tokenizer) as prober:
        try:
            for index in range(len(builder)):
                if index not in partial:
                    partial.add(index, prober.run(builder.context(index)))
                on_progress(Progress(partial.num_probes, total, partial.num_answered))
                if time.monotonic() - last_save > SAVE_EVERY:
                    partial.save()
                    last_save = time.monotonic()
        except KeyboardInterrupt:
            partial.save()
            raise InterruptedRun(_interrupted(partial)) from None
        except BaseException:
            partial.save()
            raise
    try:
        profile = make_profile(
            loaded, builder.settings, partial.results(), include_failed, decode=decode, command=command
        )
    except ProbeError:
        partial.save()  # so that --resume --include-failed need not run the model again
        raise
    partial.remove()
    return profile


def _interrupted(partial: PartialRun) -> str:
    if partial.path is None or not partial.num_probes:
        return "Interrupted before anything was scored."
    return (
        f"Interrupted: the results of {partial.num_probes} probes are kept in {partial.path}; give the same command "
        "with --resume to go on."
    )


def _run_key(loaded: LoadedModel, settings: ProbeSettings, decode: str) -> str:
    """Everything that a probe's result depends on."""
    return json.dumps(
        {
            "version": __version__,
            "model": loaded.name,
            "fingerprint": loaded.shape.to_dict(),
            "dtype": str(loaded.model.dtype),
            "settings": asdict(settings),
            "decode": decode,
        },
        sort_keys=True,
    )


def make_profile(
    loaded: LoadedModel,
    settings: ProbeSettings,
    results: list[ProbeResult],
    include_failed: bool = False,
    *,
    decode: str = "teacher",
    command: str = "",
) -> HeadProfile:
    """Average the counted probes of each kind into a profile, with standard errors of the mean.

    Raises:
        ProbeError: fewer than `MIN_COUNTED` probes of a kind count.
    """
    scores: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    counted_probes: dict[str, int] = {}
    for kind in sorted({result.kind for result in results}, reverse=True):
        of_kind = [result for result in results if result.kind == kind]
        counted = [result.scores for result in of_kind if result.answered or include_failed]
        if len(counted) < min(MIN_COUNTED, len(of_kind)) or not counted:
            raise ProbeError(
                f"The model answered {len(counted)} of {len(of_kind)} {kind} probes, too few for a profile: try "
                "shorter --lengths, more --probes or easier needles, or count failed ones too with "
                "--resume --include-failed."
            )
        values = torch.stack(counted)
        scores[kind] = values.mean(dim=0)
        errors[kind] = values.std(dim=0, correction=min(1, len(counted) - 1)) / len(counted) ** 0.5
        counted_probes[kind] = len(counted)
    return HeadProfile(
        model_name=loaded.name,
        shape=loaded.shape,
        scores=scores,
        standard_errors=errors,
        probes_used=counted_probes,
        metadata={
            "settings": json.dumps(asdict(settings) | {"decode": decode, "include_failed": include_failed}),
            "seed": str(settings.seed),
            "accuracy": json.dumps(family_accuracy(results)),
            "versions": json.dumps(
                {
                    "headprof": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                }
            ),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command,
        },
    )


def family_accuracy(results: list[ProbeResult]) -> dict[str, list[int]]:
    """Probes answered and probes asked, per family: `{"family": [answered, asked]}`."""
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in results:
        tally[result.family][0] += result.answered
        tally[result.family][1] += 1
    return dict(sorted(tally.items()))
