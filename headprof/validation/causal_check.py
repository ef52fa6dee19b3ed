"""The causal check of a head profile: silence its top heads, and see whether the answers go.

As many heads of the same layers, picked at random, and the heads with the lowest scores are silenced too: only what the
top heads cost beyond these speaks for the profile. Shapes: `n` probes, `S` sets of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from headprof.errors import ProbeError
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeContext
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS
from headprof.scoring.shared_context import SharedContext
from headprof.utils.team import Team
from headprof.validation.asking import AskedProbe, answers, asked_probes, asking, build_probes, read_whole
from headprof.validation.head_sets import NOTHING, CheckedScores, HeadSet, checked_scores, choose_sets
from headprof.validation.settings import ValidationSettings
from headprof.validation.silence import Head, silenced

MIN_RIGHT = 8
"""Fewest probes that the model must answer for scores to be judged by them."""
ALL = "all"
"""What the probes of all kinds together are called."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Every probe's answer under every set of silent heads.

    Attributes:
        model_name: whose heads they are.
        scores: those that chose heads, the profile's own first.
        settings: what was asked.
        sets: `S` sets, the first of them `NOTHING`.
        probes: `n` probes.
        right: whether each token of the right answer was the model's first choice, bool `[S, n]`.
        log_probs: log-probability of the right answer in nats, float32 `[S, n]`.
    """

    model_name: str
    scores: tuple[CheckedScores, ...]
    settings: ValidationSettings
    sets: tuple[HeadSet, ...]
    probes: tuple[AskedProbe, ...]
    right: torch.Tensor
    log_probs: torch.Tensor

    @property
    def names(self) -> list[str]:
        """What the scores are called."""
        return [each.name for each in self.scores]

    @property
    def probe_kinds(self) -> list[str]:
        """The kinds of the probes, retrieval first."""
        return [kind for kind in PROBE_KINDS if self.probe_indices(kind)]

    @property
    def counts(self) -> list[int]:
        """Numbers of heads that were silenced, ascending."""
        return sorted({each.count for each in self.sets} - {0})

    def rows(self, chosen_by: str, family: str, count: int) -> list[int]:
        """Where in `sets` these are: several for random picks; the one that silences nothing for a count of 0."""
        if count == 0:
            return [0]
        wanted = (chosen_by, family, count)
        return [row for row, each in enumerate(self.sets) if (each.chosen_by, each.family, each.count) == wanted]

    def probe_indices(self, kind: str) -> list[int]:
        """Where in `probes` those of a kind are; of `ALL`, all."""
        return [index for index, probe in enumerate(self.probes) if kind in (probe.kind, ALL)]

    def judges(self, scores: CheckedScores) -> str:
        """The kind of probes by which scores are judged: their own, or `ALL` where none of that kind were asked."""
        return judging_kind(scores, self.probes)


def judging_kind(scores: CheckedScores, probes: Sequence[AskedProbe]) -> str:
    """The kind of probes by which scores are judged: their own, or `ALL` where there are none of that kind."""
    return scores.kind if any(probe.kind == scores.kind for probe in probes) else ALL


@torch.inference_mode()
def validate(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: ValidationSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    others: Mapping[str, HeadProfile] | None = None,
    team: Team | None = None,
) -> Validation:
    """Ask a model fresh probes while the top, random and bottom heads of its profile are silent.

    Sets of heads that coincide are run once. Without silent heads all probes are asked first.

    Args:
        loaded: the model.
        profile: of this model.
        settings: what to ask.
        on_progress: called by process 0 after each context and set of heads, with the number done and the number of
            all; of several processes, as if the others were as far.
        others: profiles of the same model whose scores choose heads too, by the names that they go by.
        team: the processes that share the contexts; each must call this with the same arguments.

    Raises:
        UsageError: the settings do not fit the model.
        ProbeError: fewer than `MIN_RIGHT` of the probes that judge a kind of score are answered without silent heads.
        ModelError: the model's attention cannot be reached.
    """
    settings.check(loaded.shape.num_layers * loaded.shape.num_heads)
    contexts = list(build_probes(loaded, settings))
    scores = checked_scores(profile, others)
    sets = [NOTHING, *choose_sets(scores, settings)]
    to_run = list(dict.fromkeys(frozenset(each.heads) for each in sets))
    probes = asked_probes(contexts)
    team = team or Team()
    told = team.telling(on_progress, len(to_run) * len(contexts))

    with asking(loaded.model, SharedContext) as shared:

        def whole(context: ProbeContext) -> torch.Tensor:
            shared.read(context.context_ids)
            return told(answers(shared, context.probes))

        def silent(context: ProbeContext) -> list[torch.Tensor]:
            return [told(each) for each in _silent_answers(shared, context, to_run[1:], settings)]

        unsilenced = team.each(contexts, whole)
        _check_answered(probes, torch.cat(unsilenced, dim=1)[0], scores)
        of_sets = [unsilenced, *zip(*team.each(contexts, silent), strict=True)]
    found = {heads: torch.cat(list(parts), dim=1) for heads, parts in zip(to_run, of_sets, strict=True)}
    right, log_probs = torch.stack([found[frozenset(each.heads)] for each in sets], dim=1)
    return Validation(loaded.name, scores, settings, tuple(sets), probes, right.bool(), log_probs)


def _silent_answers(
    shared: SharedContext, context: ProbeContext, sets: Sequence[frozenset[Head]], settings: ValidationSettings
) -> Iterator[torch.Tensor]:
    """Answers `[2, n]` to a context's probes under each set: whether right, and the log-probability."""
    in_prompt = settings.where == "prompt"
    instead = None if in_prompt and settings.ablate == "zero" else read_whole(shared, context, settings.ablate)
    for heads in sets:
        with silenced(shared.model, heads, instead):
            if in_prompt:
                shared.read(context.context_ids)
            yield answers(shared, context.probes)


def _check_answered(probes: Sequence[AskedProbe], right: torch.Tensor, scores: Sequence[CheckedScores]) -> None:
    for kind in dict.fromkeys(judging_kind(each, probes) for each in scores if each.own):
        judging = [bool(answered) for probe, answered in zip(probes, right, strict=True) if kind in (probe.kind, ALL)]
        if sum(judging) < MIN_RIGHT:
            named = "" if kind == ALL else f"{kind} "
            raise ProbeError(
                f"The model answers {sum(judging)} of {len(judging)} {named}probes with no head silent, too few to "
                "tell what silent heads cost: try a shorter --length, more --probes or another model."
            )
