"""Needle probes under many methods and budgets, from one prefill each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from headprof.compression.cache import FanOutCache, HeadCache, stack_caches
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, prefill
from headprof.probes.build import ProbeContext


@dataclass(frozen=True)
class Candidate:
    """A method at a budget, ready to run; `budget` is the text the user gave, empty for the full cache."""

    method: str
    budget: str
    plan: CompressionPlan


@dataclass(frozen=True)
class Answer:
    """Whether one probe was answered right under one candidate.

    Attributes:
        probe: number of the probe, from 0.
        kind, family: the probe's.
        prompt_tokens: length of its prompt.
        method, budget: the candidate's.
        correct: each token of the right answer was the model's arg-max, with the tokens before it given.
        cache_bytes: bytes that the cache held after the prompt.
    """

    probe: int
    kind: str
    family: str
    prompt_tokens: int
    method: str
    budget: str
    correct: bool
    cache_bytes: int


@torch.inference_mode()
def answer_probes(
    model: PreTrainedModel,
    contexts: Iterable[ProbeContext],
    candidates: Sequence[Candidate],
    on_probe: Callable[[list[Answer]], None] = lambda _: None,
    *,
    question_known: bool = True,
    observer_ids: Sequence[int] = (),
) -> list[Answer]:
    """Ask every probe under every candidate.

    If the question is known, the prompt that is compressed ends with it and the start of the model's turn; else the
    context alone is compressed, and the question read afterwards. Then the beginning of the reply that a probe gives
    and the right answer are fed over the compressed cache, so each answer token, the first one too, is predicted from
    what the cache still holds.

    Args:
        model: the model that answers.
        contexts: with one or more probes each; every probe is a prompt of its own.
        candidates: methods at budgets.
        on_probe: called with each probe's answers, one per candidate.
        question_known: whether the question is part of what is compressed.
        observer_ids: if not, tokens after the context that judge it and are not kept.
    """
    answers: list[Answer] = []
    probes = ((context, probe) for context in contexts for probe in context.probes)
    with attending_ragged(model):
        for number, (context, probe) in enumerate(probes):
            prompt = (*context.context_ids, *(probe.asked_ids if question_known else observer_ids))
            reply = (*(() if question_known else probe.asked_ids), *probe.reply_ids, *probe.answer_ids)
            caches = [HeadCache(candidate.plan) for candidate in candidates]
            together = FanOutCache(caches)
            together.expect_observers(0 if question_known else len(observer_ids))
            last_logits = prefill(model, torch.tensor([prompt], device=model.device), together)
            correct = _correct(model, stack_caches(caches), last_logits, reply, len(probe.answer_ids))
            batch = [
                Answer(
                    probe=number,
                    kind=probe.kind,
                    family=probe.family,
                    prompt_tokens=caches[0].get_seq_length(),
                    method=candidate.method,
                    budget=candidate.budget,
                    correct=right,
                    cache_bytes=cache.nbytes,
                )
                for candidate, cache, right in zip(candidates, caches, correct, strict=True)
            ]
            on_probe(batch)
            answers += batch
    return answers


def _correct(
    model: PreTrainedModel, stack: HeadCache, last_logits: torch.Tensor, reply: Sequence[int], answer_length: int
) -> list[bool]:
    """For each batch entry, whether each of `reply`'s last `answer_length` tokens is the arg-max after those before."""
    entries = stack.head_layers[0].batch_size
    wanted = torch.tensor(reply[-answer_length:], device=model.device)
    predicted = last_logits.argmax(dim=-1).expand(entries)[:, None]  # what the prompt's last token predicts
    if len(reply) > 1:
        fed = torch.tensor([reply[:-1]], device=model.device).expand(entries, -1)
        logits = model(fed, past_key_values=stack, use_cache=True, logits_to_keep=answer_length).logits
        predicted = torch.cat([predicted, logits.argmax(dim=-1)], dim=1)
    return (predicted[:, -answer_length:] == wanted).all(dim=-1).tolist()
