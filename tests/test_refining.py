"""Learned budgets moved by gradients: what rows are worth by measuring it, each round's move, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.profiles import random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_model
from test_mixing import divergence_alone

from headprof.compression.session import make_plan
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kept_shares import kept_shares_fault
from headprof.tuning import moving, refining
from headprof.tuning.hidden_rows import hiding
from headprof.tuning.mixing import with_shares
from headprof.tuning.moving import moved
from headprof.tuning.refining import RefineSettings, refine, with_refining

SHORT = RefineSettings(contexts=1, checks=1, steps=(0.5, 0.3), length=600, seed=3)


def heads(layers, kv_heads, seed):
    """Shares of a budget that sum to one, some of them next to nothing."""
    drawn = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 6
    return drawn / drawn.sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.floats(0, 1))
def test_a_move_goes_towards_what_rows_are_worth(layers, kv_heads, seed, step):
    shares = heads(layers, kv_heads, seed)
    worth = torch.randn(layers, kv_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    after = moved(shares, worth, step)
    assert after.sum() == pytest.approx(1) and (after >= 0).all()
    torch.testing.assert_close(moved(shares, shares * 7, step), shares)  # each is worth what it has: nothing to gain
    torch.testing.assert_close(moved(shares, worth, 0.0), shares)
    if (worth > 0).any():
        factor = after / shares
        wanted = worth.clamp(min=0) / worth.clamp(min=0).sum() / shares
        order = wanted.clamp(0.25, 4).flatten().argsort()
        assert (factor.flatten()[order].diff() >= -1e-9 * factor.max()).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.sets(st.integers(0, 3)))
def test_shares_can_be_put_in_the_place_of_learned_ones(layers, kv_heads, seed, numbers):
    power = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 + 0.2
    kept = torch.stack([share**power for share in (0.05, 0.2, 0.5, 0.9)]).float()
    changed = with_shares(kept, {number: heads(layers, kv_heads, seed + number) for number in numbers})
    assert kept_shares_fault(changed, HeadShape("tiny", layers, kv_heads, kv_heads, 8, 100)) is None
    torch.testing.assert_close(changed.mean(dim=(1, 2)), kept.mean(dim=(1, 2)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_what_rows_are_worth_is_what_is_lost_without_them(arch):
    """Where the change is small, the loss with more and with fewer rows of one head differs by what slopes foresee."""
    loaded = load_tiny(arch)
    document = refining._read(loaded, SHORT)[0]
    with hiding(loaded.model) as hider:
        hider.rows = document.rows
        layers, kv_heads = len(document.rows), document.rows[0].keys.shape[0]
        counts = torch.full((layers, kv_heads), document.tokens // 2)
        found = moving.worth_of(hider, document, counts)
        measured = torch.zeros_like(found)
        for layer in range(layers):
            for head in range(kv_heads):
                lost = []
                for factor in (2**-0.5, 2**0.5):
                    changed = counts.clone()
                    changed[layer, head] = round(int(counts[layer, head]) * factor)
                    lost.append(moving.mean_loss(hider, [document], lambda _, own=changed: own))
                measured[layer, head] = lost[0] - lost[1]
    correlation = torch.corrcoef(torch.stack([found.flatten(), measured.flatten()]))[0, 1]
    assert correlation > 0.95
    assert 0.6 < float((found * measured).sum() / measured.square().sum()) * 0.6931 < 1.6  # per doubling


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_questions_at_once_are_answered_as_alone(arch, together, monkeypatch):
    loaded = load_tiny(arch)
    document = refining._read(loaded, SHORT)[0]
    of_one = document.query_heads * len(document.rows) * max(len(each.fed) for each in document.answers)
    monkeypatch.setattr(moving, "_LOGITS", together * of_one * (document.tokens + 60))
    tails = [each.fed for each in document.answers] + [document.answers[0].fed[:5]]
    lasts = [len(each.reference) for each in document.answers] + [3]
    counts = torch.randint(1, document.tokens, (len(document.rows), len(document.rows[0].keys)))
    with hiding(loaded.model) as hider, torch.no_grad():
        hider.rows = document.rows
        for said, tail, last in zip(hider.answers(tails, lasts, counts), tails, lasts, strict=True):
            torch.testing.assert_close(said, hider.logits(tail, last, counts[None])[0], atol=1e-4, rtol=1e-4)
        of_each = [moving._divergences(hider, [own], [full], counts) for own, full in _pairs(document)]
        mean = moving.mean_loss(hider, [document], lambda _: counts)
    assert mean == pytest.approx(float(torch.cat(of_each).mean()), rel=1e-4)
    assert sum(len(answers) for answers, _ in document.groups()) == len(document.answers)


def _pairs(document):
    return zip(document.answers, document.full, strict=True)


def test_losses_are_those_of_caches_with_these_budgets():
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    found = refine(loaded, profile, SHORT)
    kept = profile.reconstruction
    assert found.shares == tuple(share for share in kept.double().mean(dim=(1, 2)).tolist() if share < 0.3)
    asked = ProbeSettings(probes=9, lengths=(600,), needles_per_context=None, seed=3)
    first, context, *_ = ProbeBuilder(loaded.tokenizer, asked, max_positions=loaded.max_positions)
    for losses, share in zip(found.losses, found.shares, strict=True):
        assert len(losses) == 2
        tokens = len(context.context_ids)
        budget = round(share * (tokens - 3)) + 3
        plan = make_plan(loaded.model, profile, method="learned-kvzip", budget=budget, buffer=None)
        alone = [divergence_alone(loaded, plan, context, probe) for probe in context.probes]
        assert losses[0] == pytest.approx(sum(alone) / len(alone), rel=2e-2, abs=1e-5)
    assert found.probes == (len(first.probes), len(context.probes)) == (2, 2)


def test_budgets_are_moved_where_that_helps_on_other_probes(monkeypatch):
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    said = []
    found = refine(loaded, profile, SHORT, lambda done, total: said.append((done, total)))
    assert said == [(done, 2 * len(found.shares)) for done in range(2 * len(found.shares) + 1)]
    losses = iter([3.0, 2.0] * len(found.shares))
    monkeypatch.setattr(moving, "mean_loss", lambda *_: next(losses))
    better = refine(loaded, profile, SHORT)
    assert all(row == (3.0, 2.0) for row in better.losses)
    monkeypatch.setattr(moving, "mean_loss", lambda *_: 1.0)
    same = refine(loaded, profile, SHORT)
    for number in range(len(same.shares)):
        start = profile.reconstruction[number].double()
        torch.testing.assert_close(same.heads[number], start / start.sum())
        assert not torch.allclose(better.heads[number], same.heads[number])


def test_rounds_are_averaged(monkeypatch):
    """Two rounds that differ are met in the middle, geometrically."""
    rounds = iter([torch.tensor([[0.1, 0.9]]).double(), torch.tensor([[0.4, 0.6]]).double()])
    monkeypatch.setattr(moving, "moved", lambda *_: next(rounds))
    monkeypatch.setattr(moving, "worth_of", lambda *_: torch.zeros(1, 2))
    losses = iter([1.0, 0.5])
    monkeypatch.setattr(moving, "mean_loss", lambda *_: next(losses))
    found, lost = moving.Mover(None, [SimpleNamespace(tokens=9)], [], (0.5, 0.5)).move(
        torch.full((1, 2), 0.5).double(), lambda *_: None
    )
    assert lost == (1.0, 0.5)
    wanted = torch.tensor([[(0.1 * 0.4) ** 0.5, (0.9 * 0.6) ** 0.5]]).double()
    torch.testing.assert_close(found, wanted / wanted.sum())


@pytest.mark.parametrize("asked", [(), ("--refine",)])
def test_the_command_refines_and_says_what_that_brought(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(refining, "with_refining", partial(with_refining, settings=SHORT))
    monkeypatch.setattr("headprof.tuning.mixing.PROBES", 1)
    monkeypatch.setattr("headprof.tuning.mixing.LENGTH", 400)
    save_tiny(tmp_path / "tiny", chat=True)
    random_profile(tiny_model(), name="tiny").save(tmp_path / "p.safetensors")
    options = ("--model", "tiny", "--texts", "1", "--text-lengths", "320", "--add-to", "p.safetensors")
    done = headprof(tmp_path, "score", "--reconstruction", *asked, *options)
    assert done.returncode == 0, done.stderr
    assert "not refined refined" in " ".join(done.stderr.split())
    profile = HeadProfile.load(tmp_path / "p.safetensors")
    noted = json.loads(profile.metadata["reconstruction"])
    assert len(noted["refine_losses"][0]) == 2 and noted["mix_probes"] == 1
    told = " ".join(headprof(tmp_path, "profile", "show", "p.safetensors").stdout.split())
    before, after = noted["refine_losses"][0][0], min(noted["refine_losses"][0])
    assert f"budgets refined what is lost from {before:.3g} to {after:.3g}" in told
    assert kept_shares_fault(profile.kept_shares, profile.shape) is None


@pytest.mark.parametrize("wrong", [("--refine",), ("--no-refine",), ("--reconstruction", "--no-probes", "--refine")])
def test_refining_belongs_to_learned_budgets(tmp_path, wrong):
    refused = headprof(tmp_path, "score", "--model", "tiny", *wrong)
    assert refused.returncode == 2 and "repeated texts" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(("asked", "code"), [((), 0), (("--refine",), 2), (("--no-refine",), 0)])
def test_where_probes_do_not_fit_budgets_stay_as_they_were_learned(tmp_path, monkeypatch, asked, code):
    monkeypatch.setattr(refining, "with_refining", partial(with_refining, settings=replace(SHORT, length=4000)))
    monkeypatch.setattr("headprof.tuning.mixing.PROBES", 1)
    monkeypatch.setattr("headprof.tuning.mixing.LENGTH", 400)
    save_tiny(tmp_path / "tiny", chat=True, max_positions=2000)
    random_profile(tiny_model(), name="tiny").save(tmp_path / "p.safetensors")
    options = ("--model", "tiny", "--texts", "1", "--text-lengths", "320", "--add-to", "p.safetensors")
    done = headprof(tmp_path, "score", "--reconstruction", *asked, *options)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("Learned budgets are not refined for tiny." in " ".join(done.stderr.split())) == (asked == ())
    assert ("leave --refine away" in " ".join(done.stderr.split())) == (code == 2)
    noted = json.loads(HeadProfile.load(tmp_path / "p.safetensors").metadata["reconstruction"])
    assert "refine_losses" not in noted and noted["mix_probes"] == 1


def test_a_profile_says_what_refining_brought(monkeypatch):
    loaded = load_tiny()
    base = random_profile(loaded.model)
    profile = HeadProfile(
        "tiny", base.shape, base.scores, kept_shares=base.kept_shares, metadata={"reconstruction": '{"texts": 3}'}
    )
    refined = with_refining(profile, loaded, SHORT)
    noted = json.loads(refined.metadata["reconstruction"])
    assert noted["texts"] == 3 and noted["refine_probes"] == [2, 2]
    expected = with_shares(profile.reconstruction, dict(enumerate(refine(loaded, profile, SHORT).heads)))
    assert torch.equal(refined.kept_shares, expected)
