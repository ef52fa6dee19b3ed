"""Trying methods: how far the caches that they leave are from the full one, at the tokens of right answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.continuing import ReferenceRun, fed_reference
from headprof.compression.filling import read_document_into
from headprof.compression.observers import Observers
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeContext


@torch.inference_mode()
def divergences(
    loaded: LoadedModel,
    plans: Sequence[CompressionPlan],
    prompt: Sequence[int],
    observers: Observers,
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Iterator[list[float]]:
    """What each plan loses of what is asked after a prompt, which is read once.

    Args:
        loaded: the model.
        plans: the first is that of the full cache.
        prompt: token ids of what is compressed.
        observers: what observes it and is not kept.
        asked: what is read after it, at least one token, and the right answer, as token ids.

    Yields:
        Of each question and each plan the divergence from the first one's cache, nats a token.

    Raises:
        UsageError: a budget cannot be met.
    """
    caches = [HeadCache(plan.for_observers(len(observers))) for plan in plans]
    with attending_ragged(loaded.model):
        read_document_into(loaded.model, caches, prompt, observers)
        for tail, answer in asked:
            run = ReferenceRun(len(caches), full=0)
            for logits, wanted in fed_reference(loaded, stack_caches(caches), tail, answer):
                run.add(logits, wanted)
            yield run.divergence or [0.0] * len(caches)


def known_losses(loaded: LoadedModel, plans: Sequence[CompressionPlan], context: ProbeContext) -> Tensor:
    """What each plan loses of a context's probes when each question is the end of its prompt, float64 `[n, plans]`.

    Args:
        loaded: the model.
        plans: the first is that of the full cache.
        context: with `n` probes.
    """
    found: list[list[float]] = []
    for probe in context.probes:
        prompt, tail = [*context.context_ids, *probe.asked_ids], [*probe.reply_ids]
        if not tail:  # something is read after the compression and before the answer
            prompt, tail = prompt[:-1], prompt[-1:]
        found += divergences(loaded, plans, prompt, Observers(()), [(tail, probe.answer_ids)])
    return loaded.shard.agreed(torch.tensor(found, dtype=torch.float64))
