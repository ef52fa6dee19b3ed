"""HeadKV-R2's budgets moved to where they lose less, for prompts that end with their question (see `moving`).

Shapes: `S` budgets, `L` layers, `K` KV heads, `T` rows of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.methods.allocation import normalized
from headprof.compression.methods.method import Method
from headprof.compression.methods.table import TUNED, find_method
from headprof.compression.observers import Observers
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.profile.tuned import NOTE, Refined, Tuned
from headprof.tuning.exams import JUDGES, Exam, Exams, ExamSettings
from headprof.tuning.hidden_rows import hiding
from headprof.tuning.moving import Mover, MoveSettings, ReadPrompt, allotted, counting, require_gradients
from headprof.tuning.reading import PromptReader
from headprof.utils.memory import free_bytes

_ROOMY = 10**6
"""Tokens of a prompt in which no head's budget finds an end."""
_SHARED = 1024
"""Tokens of a prompt from which on several probes share a context."""
_MEMORY_SHARE = 0.5
"""Of the device's free memory, what prompts may take; if they need more, they wait in the host's."""


@dataclass(frozen=True)
class RefineSettings(MoveSettings):
    """How HeadKV-R2's budgets are moved.

    Attributes:
        budgets: tokens per KV head, ascending.
        probes: prompts by which they are moved.
    """

    checks: int = 16
    steps: tuple[float, ...] = (0.5, 0.4, 0.4, 0.3)
    seed: int = 31
    budgets: tuple[int, ...] = (16, 32, 64, 128)
    probes: int = 32


@dataclass(frozen=True)
class Refining:
    """What was found.

    Attributes:
        budgets: tokens per KV head, `S`.
        rows: of each head at these, float32 `[S, L, K]`; only proportions matter, beside the tokens always kept.
        losses: mean divergence from the full cache on the prompts that moved nothing, nats a token: of each budget,
            before and of the moved ones, which are kept only if they lose less.
        probes: how many moved budgets, and how many saw whether that has helped.
    """

    budgets: tuple[int, ...]
    rows: Tensor
    losses: tuple[tuple[float, float], ...]
    probes: tuple[int, int]


def refine(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: RefineSettings = RefineSettings(),
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Refining:
    """Move the budgets of HeadKV-R2, with the parameters that were tuned for the model.

    Args:
        loaded: the model.
        profile: with reasoning scores, and tuned.
        settings: how.
        on_round: called with the number of steps of work that are done, and of all.

    Raises:
        UsageError: prompts of this length do not fit into the model's context, or no budget leaves anything out.
        ProfileError: the profile is not tuned, or lacks the scores that budgets follow.
        ModelError: the model's attention cannot be reached, or several processes hold it.
    """
    require_gradients(loaded)
    method = find_method(TUNED).with_options(**profile.tuned)
    budgets = [each for each in settings.budgets if method.always_kept < each < settings.length]
    if not budgets:
        raise UsageError(
            f"Budgets of {', '.join(map(str, settings.budgets))} tokens cannot be refined: between the "
            f"{method.always_kept} that every head keeps and the {settings.length} of a prompt nothing is to be chosen."
        )
    exams = Exams(loaded, JUDGES["known"], _asked(settings))
    told = counting(on_round, len(exams) + len(budgets) * len(settings.steps))
    prompts = _read(loaded, method, exams, told)
    scores = profile.kv_head_scores(str(method.budget.profile_scores), getattr(method.budget, "aggregate", "max"))
    with hiding(loaded.model) as hider:
        mover = Mover(hider, prompts[: settings.probes], prompts[settings.probes :], settings.steps, told)
        found = [mover.move(_start(method, scores, each), _allotting(each, method.always_kept)) for each in budgets]
    rows = torch.stack([shares * shares.numel() * budget for (shares, _), budget in zip(found, budgets, strict=True)])
    return Refining(tuple(budgets), rows.float(), tuple(lost for _, lost in found), mover.asked)


def with_refined_rows(
    profile: HeadProfile,
    loaded: LoadedModel,
    settings: RefineSettings = RefineSettings(),
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A tuned profile with budgets that were moved to where they lose less; its metadata says what that brought.

    Raises:
        UsageError, ProfileError, ModelError: as `refine`.
    """
    found = refine(loaded, profile, settings, on_round)
    tuned = Tuned.of(profile.metadata)
    assert tuned is not None  # or `refine` would have refused
    losses = tuple((round(before, 5), round(after, 5)) for before, after in found.losses)
    noted = Refined(found.budgets, losses, found.probes, settings.length)
    return replace(
        profile,
        refined_rows=found.rows,
        metadata={**profile.metadata, NOTE: replace(tuned, refined=noted).note()},
    )


def _asked(settings: RefineSettings) -> ExamSettings:
    pack = None if settings.length >= _SHARED else 1
    return ExamSettings(settings.probes + settings.checks, length=settings.length, pack=pack, seed=settings.seed)


def _read(loaded: LoadedModel, method: Method, exams: Sequence[Exam], told: Callable[[], None]) -> list[ReadPrompt]:
    """The prompts, each read once; where the device has no room for all, they wait in the host's memory."""
    reader, prompts = PromptReader(loaded, method), []
    room, taken = _MEMORY_SHARE * free_bytes(loaded.device), 0
    for exam in exams:
        rows = reader.read(exam.prompt, Observers(()), exam.shared)
        prompt = ReadPrompt.of(loaded, rows, exam.answers)
        taken += prompt.nbytes
        prompts.append(prompt if taken <= room else prompt.to("cpu"))
        told()
    return prompts


def _start(method: Method, scores: Tensor, budget: int) -> Tensor:
    """Each head's share of what a method gives beside the tokens always kept, float64 `[L, K]`."""
    given = method.budget.allocate(scores, budget=budget, context_length=_ROOMY, always_kept=method.always_kept)
    return normalized(given - method.always_kept)


def _allotting(budget: int, always_kept: int) -> Callable[[Tensor, int], Tensor]:
    """Rows of each head of a prompt, int64 `[L, K]`, as `RefinedBudget` gives them."""
    return lambda shares, tokens: allotted(shares, budget, tokens, always_kept)
