"""The causal check of a head profile: silence its top heads, and see whether the answers go.

As many heads of the same layers, picked at random, and the heads with the lowest scores are silenced too: only what the
top heads cost beyond these speaks for the profile. Shapes: `n` probes, `S` sets of heads.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from headprof.errors import ProbeError, ProfileError, UsageError
from headprof.models.loading import LoadedModel
from headprof.probes.build import Probe, ProbeBuilder, ProbeContext, ProbeSettings
from headprof.profile.commands import score_command
from headprof.profile.head_profile import PROBE_KINDS, HeadProfile
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.shared_context import SharedContext, teacher_forced
from headprof.validation.silence import Head, silenced

FAMILIES = ("top", "random", "bottom")
SILENT_IN = ("prompt", "question")
MIN_RIGHT = 8
"""Fewest probes of a kind that the model must answer for its heads to be checked."""
MIN_CONTEXTS = 4
"""Fewest contexts from which an interval is made."""

AnyContext = TypeVar("AnyContext", bound=SharedContext)


@dataclass(frozen=True)
class ValidationSettings:
    """What is asked, and which heads are silent meanwhile.

    Attributes:
        top: number of heads that the verdict is about.
        counts: other numbers of heads for the curve; those above half of the model's heads are left out.
        probes: number of probes, retrieval and reasoning together.
        length: tokens of a prompt.
        pack: probes that share a context; `None` to choose it from the length.
        draws: how often heads are picked at random.
        seed: of the probes, the picks and the intervals.
        where: `"prompt"`: heads are silent in the whole forward pass; `"question"`: from the end of the context on.
    """

    top: int = 10
    counts: tuple[int, ...] = (1, 2, 5, 10, 20)
    probes: int = 120
    length: int = 1024
    pack: int | None = None
    draws: int = 3
    seed: int = 2000
    where: str = "prompt"

    def check(self, num_heads: int | None = None) -> None:
        """Complain about what cannot be done, before anything is loaded or run; `num_heads` counts all layers.

        Raises:
            UsageError: with the mend.
        """
        if self.where not in SILENT_IN:
            raise UsageError(f"Heads cannot be silent in the {self.where!r}: choose {' or '.join(SILENT_IN)}.")
        for name, value in (("top heads", self.top), ("draws", self.draws), *(("heads", k) for k in self.counts)):
            if value < 1:
                raise UsageError(f"A profile cannot be checked with {value} {name}: give at least 1.")
        if num_heads is not None and self.top > num_heads // 2:
            raise UsageError(
                f"Silencing {self.top} of {num_heads} heads leaves too few others to compare them with: give a --top "
                f"of at most {num_heads // 2}."
            )
        if self.pack and self.probes <= (MIN_CONTEXTS - 1) * self.pack:
            raise UsageError(_too_few_contexts(self))

    def all_counts(self, num_heads: int) -> list[int]:
        """Numbers of heads to silence, ascending, `top` among them."""
        return sorted({count for count in self.counts if count <= num_heads // 2} | {self.top})


def _too_few_contexts(settings: ValidationSettings) -> str:
    return (
        f"{settings.probes} probes in fewer than {MIN_CONTEXTS} contexts say too little: ask for more --probes, or a "
        "smaller --pack."
    )


@dataclass(frozen=True)
class HeadSet:
    """Heads that are silent together.

    Attributes:
        chosen_by: kind of score that chose them; empty for no heads at all.
        family: one of `FAMILIES`, or `"none"`.
        count: how many they are.
        draw: which of several random picks it is, from 0.
        heads: (layer, head) of each.
    """

    chosen_by: str
    family: str
    count: int
    draw: int
    heads: tuple[Head, ...]


NOTHING = HeadSet("", "none", 0, 0, ())


@dataclass(frozen=True)
class AskedProbe:
    """A probe, and the number of the context it is about."""

    kind: str
    family: str
    context: int


@dataclass(frozen=True, eq=False)
class Validation:
    """Every probe's answer under every set of silent heads.

    Attributes:
        model_name: whose heads they are.
        kinds: the kinds of score that chose heads.
        settings: what was asked.
        sets: `S` sets, the first of them `NOTHING`.
        probes: `n` probes.
        right: whether each token of the right answer was the model's first choice, bool `[S, n]`.
        log_probs: log-probability of the right answer in nats, float32 `[S, n]`.
    """

    model_name: str
    kinds: tuple[str, ...]
    settings: ValidationSettings
    sets: tuple[HeadSet, ...]
    probes: tuple[AskedProbe, ...]
    right: torch.Tensor
    log_probs: torch.Tensor

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
        """Where in `probes` those of a kind are."""
        return [index for index, probe in enumerate(self.probes) if probe.kind == kind]


def checked_kinds(profile: HeadProfile) -> tuple[str, ...]:
    """The kinds of a profile's scores that have probes of their own, by which they can be checked.

    Raises:
        ProfileError: it has none.
    """
    kinds = tuple(kind for kind in PROBE_KINDS if kind in profile.scores)
    if not kinds:
        raise ProfileError(
            f"The profile of {profile.model_name} holds neither retrieval nor reasoning scores, which probes can "
            f"check: run `{score_command(profile.called)}`."
        )
    return kinds


def choose_sets(profile: HeadProfile, settings: ValidationSettings) -> list[HeadSet]:
    """The heads to silence: for each kind of score and each count the top, the random picks and the bottom."""
    sets = []
    for kind in checked_kinds(profile):
        scores = profile.scores[kind]
        for count in settings.all_counts(scores.numel()):
            top = [(layer, head) for layer, head, _ in profile.top_heads(kind, count)]
            sets.append(HeadSet(kind, "top", count, 0, tuple(top)))
            for draw in range(settings.draws):
                rng = random.Random(f"{settings.seed}/{kind}/{count}/{draw}")
                sets.append(HeadSet(kind, "random", count, draw, same_layer_heads(top, scores.shape, rng)))
            # One order for all counts, so that each bottom holds the smaller ones.
            bottom = bottom_heads(scores, top, random.Random(f"{settings.seed}/{kind}/bottom"))
            sets.append(HeadSet(kind, "bottom", count, 0, bottom))
    return sets


def same_layer_heads(heads: Sequence[Head], shape: Sequence[int], rng: random.Random) -> tuple[Head, ...]:
    """As many other heads, picked at random from the same layers, and from any layer where these have too few.

    Args:
        heads: at most half of all.
        shape: layers and heads per layer, `(L, H)`.
        rng: picks.
    """
    num_layers, num_heads = shape
    others = [(layer, head) for layer in range(num_layers) for head in range(num_heads) if (layer, head) not in heads]
    picked: list[Head] = []
    for layer, count in Counter(layer for layer, _ in heads).items():
        of_layer = [head for head in others if head[0] == layer]
        picked += rng.sample(of_layer, min(count, len(of_layer)))
    rest = [head for head in others if head not in picked]
    return tuple(picked + rng.sample(rest, len(heads) - len(picked)))


def bottom_heads(scores: torch.Tensor, top: Sequence[Head], rng: random.Random) -> tuple[Head, ...]:
    """As many heads as `top`, none of them, with the lowest scores `[L, H]`; equal scores in random order."""
    order = rng.sample(range(scores.numel()), scores.numel())
    ranked = sorted(order, key=scores.flatten().tolist().__getitem__)
    heads = [divmod(index, scores.shape[1]) for index in ranked]
    return tuple([head for head in heads if head not in top][: len(top)])


def build_probes(loaded: LoadedModel, settings: ValidationSettings) -> ProbeBuilder:
    """Probes that share no slot value with those that profiles are made from.

    Raises:
        UsageError: the settings do not fit the model.
    """
    builder = ProbeBuilder(
        loaded.tokenizer,
        ProbeSettings(
            probes=settings.probes,
            lengths=(settings.length,),
            needles_per_context=settings.pack,
            seed=settings.seed,
            split="eval",
        ),
        max_positions=loaded.max_positions,
    )
    if len(builder) < MIN_CONTEXTS:
        raise UsageError(_too_few_contexts(settings))
    return builder


@torch.inference_mode()
def validate(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: ValidationSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """Ask a model fresh probes while the top, random and bottom heads of its profile are silent.

    Sets of heads that coincide are run once. Without silent heads all probes are asked first.

    Args:
        loaded: the model.
        profile: of this model.
        settings: what to ask.
        on_progress: called after each context and set of heads, with the number done and the number of all.

    Raises:
        UsageError: the settings do not fit the model.
        ProbeError: fewer than `MIN_RIGHT` probes of a kind are answered without silent heads.
        ProfileError: the profile holds no scores of a kind of probe.
        ModelError: the model's attention cannot be reached.
    """
    settings.check(loaded.shape.num_layers * loaded.shape.num_heads)
    contexts = list(build_probes(loaded, settings))
    sets = [NOTHING, *choose_sets(profile, settings)]
    to_run = list(dict.fromkeys(frozenset(each.heads) for each in sets))
    answers: dict[frozenset[Head], list[torch.Tensor]] = {heads: [] for heads in to_run}
    probes = [AskedProbe(probe.kind, probe.family, each.index) for each in contexts for probe in each.probes]
    total = len(to_run) * len(contexts)
    with asking(loaded.model, SharedContext) as shared:

        def ask(context: ProbeContext, run: Sequence[frozenset[Head]], where: str) -> None:
            for heads, answer in zip(run, _silent_answers(shared, context, run, where), strict=True):
                answers[heads].append(answer)
                on_progress(sum(map(len, answers.values())), total)

        for context in contexts:
            ask(context, to_run[:1], "prompt")
        _check_answered(probes, torch.cat(answers[to_run[0]], dim=1)[0], checked_kinds(profile))
        for context in contexts:
            ask(context, to_run[1:], settings.where)
    right, log_probs = torch.stack([torch.cat(answers[frozenset(each.heads)], dim=1) for each in sets], dim=1)
    kinds = checked_kinds(profile)
    return Validation(loaded.name, kinds, settings, tuple(sets), tuple(probes), right.bool(), log_probs)


@contextmanager
def asking(model: PreTrainedModel, kind_of_context: type[AnyContext]) -> Iterator[AnyContext]:
    """A context to ask about; the reader reads nothing, but lets FlashAttention serve questions side by side."""
    reader = RowReader(model)
    with reader.installed():
        yield kind_of_context(model, reader.base)


def _silent_answers(
    shared: SharedContext, context: ProbeContext, sets: Sequence[frozenset[Head]], where: str
) -> Iterator[torch.Tensor]:
    """Answers `[2, n]` to a context's probes under each set: whether right, and the log-probability."""
    if where == "question":
        shared.read(context.context_ids)
    for heads in sets:
        with silenced(shared.model, heads):
            if where == "prompt":
                shared.read(context.context_ids)
            yield torch.cat([grade(shared.ask(*asked), said) for asked, said in passes(shared, context.probes)], 1)


_Pass = tuple[list[tuple[int, ...]], torch.Tensor]


def passes(shared: SharedContext, probes: Sequence[Probe]) -> Iterator[tuple[_Pass, list[tuple[int, ...]]]]:
    """What to ask, in as few passes as the model allows: arguments of `SharedContext.ask`, and the right answers."""
    for part in shared.together([probe.answer_ids for probe in probes]):
        said = [probe.answer_ids for probe in probes[part]]
        suffixes, rows = teacher_forced([probe.question_ids for probe in probes[part]], said)
        yield (suffixes, torch.cat(rows)), said


def grade(logits: torch.Tensor, said: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """From logits `[N, vocabulary]` of answers with `N` tokens in all, float32 `[2, n]`: right, log-probability."""
    tokens = torch.tensor([token for answer in said for token in answer], device=logits.device)
    sizes = [len(answer) for answer in said]
    chosen = (logits.argmax(dim=-1) == tokens).split(sizes)
    log_probs = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].split(sizes)
    grades = [
        torch.stack([all_chosen.all().float(), each.sum()]) for all_chosen, each in zip(chosen, log_probs, strict=True)
    ]
    return torch.stack(grades, dim=1).cpu()


def _check_answered(probes: Sequence[AskedProbe], right: torch.Tensor, kinds: Sequence[str]) -> None:
    for kind in kinds:
        of_kind = [bool(answered) for probe, answered in zip(probes, right, strict=True) if probe.kind == kind]
        if sum(of_kind) < MIN_RIGHT:
            raise ProbeError(
                f"The model answers {sum(of_kind)} of {len(of_kind)} {kind} probes with no head silent, too few to "
                "tell what silent heads cost: try a shorter --length, more --probes or another model."
            )
