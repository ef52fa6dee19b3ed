"""Influence curves: every number by its slow twin, the cache itself with one head's budget changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from support.tiny_models import load_tiny

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.filling import read_document_into
from headprof.compression.methods.budget import BudgetPolicy
from headprof.compression.session import attending_ragged, make_plan
from headprof.tuning.curves import measure_curves
from headprof.tuning.exams import JUDGES, Exams, ExamSettings

GRID = (5, 20, 60)


@dataclass(frozen=True)
class Given(BudgetPolicy):
    """Heads keep what they are told to."""

    counts: tuple[tuple[int, ...], ...] = ()
    profile_scores = None

    def allocate(self, scores, *, budget, context_length, always_kept):
        return torch.tensor(self.counts).clamp(max=context_length)


@torch.no_grad()
def losses_of_cache(loaded, exams, exam, answer, counts):
    """Divergence and drop of an answer from a cache that holds so many rows of each head, and no hidden ones."""
    method = replace(exams.judge.of_table, budget=Given(tuple(map(tuple, counts.tolist()))))
    plan = make_plan(loaded.model, method=method, budget=5, buffer=None)
    observers = exams.observers(loaded, exam)
    cache = HeadCache(plan.for_observers(len(observers)))
    number = len(answer.reference)
    with attending_ragged(loaded.model):
        read_document_into(loaded.model, [cache], exam.prompt, observers)
        said = loaded.model(torch.tensor([answer.fed]), past_key_values=cache).logits[0, -number:]
    whole = loaded.model(torch.tensor([[*exam.prompt, *answer.fed]]), use_cache=False).logits[0, -number:]
    own, other = whole.double().log_softmax(-1), said.double().log_softmax(-1)
    wanted = torch.tensor(answer.reference)[:, None]
    return [float((own.exp() * (own - other)).sum(-1).mean()), float((own - other).gather(1, wanted).mean())]


@pytest.mark.parametrize("situation", ["known", "unknown"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2", "mistral"])
@pytest.mark.parametrize("around", [False, True])
def test_each_loss_is_that_of_a_cache(situation, arch, around):
    loaded = load_tiny(arch, attn="eager" if arch == "gemma2" else None, sliding_window=100)
    exams = Exams(loaded, JUDGES[situation], ExamSettings(probes=2, texts=1, length=520, pack=2))
    base = torch.tensor([[30, 7], [12, 90]]) if around else None
    measured = measure_curves(loaded, exams, GRID, base, batch=3)
    asked = [(exam, answer) for exam in exams for answer in exam.answers]
    assert [answer.kind for answer in measured.answers] == [answer.kind for _, answer in asked]
    for (exam, answer), found in zip(asked, measured.answers, strict=True):
        others = torch.full((2, 2), len(exam.prompt)) if base is None else base
        torch.testing.assert_close(
            found.base.tolist(), losses_of_cache(loaded, exams, exam, answer, others), atol=2e-5, rtol=1e-3
        )
        for layer, head, number in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 0), (1, 1, 3)):
            counts = others.clone()
            counts[layer, head] = (*GRID, len(exam.prompt))[number]
            expected = losses_of_cache(loaded, exams, exam, answer, counts)
            losses = [float(each[layer, head, number]) for each in (found.divergence, found.drop)]
            torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-3)
