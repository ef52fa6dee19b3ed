"""Asking fresh probes: building them, reading a context, grading the right answers that are fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from headprof.models.loading import LoadedModel
from headprof.probes.build import Probe, ProbeBuilder, ProbeContext, ProbeSettings
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.shared_context import SharedContext, teacher_forced
from headprof.validation.settings import ValidationSettings
from headprof.validation.silence import MeanOutputs

AnyContext = TypeVar("AnyContext", bound=SharedContext)


@dataclass(frozen=True)
class AskedProbe:
    """A probe, and the number of the context it is about."""

    kind: str
    family: str
    context: int


def asked_probes(contexts: Sequence[ProbeContext]) -> tuple[AskedProbe, ...]:
    """The probes of contexts, in order."""
    return tuple(AskedProbe(probe.kind, probe.family, each.index) for each in contexts for probe in each.probes)


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
            families=settings.probe_families,
            needles_per_context=settings.pack,
            seed=settings.seed,
            split="eval",
        ),
        max_positions=loaded.max_positions,
    )
    settings.check_contexts(len(builder))
    return builder


@contextmanager
def asking(model: PreTrainedModel, kind_of_context: type[AnyContext]) -> Iterator[AnyContext]:
    """A context to ask about; the reader reads nothing, but lets FlashAttention serve questions side by side."""
    reader = RowReader(model)
    with reader.installed():
        yield kind_of_context(model, reader.base)


def read_whole(shared: SharedContext, context: ProbeContext, ablate: str) -> MeanOutputs | None:
    """Read a context with no head silent; returns what silent heads put out in its place, `None` for zeros."""
    if ablate == "zero":
        shared.read(context.context_ids)
        return None
    means = MeanOutputs()
    with means.measuring(shared.model):
        shared.read(context.context_ids)
    return means


def answers(shared: SharedContext, probes: Sequence[Probe]) -> torch.Tensor:
    """Answers to probes about the context that was read, float32 `[2, n]`: whether right, and the log-probability."""
    return torch.cat([grade(shared.ask(*asked), said) for asked, said in passes(shared, probes)], dim=1)


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
