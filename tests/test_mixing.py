"""Learned budgets mixed with HeadKV-R2's: the arithmetic, what each mix loses by its slow twin, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.profiles import random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_model

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.filling import read_document_into
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.observers import repeating_observers
from headprof.compression.session import attending_ragged, make_plan
from headprof.models.prompt_encoder import PromptEncoder
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kept_shares import kept_shares_fault
from headprof.tuning import mixing
from headprof.tuning.mixing import MIXES, find_mixing, mixed_shares, with_mixing


def learned(layers, heads, seed):
    """Shares that grow to one, each head's in its own way, `[4, L, K]`."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(layers, heads, generator=generator, dtype=torch.float64) * 4 + 0.2
    return torch.stack([share**power for share in (0.05, 0.2, 0.5, 0.9)]).float()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.lists(st.sampled_from(MIXES), min_size=1, max_size=4)
)
def test_mixed_shares_can_be_those_of_a_profile(layers, heads, seed, mixes):
    kept = learned(layers, heads, seed)
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed + 1)) ** 3
    mixed = mixed_shares(kept, scores, mixes)
    assert kept_shares_fault(mixed, HeadShape("tiny", layers, heads, heads, 8, 100)) is None
    torch.testing.assert_close(mixed.mean(dim=(1, 2)), kept.mean(dim=(1, 2)), atol=2e-6, rtol=0)
    last = max((number for number, mix in enumerate(mixes) if mix), default=-1)
    assert torch.equal(mixed[last + 1 :], kept[last + 1 :])


def test_all_of_headkv_is_its_budgets_and_half_lies_between():
    low = learned(6, 3, 0)[0]
    kept = torch.stack([low, torch.ones_like(low)])  # so that nothing hinders shares to grow
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(9))
    whole, half = mixed_shares(kept, scores, [1.0])[0], mixed_shares(kept, scores, [0.5])[0]
    budget = round(float(low.double().mean()) * 1_000_000)
    allotted = ProfileBudget().allocate(scores, budget=budget, context_length=1_000_000, always_kept=0)
    torch.testing.assert_close(whole, (allotted / 1e6).float(), atol=2e-6, rtol=0)
    mean = (low.double() * allotted.double()).sqrt()
    torch.testing.assert_close(half, (mean / mean.mean() * low.double().mean()).float(), atol=2e-6, rtol=0)


@torch.no_grad()
def divergence_alone(loaded, plan, context, probe):
    """Of one plan's cache at one probe's answer: filled by itself, against no cache at all."""
    document = list(context.context_ids)
    observers = repeating_observers(loaded, PromptEncoder(loaded.tokenizer), document, plan.method)
    cache = HeadCache(plan.for_observers(len(observers)))
    fed = [*probe.asked_ids, *probe.reply_ids, *probe.answer_ids[:-1]]
    with attending_ragged(loaded.model):
        read_document_into(loaded.model, [cache], document, observers)
        said = loaded.model(torch.tensor([fed]), past_key_values=cache).logits[0]
    whole = loaded.model(torch.tensor([[*document, *fed]]), use_cache=False).logits[0]
    number = len(probe.answer_ids)
    own = whole[-number:].double().log_softmax(dim=-1)
    other = said[-number:].double().log_softmax(dim=-1)
    return float((own.exp() * (own - other)).sum(dim=-1).mean())


def test_losses_are_those_of_each_cache_alone():
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    kept, scores = profile.reconstruction, profile.kv_head_scores("reasoning")
    found = find_mixing(loaded, profile, probes=2, length=400)
    tried = [share for share in kept.double().mean(dim=(1, 2)).tolist() if share < 0.3]
    assert found.probes == 2 and found.shares == tuple(tried) and len(tried) >= 2
    asked = ProbeSettings(probes=2, lengths=(400,), needles_per_context=None, seed=mixing.SEED)
    contexts = list(ProbeBuilder(loaded.tokenizer, asked, max_positions=loaded.max_positions))
    for row, share in zip(found.losses, found.shares, strict=True):
        for loss, mix in list(zip(row, MIXES, strict=True))[::2]:
            mixed = replace(profile, kept_shares=mixed_shares(kept, scores, [mix] * len(tried)))
            plan = make_plan(loaded.model, mixed, method="learned-kvzip", budget=f"{share:.4%}", buffer=None)
            alone = [divergence_alone(loaded, plan, each, probe) for each in contexts for probe in each.probes]
            assert loss == pytest.approx(sum(alone) / 2, rel=1e-3, abs=1e-6)
    assert len({loss for row in found.losses for loss in row}) > len(tried)
    assert [row[MIXES.index(mix)] for row, mix in zip(found.losses, found.mixes, strict=True)] == [
        min(row) for row in found.losses
    ]


def test_a_profile_says_how_it_was_mixed(monkeypatch):
    loaded = load_tiny()
    profile = replace(random_profile(loaded.model), metadata={"reconstruction": '{"texts": 3}'})
    found = find_mixing(loaded, profile, probes=1, length=400)
    monkeypatch.setattr(mixing, "find_mixing", lambda *_, **__: found)
    mixed = with_mixing(profile, loaded)
    noted = json.loads(mixed.metadata["reconstruction"])
    assert noted["texts"] == 3 and noted["mixes"] == list(found.mixes) and noted["mix_probes"] == 1
    expected = mixed_shares(profile.reconstruction, profile.kv_head_scores("reasoning"), found.mixes)
    assert torch.equal(mixed.kept_shares, expected)


@pytest.mark.parametrize(
    ("kinds", "room", "said"),
    [
        (("retrieval", "reasoning"), 4096, None),
        (("retrieval",), 4096, "The profile has no reasoning scores: the learned budgets are not mixed"),
        (("retrieval", "reasoning"), 1000, "the learned budgets are not mixed with those of headkv-r2."),
    ],
)
def test_the_command_mixes_where_it_can(tmp_path, monkeypatch, kinds, room, said):
    monkeypatch.setattr(mixing, "PROBES", 1)
    monkeypatch.setattr(mixing, "LENGTH", 400 if said is None else 4000)
    save_tiny(tmp_path / "tiny", chat=True, max_positions=room)
    profile = random_profile(tiny_model(), kinds=kinds, name="tiny")
    replace(profile, kept_shares=None).save(tmp_path / "p.safetensors")
    options = ("--model", "tiny", "--texts", "1", "--text-lengths", "320", "--add-to", "p.safetensors")
    done = headprof(tmp_path, "score", "--reconstruction", *options)
    assert done.returncode == 0, done.stderr
    noted = json.loads(HeadProfile.load(tmp_path / "p.safetensors").metadata["reconstruction"])
    assert ("mixes" in noted) == (said is None)
    assert said is None or said in " ".join(done.stderr.split())
