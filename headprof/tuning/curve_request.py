"""Influence curves as they are asked for, and the profile that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from headprof.compression.methods.given_budget import Budget
from headprof.compression.session import make_plan
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.profile.influence import SITUATIONS
from headprof.tuning.curve_results import curve_results_path
from headprof.tuning.curves import GRID, CurveSettings, MeasuredCurves, measure_curves
from headprof.tuning.exams import JUDGES, Exams, ExamSettings
from headprof.utils.records import parse_object
from headprof.utils.run_record import today
from headprof.utils.team import Team

ALL, BOTH = "all", "both"
CURVES = "curves"
"""The entry of a profile's metadata that says how its curves were measured."""


@dataclass(frozen=True)
class CurveRequest:
    """What is to be measured.

    Attributes:
        question: one of `SITUATIONS`, or `BOTH`.
        probes, texts: how many of each are asked.
        length: tokens of a prompt.
        others: what all other heads keep meanwhile: `ALL`, or a budget as `Budget` reads it.
        seed: of probes and texts.
    """

    question: str = BOTH
    probes: int = 36
    texts: int = 0
    length: int = 1024
    others: str = ALL
    seed: int = 0

    @property
    def situations(self) -> tuple[str, ...]:
        """Those of `SITUATIONS` that are asked for."""
        return SITUATIONS if self.question == BOTH else (self.question,)

    @property
    def settings(self) -> ExamSettings:
        """What is asked of the model."""
        return ExamSettings(self.probes, self.texts, self.length, seed=self.seed)

    def check(self) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: with the mend.
        """
        if self.question not in (*SITUATIONS, BOTH):
            raise UsageError(f"A question cannot be {self.question!r}: choose {', '.join(SITUATIONS)} or {BOTH}.")
        if self.others != ALL and Budget.parse(self.others).above is not None:
            raise UsageError(
                "A threshold gives heads no budget before there is a prompt: give --others tokens or a share."
            )
        if not self.at().grid:
            raise UsageError(f"A prompt of {self.length} tokens has no rows to spare: give a longer --curve-length.")
        self.at().check(self.settings.length)

    def at(self, base: Tensor | None = None) -> CurveSettings:
        """At which numbers of rows it is measured: the usual ones below a prompt's length.

        Args:
            base: rows that all other heads keep, int64 `[L, K]`; `None` for all.
        """
        return CurveSettings(tuple(rows for rows in GRID if rows < self.length), base)


def with_curves(
    profile: HeadProfile,
    loaded: LoadedModel,
    request: CurveRequest,
    *,
    results: Path | None = None,
    resume: bool = False,
    team: Team | None = None,
    command: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile with influence curves, in the place of those that it had of the same situations, if any.

    Args:
        profile: of this model.
        loaded: the model.
        request: what is to be measured.
        results: the profile's file, beside which what has been measured is kept; `None` to keep nothing.
        resume, team, on_progress: as for `measure_curves`; progress is of all situations.
        command: noted in the profile.

    Raises:
        UsageError, ProfileError, ModelError, InterruptedRun: as `measure_curves` and `make_plan`.
    """
    request.check()
    asked = {situation: Exams(loaded, JUDGES[situation], request.settings) for situation in request.situations}
    for exams in asked.values():
        exams.check(loaded)
    curves, notes = dict(profile.curves), _notes(profile)
    for number, (situation, exams) in enumerate(asked.items()):

        def report(done: int, total: int, number: int = number) -> None:
            on_progress(number * total + done, len(asked) * total)

        measured = measure_curves(
            loaded,
            exams,
            request.at(operating_point(loaded, profile, situation, request)),
            results_path=None if results is None else curve_results_path(results, situation),
            resume=resume,
            team=team,
            on_progress=report,
        )
        curves[situation] = measured.curves()
        notes[situation] = _how(measured, exams, request) | {"command": command}
    return replace(profile, curves=curves, metadata={**profile.metadata, CURVES: json.dumps(notes)})


def operating_point(loaded: LoadedModel, profile: HeadProfile, situation: str, request: CurveRequest) -> Tensor | None:
    """Rows that all other heads keep, int64 `[L, K]`: everything, or what a method that has no curves gives them.

    Raises:
        UsageError: that is less than every head keeps.
    """
    if request.others == ALL:
        return None
    methods = [("headkv-r2", "reasoning" in profile.scores), ("snapkv", True)]
    if situation == "unknown":
        kinds = profile.kept_shares is not None, "reasoning" in profile.scores
        methods = [("learned-kvzip", kinds[0]), ("headkv-kvzip", kinds[1]), ("adakv-kvzip", True)]
    method = next(name for name, has_scores in methods if has_scores)
    plan = make_plan(loaded.model, profile, method=method, budget=request.others)
    try:
        return plan.allocation(request.length)
    except UsageError as error:
        least = plan.method.always_kept
        raise UsageError(
            f"Other heads cannot keep {request.others} where each keeps {least} tokens in any case: raise --others."
        ) from error


def _notes(profile: HeadProfile) -> dict[str, Any]:
    """What is noted of the curves that a profile holds; empty where that is unreadable."""
    try:
        return parse_object(profile.metadata.get(CURVES, "{}"))
    except ValueError:
        return {}


def _how(measured: MeasuredCurves, exams: Exams, request: CurveRequest) -> dict[str, Any]:
    """How curves were measured, for a profile's metadata."""
    kinds = [answer.kind for answer in measured.answers]
    return {
        "judge": exams.judge.method,
        "answers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "contexts": len({answer.cluster for answer in measured.answers}),
        "length": request.length,
        "seed": request.seed,
        "others_keep": request.others,
        "loss_at_others": round(measured.base_loss, 5),
        "date": today(),
    }
