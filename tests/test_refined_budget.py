"""Budgets refined for one model, the question known: their sums, their place in a profile, and how they are found."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.commands import headprof
from support.profiles import TUNED, random_profile, random_rows, small_profile
from support.tiny_models import TEXT, load_tiny, save_tiny, tiny_model
from test_tune import loss_alone

from headprof import ask, compress_document, load_document, save_document
from headprof.cli import tune as tune_command
from headprof.compression.methods.refined_budget import RefinedBudget, shares_at
from headprof.compression.methods.table import find_method
from headprof.compression.request import question_method
from headprof.compression.session import make_plan
from headprof.errors import CacheError, ProfileError, UsageError
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.tuned import NOTE, Tuned
from headprof.tuning import refining_known
from headprof.tuning.judging import BUDGETS, TuneSettings
from headprof.tuning.refining_known import RefineSettings, refine, with_refined_rows
from headprof.utils.tensor_files import with_checksum

SHORT = RefineSettings(budgets=(16, 48), probes=2, checks=2, steps=(0.5, 0.3), length=600, seed=3)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.integers(4, 300), st.integers(5, 500), st.booleans()
)
def test_budgets_sum_exactly(layers, kv_heads, seed, budget, context_length, several):
    rows = random_rows(
        HeadShape("tiny", layers, kv_heads, kv_heads, 8, 100), seed, (20.0, 50.0) if several else (30.0,)
    )
    sizes = {"context_length": context_length, "always_kept": 3}
    counts = RefinedBudget().allocate(rows, budget=budget, **sizes)
    assert int(counts.sum()) == min(budget, context_length) * counts.numel()
    assert int(counts.min()) >= min(3, context_length) and int(counts.max()) <= context_length
    if 4 < budget < context_length:
        fewer = RefinedBudget().allocate(rows, budget=budget - 1, **sizes)
        assert budget <= 50 or (fewer <= counts).all()  # beyond what was refined nobody loses


def test_at_its_budgets_heads_have_its_rows():
    rows = random_rows(HeadShape("tiny", 3, 2, 2, 8, 100), 4, (16.0, 64.0))
    for number, budget in enumerate((16, 64)):
        counts = RefinedBudget().allocate(rows, budget=budget, context_length=10**6, always_kept=0)
        assert (counts - rows[number]).abs().max() < 1
    low, high = (shares_at(rows, budget) for budget in (16, 64))
    torch.testing.assert_close(shares_at(rows, 32), (low + high) / 2)
    torch.testing.assert_close(shares_at(rows, 5), low)
    torch.testing.assert_close(shares_at(rows, 500), high)
    above = RefinedBudget().allocate(rows, budget=164, context_length=10**6, always_kept=0)
    assert (above - 100 - rows[1]).abs().max() < 1


def test_a_method_has_them_and_the_tuned_judge():
    model = tiny_model()
    profile = random_profile(model)
    plan = make_plan(model, profile, method="headkv-refined", budget=32)
    tuned = make_plan(model, profile, method="headkv-tuned", budget=32)
    assert plan.method.importance == tuned.method.importance != find_method("headkv-refined").importance
    wanted = RefinedBudget().allocate(
        profile.refined, budget=32, context_length=300, always_kept=plan.method.always_kept
    )
    assert torch.equal(plan.allocation(300), wanted) and not torch.equal(plan.allocation(300), tuned.allocation(300))
    given_one = make_plan(model, profile, method="headkv-refined:window=7", budget=32).method.importance
    assert given_one == replace(tuned.method.importance, window=7)
    lacking = replace(profile, refined_rows=None)
    with pytest.raises(ProfileError, match="holds no refined budgets: run `headprof tune --model tiny`"):
        make_plan(model, lacking, method="headkv-refined", budget=32)


@pytest.mark.parametrize("choice", BUDGETS)
def test_how_tuned_budgets_follow_scores_is_nothing_to_them(choice):
    model = tiny_model()
    profile = random_profile(model)
    other = replace(profile, metadata={NOTE: replace(TUNED, options={"window": 5, **choice}).note()})
    method = make_plan(model, other, method="headkv-refined", budget=32).method
    assert method.importance.window == 5 and method.budget == RefinedBudget()


def test_a_profile_keeps_them(tmp_path):
    rows = random_rows(small_profile().shape)
    profile = small_profile(refined_rows=rows)
    profile.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert file.metadata()["format_version"] == "6"
    assert torch.equal(HeadProfile.load(tmp_path / "p.safetensors").refined, rows)
    assert profile.digest() != small_profile().digest() != small_profile(refined_rows=rows * 2).digest()
    wrong = {
        "float64": rows.double(),
        "have shape": rows[:, :1],
        "not all numbers of rows": -rows,
        "twice": rows[[0, 0]],
        "nan": rows * float("nan"),
    }
    for name, each in wrong.items():
        with pytest.raises(ValueError, match="refined budgets" if name == "nan" else name):
            small_profile(refined_rows=each)


def test_what_is_asked_for_without_a_method(tmp_path):
    profile = random_profile(tiny_model())
    held = {
        "headkv-refined": profile,
        "headkv-tuned": replace(profile, refined_rows=None),
        "headkv-r2": replace(profile, refined_rows=None, metadata={}),
    }
    for name, each in held.items():
        each.save(tmp_path / f"{name}.safetensors")
        assert question_method("tiny", tmp_path / f"{name}.safetensors") == name


def test_a_document_goes_on_by_them(tmp_path):
    loaded = load_tiny()
    plan = make_plan(loaded.model, random_profile(loaded.model), method="headkv-refined", budget=24, buffer=6)
    cache, path = compress_document(loaded, TEXT, plan), tmp_path / "doc.kv.safetensors"
    assert torch.equal(cache.lengths[:, 0], plan.allocation(cache.get_seq_length()))
    save_document(cache, path, loaded)
    again, _ = load_document(path, loaded)
    assert torch.equal(again.plan.scores, plan.scores) and again.plan.method == plan.method
    said = [ask(loaded, each, "How many boats?", max_new_tokens=20).text for each in (cache, again)]
    assert said[0] == said[1]
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    changed = tensors | {"scores": tensors["scores"].flip(0).contiguous()}
    save_file(changed, path, metadata=with_checksum(changed, metadata))
    with pytest.raises(CacheError, match="its scores are of the same budget twice"):
        load_document(path, loaded)


def test_losses_are_those_of_caches_with_these_budgets():
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    said = []
    found = refine(loaded, profile, SHORT, lambda done, total: said.append((done, total)))
    assert said == [(done, 8) for done in range(9)]
    assert found.budgets == (16, 48) and found.probes == (2, 2) and found.rows.dtype == torch.float32
    torch.testing.assert_close(found.rows.mean(dim=(1, 2)), torch.tensor([16.0, 48.0]))
    asked = ProbeSettings(probes=4, lengths=(600,), needles_per_context=1, seed=3)
    contexts = list(ProbeBuilder(loaded.tokenizer, asked, max_positions=loaded.max_positions))
    last = [(context, probe) for context in contexts for probe in context.probes][2:]
    refined = replace(profile, refined_rows=found.rows)
    for budget, losses in zip(found.budgets, found.losses, strict=True):
        for name, loss in (("headkv-tuned", losses[0]), ("headkv-refined", min(losses))):
            plan = make_plan(loaded.model, refined, method=name, budget=budget, buffer=None)
            alone = [loss_alone(loaded, plan, context, probe) for context, probe in last]
            assert loss == pytest.approx(sum(alone) / len(alone), rel=5e-2, abs=1e-5), name


def test_prompts_may_wait_in_the_hosts_memory(monkeypatch):
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    moved, to = [], refining_known.ReadPrompt.to
    monkeypatch.setattr(refining_known.ReadPrompt, "to", lambda own, device: moved.append(device) or to(own, device))
    found = refine(loaded, profile, SHORT)
    assert "cpu" not in moved and moved
    monkeypatch.setattr(refining_known, "free_bytes", lambda device: 0)
    again = refine(loaded, profile, SHORT)
    assert moved.count("cpu") == 4 and torch.equal(found.rows, again.rows)


def test_budgets_that_leave_nothing_to_choose_are_refused():
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    with pytest.raises(UsageError, match="nothing is to be chosen"):
        refine(loaded, profile, replace(SHORT, budgets=(1, 2, 700)))
    with pytest.raises(ProfileError, match="is not tuned"):
        refine(loaded, replace(profile, metadata={}), SHORT)


def test_a_profile_says_what_it_brought():
    loaded = load_tiny()
    profile = with_refined_rows(random_profile(loaded.model), loaded, SHORT)
    tuned = Tuned.of(profile.metadata)
    assert tuned.refined.budgets == (16, 48) and tuned.refined.probes == (2, 2) and tuned.refined.length == 600
    assert [len(row) for row in tuned.refined.losses] == [2, 2]
    noted = json.loads(profile.metadata["tuned"])
    for name, wrong in (
        ("losses", [[1.0]]),
        ("losses", [[], []]),
        ("probes", [1]),
        ("budgets", [-1, 2]),
        ("length", "x"),
    ):
        changed = {**noted, "refined": {**noted["refined"], name: wrong}}
        assert Tuned.of({"tuned": json.dumps(changed)}) is None
    assert Tuned.of({"tuned": json.dumps({**noted, "refined": None})}) == replace(tuned, refined=None)


def test_the_command_refines_and_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr("headprof.tuning.judging.JUDGES", ({"window": 4},))
    monkeypatch.setattr("headprof.tuning.judging.BUDGETS", ({"temperature": 1.0},))
    monkeypatch.setattr("headprof.tuning.judging.TuneSettings", partial(TuneSettings, rounds=((1, 1),)))
    short = partial(RefineSettings, probes=2, checks=1, steps=(0.5,))
    monkeypatch.setattr(refining_known, "RefineSettings", short)
    save_tiny(tmp_path / "tiny", chat=True)
    random_profile(tiny_model(), name="tiny").save(tmp_path / "p.safetensors")
    options = ("p.safetensors", "--model", "tiny", "--length", "320", "--budgets", "16")
    done = headprof(tmp_path, "tune", *options)
    assert done.returncode == 0, done.stderr
    assert "Budgets refined on 2 probes" in " ".join(done.stderr.split())
    profile = HeadProfile.load(tmp_path / "p.safetensors")
    assert profile.refined.double().mean(dim=(1, 2)).round().tolist() == [16, 32]
    assert "refined budgets" in headprof(tmp_path, "profile", "show", "p.safetensors").stdout
    done = headprof(tmp_path, "tune", *options, "--no-refine")
    assert done.returncode == 0 and "go with its earlier parameters" in " ".join(done.stderr.split())
    assert HeadProfile.load(tmp_path / "p.safetensors").refined_rows is None


@pytest.mark.parametrize("had", [False, True])
def test_what_cannot_be_refined_is_tuned_all_the_same(tmp_path, monkeypatch, had):
    loaded = load_tiny()
    said = []
    monkeypatch.setattr(tune_command.terminal, "remark", said.append)
    monkeypatch.setattr("headprof.tuning.judging.with_tuning", lambda profile, *_, **__: without)
    profile, target = random_profile(loaded.model), tmp_path / "p.safetensors"
    without = replace(profile, refined_rows=None)
    profile = profile if had else without
    assert (profile.refined_rows is not None) == had
    asked = replace(tune_command._settings(tune_command.TuneOptions(length="320"), 0), budgets=(1,))
    assert tune_command.tune_profile(loaded, profile, target, asked, refine=True) is without
    assert "not refined" in said[0] and HeadProfile.load(target).digest() == without.digest()
    assert ["go with its earlier parameters" in each for each in said[1:]] == [True] * had
