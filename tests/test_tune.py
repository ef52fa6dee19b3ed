"""Parameters tuned to a model: the contest between choices, what each loses by its slow twin, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.profiles import TUNED, random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_model

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.methods.table import find_method
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import ProfileError, UsageError
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.tuned import NOTE, Tuned
from headprof.tuning import judging
from headprof.tuning.judging import BUDGETS, JUDGES, Contest, TuneSettings, tune
from headprof.tuning.trials import known_losses

SHORT = TuneSettings(budgets=(16, 48), length=400, rounds=((2, 2), (1, 1)), seed=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))
def test_a_contest_keeps_the_best_and_those_that_are_pinned(pinned, others, kept, seed):
    choices = [{"window": number + 1} for number in range(pinned + others)]
    losses = torch.rand(4, len(choices), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    contest = Contest(list(choices), pinned)
    contest.take(losses)
    contest.keep(kept)
    left = [choices.index(choice) for choice in contest.choices]
    assert left[:pinned] == list(range(pinned)) and left == sorted(left)
    order = losses[:, pinned:].mean(dim=0).argsort(stable=True)[:kept] + pinned
    assert set(left[pinned:]) == set(order.tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_the_usual_choice_stays_unless_it_is_beaten_by_more_than_chance(pairs):
    contest = Contest([{}, {"window": 1}])
    contest.take(torch.tensor(pairs, dtype=torch.float64))
    gains = [before - after for before, after in pairs]
    mean = sum(gains) / len(gains)
    spread = (sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)) ** 0.5
    beaten = mean - spread / len(gains) ** 0.5
    if len(gains) < 2 or beaten < -1e-9:
        assert contest.winner() == {}
    elif beaten > 1e-9:
        assert contest.winner() == {"window": 1}


@torch.no_grad()
def loss_alone(loaded, plan, context, probe):
    """Of one plan's cache at one probe's answer: filled by itself, against no cache at all."""
    prompt, fed = [*context.context_ids, *probe.asked_ids], [*probe.reply_ids, *probe.answer_ids[:-1]]
    if not probe.reply_ids:
        prompt, fed = prompt[:-1], [prompt[-1], *fed]
    cache = HeadCache(plan)
    with attending_ragged(loaded.model):
        prefill(loaded.model, torch.tensor([prompt]), cache)
        said = loaded.model(torch.tensor([fed]), past_key_values=cache).logits[0]
    whole = loaded.model(torch.tensor([[*prompt, *fed]]), use_cache=False).logits[0]
    number = len(probe.answer_ids)
    own, other = (each[-number:].double().log_softmax(dim=-1) for each in (whole, said))
    return float((own.exp() * (own - other)).sum(dim=-1).mean())


def test_losses_are_those_of_each_cache_alone():
    loaded = load_tiny()
    profile = random_profile(loaded.model)
    plans = [make_plan(loaded.model, method="full", budget=1)]
    for options in ({}, {"window": 3, "kernel": 5, "shared": True}, {"temperature": 1.0}):
        plans.append(make_plan(loaded.model, profile, method="headkv-r2", budget=20, buffer=None, **options))
    asked = ProbeSettings(probes=3, lengths=(400,), needles_per_context=1, seed=1)
    for context in ProbeBuilder(loaded.tokenizer, asked, max_positions=loaded.max_positions):
        found = known_losses(loaded, plans, context)
        alone = [[loss_alone(loaded, plan, context, probe) for plan in plans] for probe in context.probes]
        torch.testing.assert_close(found, torch.tensor(alone, dtype=torch.float64), rtol=1e-3, atol=1e-6)
        assert len({round(loss, 6) for loss in found[0].tolist()}) == len(plans)


def test_all_that_is_tried_can_be_asked_for():
    method = find_method("headkv-tuned")
    for choice in (*JUDGES, *BUDGETS):
        assert method.with_options(**choice) != method
    assert len({repr(choice) for choice in JUDGES}) == len(JUDGES)


def test_tuning_tells_what_was_tried(monkeypatch):
    loaded = load_tiny()
    monkeypatch.setattr(judging, "JUDGES", ({"window": 1}, {"window": 4, "kernel": 1}, {"shared": True}))
    monkeypatch.setattr(judging, "BUDGETS", ({"temperature": 0.0}, {"scores": "write"}))
    profile, said = random_profile(loaded.model), []
    found = tune(loaded, profile, SHORT, lambda done, total: said.append((done, total)))
    assert found == tune(loaded, profile, SHORT)
    assert said[0] == (0, 6) and said[-1] == (6, 6)
    assert found.probes == 3 and found.budgets == (16, 48) and found.length == 400 and found.seed == 3
    assert 0 <= found.loss <= found.usual_loss <= 1 and "scores" not in found.options
    assert (found.loss == found.usual_loss) or found.options


def test_a_method_has_the_parameters_of_the_profile_and_those_that_are_given():
    model = tiny_model()
    profile = random_profile(model)
    plain = make_plan(model, profile, method="headkv-r2", budget=32, **TUNED.options)
    tuned = make_plan(model, profile, method="headkv-tuned", budget=32)
    assert tuned.method.options() == plain.method.options() and tuned.method != plain.method
    assert torch.equal(tuned.allocation(400), plain.allocation(400))
    for given_so in ("headkv-tuned:window=16:kernel=11", "headkv-tuned:window=16"):
        options = {} if "kernel" in given_so else {"kernel": 11}
        method = make_plan(model, profile, method=given_so, budget=32, **options).method
        assert (method.importance.window, method.importance.kernel, method.importance.shared) == (16, 11, True)
    itself = find_method("headkv-tuned").with_options(kernel=9)
    method = make_plan(model, profile, method=itself, budget=32).method
    assert (method.importance.window, method.importance.kernel) == (5, 9)


def test_a_method_that_is_not_in_the_table_has_them_too():
    model = tiny_model()
    own = replace(find_method("headkv-tuned"), reduction=find_method("ems").reduction)
    method = make_plan(model, random_profile(model), method=own, budget=32).method
    assert (method.importance.window, method.importance.kernel, method.importance.shared) == (5, 3, True)
    assert method.reduction == own.reduction


def test_a_profile_that_says_nothing_of_use_is_refused():
    model = tiny_model()
    profile = random_profile(model)
    with pytest.raises(ProfileError, match=r"^The profile of tiny is not tuned: run `headprof tune --model tiny`, or"):
        make_plan(model, replace(profile, metadata={}), method="headkv-tuned")
    for wrong in ("{", "[]", "{}", json.dumps({**json.loads(TUNED.note()), "options": {"window": [1]}})):
        with pytest.raises(ProfileError, match="says of its tuned parameters what cannot be: run"):
            make_plan(model, replace(profile, metadata={NOTE: wrong}), method="headkv-tuned")
    strange = replace(profile, metadata={NOTE: replace(TUNED, options={"windows": 3}).note()})
    with pytest.raises(UsageError, match="This method has no parameter 'windows'"):
        make_plan(model, strange, method="headkv-tuned")


def test_what_answers_depend_on_is_in_the_digest():
    profile = random_profile(tiny_model())
    other = replace(profile, metadata={NOTE: replace(TUNED, options={}).note()})
    same = replace(profile, metadata={NOTE: replace(TUNED, loss=0.05, date="2026-01-01").note()})
    assert len({profile.digest(), other.digest(), replace(profile, metadata={}).digest()}) == 3
    assert same.digest() == profile.digest()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budgets", "16,x"), "A budget of 'x' cannot be tried: give tokens per KV head"),
        (("--budgets", "16,400", "--length", "400"), "A budget of 400 tokens leaves nothing of 400 out: lower"),
        (("--budgets", "16,2"), "with a budget of 2: give --budgets of at least the 3 tokens always kept"),
        (("--length", "9k"), "use at most 4096"),
        (("absent.safetensors",), "There is no profile file at absent.safetensors"),
        (("retrieval.safetensors",), "holds no reasoning scores"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, arguments, said):
    save_tiny(tmp_path / "tiny", chat=True)
    random_profile(tiny_model(), kinds=("retrieval",), name="tiny").save(tmp_path / "retrieval.safetensors")
    random_profile(tiny_model(), name="tiny").save(tmp_path / "p.safetensors")
    before = (tmp_path / "p.safetensors").read_bytes()
    named = () if arguments[0].endswith(".safetensors") else ("p.safetensors",)
    done = headprof(tmp_path, "tune", "--model", "tiny", *named, *arguments)
    assert done.returncode in (1, 2) and done.stdout == "" and "Traceback" not in done.stderr
    assert said in " ".join(done.stderr.split())
    assert (tmp_path / "p.safetensors").read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("length", [400, 9000])
def test_score_tunes_what_it_has_scored_where_it_can(tmp_path, monkeypatch, length):
    monkeypatch.setattr(judging, "JUDGES", ({"window": 1, "kernel": 1},))
    monkeypatch.setattr(judging, "BUDGETS", ())
    monkeypatch.setattr(judging, "TuneSettings", lambda: replace(SHORT, length=length))
    save_tiny(tmp_path / "tiny", chat=True)
    asked = ("--probes", "4", "--lengths", "512", "--include-failed", "-o", "p.safetensors")
    done = headprof(tmp_path, "score", "--model", "tiny", *asked)
    assert done.returncode == 0 and done.stdout == "p.safetensors\n", done.stderr
    said, tuned = " ".join(done.stderr.split()), Tuned.of(HeadProfile.load(tmp_path / "p.safetensors").metadata)
    assert (tuned is None) == (length == 9000) == ("The profile is not tuned to tiny. A length of 9000" in said)
    assert (tuned is not None) == ("Of the right answers' probability is lost, on 3 probes of 400 tokens" in said)
    untuned = headprof(tmp_path, "score", "--model", "tiny", *asked, "--no-tune")
    assert untuned.returncode == 0 and not Tuned.of(HeadProfile.load(tmp_path / "p.safetensors").metadata)


def test_only_what_is_not_usual_is_kept():
    assert judging._unusual({"window": 16, "kernel": 5, "shared": False, "temperature": 0.5}) == {"kernel": 5}


def test_the_command_tunes_and_generate_uses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "JUDGES", ({"window": 1, "kernel": 1},))
    monkeypatch.setattr(judging, "BUDGETS", ())
    monkeypatch.setattr(judging, "TuneSettings", partial(TuneSettings, rounds=((1, 1),)))
    save_tiny(tmp_path / "tiny", chat=True)
    replace(random_profile(tiny_model(), name="tiny"), metadata={"date": "x"}).save(tmp_path / "p.safetensors")
    asked = ("--model", "tiny", "--prompt", "Where is the boat?", "--profile", "p.safetensors", "--max-new-tokens", "2")
    assert "headkv-r2, budget 64" in headprof(tmp_path, "generate", *asked).stderr
    options = ("--length", "400", "--budgets", "16", "--no-refine")
    done = headprof(tmp_path, "tune", "p.safetensors", "--model", "tiny", *options)
    assert done.returncode == 0 and done.stdout == "p.safetensors\n", done.stderr
    assert "joins them" not in done.stderr
    random_profile(tiny_model(), name="other").save(tmp_path / "other.safetensors")
    other = headprof(tmp_path, "tune", "other.safetensors", "--model", "tiny", *options)
    assert "are other's; what is found for tiny joins them" in " ".join(other.stderr.split())
    profile = HeadProfile.load(tmp_path / "p.safetensors")
    tuned = Tuned.of(profile.metadata)
    assert tuned is not None and tuned.budgets == (16,) and profile.metadata["date"] == "x"
    assert "headkv-tuned, budget 64" in headprof(tmp_path, "generate", *asked).stderr
    told = " ".join(headprof(tmp_path, "profile", "show", "p.safetensors").stdout.split())
    assert f"{tuned.usual_loss:.1%} as headkv-r2: {tuned.probes} probes of 400 tokens at budgets of 16" in told
