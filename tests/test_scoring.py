"""The scoring run: shared passes against single ones, every architecture, resuming, and what a profile says of it."""

import json
import random

import pytest
import torch
from support.probe_builders import builder_for
from support.tiny_models import ARCHITECTURES, load_tiny

from headprof.errors import InterruptedRun, ProbeError, UsageError
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.probes.families import choose_families
from headprof.probes.haystack import Haystack
from headprof.profile.head_profile import HeadProfile
from headprof.scoring import run
from headprof.scoring import shared_context as asking
from headprof.scoring.averages import make_profile
from headprof.scoring.estimators import reasoning_score, retrieval_score
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import Prober, ProbeResult
from headprof.scoring.run import StopRule, score_heads
from headprof.scoring.shared_context import SharedContext, teacher_forced
from headprof.utils.resuming import KeptResults
from headprof.utils.team import Team


def slow_scores(loaded, context, probe):
    """One probe alone, from whole attention matrices, estimated head by head."""
    ids = torch.tensor([[*context.context_ids, *probe.question_ids, *probe.answer_ids[:-1]]])
    loaded.model.set_attn_implementation("eager")
    output = loaded.model(ids, output_attentions=True)
    count = len(probe.answer_ids)
    rows = torch.stack([attention[0, :, -count:].float() for attention in output.attentions])
    in_span = torch.zeros(ids.shape[1], dtype=torch.bool)
    in_span[slice(*probe.answer_span)] = True
    answer = torch.tensor(probe.answer_ids)
    scores = [
        retrieval_score(layer, in_span, ids[0], answer)
        if probe.kind == "retrieval"
        else reasoning_score(layer, in_span)
        for layer in rows
    ]
    answered = output.logits[0, -count:].argmax(dim=-1).tolist() == answer.tolist()
    return torch.stack(scores), answered


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_scores_equal_whole_attention_matrices(arch, num_kv_heads):
    loaded = load_tiny(arch, num_kv_heads=num_kv_heads)
    context = builder_for(loaded).context(1)
    with Prober(loaded.model, loaded.shape) as prober:
        results = prober.run(context)
    assert len(results) == len(context.probes) == 4
    for probe, result in zip(context.probes, results, strict=True):
        scores, answered = slow_scores(loaded, context, probe)
        torch.testing.assert_close(result.scores, scores, atol=1e-5, rtol=1e-3)
        assert (result.answered, result.kind, result.family) == (answered, probe.kind, probe.family)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("attn", [None, "eager"])
def test_shared_passes_equal_single_ones(arch, attn):
    loaded = load_tiny(arch, **({"attn": attn} if attn else {}))
    context = builder_for(loaded).context(0)
    with Prober(loaded.model, loaded.shape) as prober:
        assert prober._context.shares_passes
        together = prober.run(context)
        prober._context.shares_passes = False
        alone = prober.run(context)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(a.write, b.write, atol=1e-5, rtol=1e-3)
        assert a.answered == b.answered


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "mistral"])
def test_a_short_sliding_window_hides_the_same_from_questions_asked_together(arch):
    """A window that ends inside a suffix, and one that reaches back into the context."""
    for window in (5, 40):
        loaded = load_tiny(arch, sliding_window=window)
        context = SharedContext(loaded.model, "sdpa")
        context.read(range(3, 63))
        assert context.shares_passes
        suffixes = [tuple(range(100, 110)), tuple(range(200, 225)), (300,)]
        rows = torch.cat([torch.arange(10), torch.arange(10, 35), torch.tensor([35])])
        together = context.ask(suffixes, rows)
        alone = torch.cat([loaded.model(torch.tensor([[*range(3, 63), *s]])).logits[0, 60:] for s in suffixes])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shared_beginning_is_not_read_twice(arch, monkeypatch):
    loaded = load_tiny(arch)
    monkeypatch.setattr(asking, "_CHUNK", 16)
    context, fed = SharedContext(loaded.model, "sdpa"), []
    extend = SharedContext.extend
    monkeypatch.setattr(SharedContext, "extend", lambda self, ids: fed.append(len(ids)) or extend(self, ids))
    suffix = [(400, 401)]
    for ids in (
        [*range(3, 103)],
        [*range(3, 63), *range(200, 240)],  # 60 alike
        [*range(3, 63), *range(200, 230)],  # the beginning of the one before
        [*range(300, 380)],  # nothing alike
    ):
        context.read(ids, anew=False)
        expected = loaded.model(torch.tensor([[*ids, *suffix[0]]])).logits[0, -2:]
        torch.testing.assert_close(context.ask(suffix, torch.arange(2)), expected, atol=1e-5, rtol=1e-4)
    assert fed == [100, 16, 16, 8, 1, 80]
    context.read([*range(300, 380)])
    assert fed[-1] == 80  # anew: all of it again


def test_contexts_that_share_a_filler_are_scored_as_if_alone():
    loaded = load_tiny()
    settings = ProbeSettings(probes=4, lengths=(900,), needles_per_context=1, depths_per_filler=4)
    builder = ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
    with Prober(loaded.model, loaded.shape) as prober:
        contexts = list(builder)
        alone = [prober.run(context)[0] for context in contexts]
        shared = [prober.run(context, anew=number == 0)[0] for number, context in enumerate(contexts)]
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(a.write, b.write, atol=1e-5, rtol=1e-3)


def test_greedy_answers_are_the_models_own():
    loaded = load_tiny()
    context = builder_for(loaded, probes=2, pack=2).context(0)
    with Prober(loaded.model, loaded.shape, "greedy", loaded.tokenizer) as prober:
        results = prober.run(context)
        with torch.inference_mode():
            said = prober._greedy_answer(context.probes[0])
        assert prober._context.cache.get_seq_length() == len(context.context_ids)
    prompt = torch.tensor([[*context.context_ids, *context.probes[0].question_ids]])
    expected = loaded.model.generate(prompt, max_new_tokens=len(said), do_sample=False, pad_token_id=2)
    assert list(said) == expected[0, prompt.shape[1] :].tolist()
    assert [result.kind for result in results] == [probe.kind for probe in context.probes]


class Stop(Exception):
    """Stands for whatever ends a run too early."""


def stop_after(probes):
    def on_progress(now):
        if now.done >= probes:
            raise Stop

    return on_progress


def assert_same(one, other):
    assert one.probes_used == other.probes_used and one.metadata["accuracy"] == other.metadata["accuracy"]
    assert one.kinds == other.kinds == ("retrieval", "reasoning", "write")
    for which in one.kinds:
        assert torch.equal(one.scores[which], other.scores[which])
        assert torch.equal(one.standard_errors[which], other.standard_errors[which])
        assert all(map(torch.equal, one.intervals[which], other.intervals[which]))


def test_a_run_resumes_to_identical_tensors(tmp_path):
    loaded = load_tiny()
    builder = builder_for(loaded, probes=24)
    whole = score_heads(loaded, builder, include_failed=True)
    file = tmp_path / "run.probes.safetensors"
    options = {"include_failed": True, "results_path": file}
    with pytest.raises(Stop):
        score_heads(loaded, builder, **options, on_progress=stop_after(12))
    seen = []
    resumed = score_heads(loaded, builder, **options, resume=True, on_progress=lambda now: seen.append(now.done))
    assert seen == [16, 16, 20, 24, 24]
    assert_same(resumed, whole)
    assert resumed.probes_used == {"retrieval": 12, "reasoning": 12, "write": 24}
    again = score_heads(loaded, builder, **options, resume=True, on_progress=lambda now: seen.append(now.done))
    assert seen[5:] == [16, 24]  # nothing was left to ask
    assert_same(again, whole)


@pytest.mark.parametrize("pack", [4, 1])
def test_a_run_for_more_probes_adds_to_what_is_there(tmp_path, pack, monkeypatch):
    loaded = load_tiny()

    def builder(probes):
        settings = ProbeSettings(probes, (900,), needles_per_context=pack, depths_per_filler=8 if pack == 1 else 1)
        return ProbeBuilder(loaded.tokenizer, settings, max_positions=4096)

    options = {"include_failed": True, "results_path": tmp_path / "run.probes.safetensors"}
    short = score_heads(loaded, builder(18), **options)
    asked, run = [], Prober.run
    monkeypatch.setattr(
        Prober, "run", lambda self, context, **k: asked.append(context.index) or run(self, context, **k)
    )
    longer = score_heads(loaded, builder(30), **options, resume=True)
    assert asked == ([4, 5, 6, 7] if pack == 4 else list(range(16, 30)))  # what was not full is asked anew
    assert_same(longer, score_heads(loaded, builder(30), include_failed=True))
    asked.clear()
    assert_same(
        score_heads(loaded, builder(16), **options, resume=True), score_heads(loaded, builder(16), include_failed=True)
    )
    assert_same(short, score_heads(loaded, builder(18), include_failed=True))


def test_a_run_stops_when_its_ranking_is_stable(tmp_path, monkeypatch):
    loaded = load_tiny()
    builder = builder_for(loaded, probes=200, pack=2, length=500)
    monkeypatch.setattr(run, "expected_change", lambda values, *_: 1.5 / len(values))
    seen = []
    options = {"include_failed": True, "results_path": tmp_path / "run.probes.safetensors"}
    rule = StopRule(top=3, tolerance=0.1)
    profile = score_heads(loaded, builder, **options, stop=rule, on_progress=seen.append)
    # Of each kind there are 4 new probes a round of 4 contexts of 2: 1.5 / 16 is the first not above 0.1.
    assert profile.probes_used == {"retrieval": 16, "reasoning": 16, "write": 32}
    assert seen[-1].done == 32 and seen[-1].change == {"retrieval": 1.5 / 16, "reasoning": 1.5 / 16}
    noted = profile.settings
    assert noted["asked"] == 32 and noted["probes"] == 200
    assert noted["until_stable"] == {"top": 3, "tolerance": 0.1, "change": seen[-1].change, "stable": True}
    assert_same(score_heads(loaded, builder, **options, stop=rule, resume=True), profile)
    never = score_heads(loaded, builder_for(loaded, probes=8, pack=2, length=500), include_failed=True, stop=rule)
    assert never.settings["until_stable"]["stable"] is False and never.settings["until_stable"]["change"] == {}


def test_results_of_another_run_are_refused(tmp_path):
    loaded, file = load_tiny(), tmp_path / "p"
    kept = KeptResults({"key": 1}, ProbesFile(file))
    kept.start(False, Team())
    with kept.keeping():
        pass
    assert not file.exists()  # nothing to keep yet
    with kept.keeping():
        kept.add({3: [ProbeResult("retrieval", "code", True, torch.rand(2, 4))]})
    again = KeptResults({"key": 1}, ProbesFile(file))
    again.load()
    assert list(again.results) == [3] and torch.equal(again.results[3][0].scores, kept.results[3][0].scores)
    assert again.count_on_disk() == 1 and KeptResults({"key": 2}, ProbesFile(file)).count_on_disk() == 0
    with pytest.raises(UsageError, match=r"or other settings \(version\).*choose another file with -o"):
        score_heads(loaded, builder_for(loaded), results_path=file, resume=True)
    file.write_bytes(b"junk")
    assert again.count_on_disk() == 0
    with pytest.raises(UsageError, match="cannot be read"):
        again.load()


def test_what_differs_from_the_run_before_is_named(tmp_path):
    loaded, file = load_tiny(), tmp_path / "p"
    score_heads(loaded, builder_for(loaded), include_failed=True, results_path=file)
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        score_heads(loaded, builder_for(loaded, seed=1), results_path=file, resume=True)
    with pytest.raises(UsageError, match=r"other settings \(needles per context\)"):
        score_heads(loaded, builder_for(loaded, pack=2), results_path=file, resume=True)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)
    with pytest.raises(UsageError, match=r"other settings \(weights\)"):
        score_heads(loaded, builder_for(loaded), results_path=file, resume=True)


def test_what_a_run_is_made_of_is_named_where_it_is_the_users():
    tokenizer, settings = load_tiny().tokenizer, ProbeSettings(4, (512,), needles_per_context=1)
    needles = [family.sample(random.Random(0)) for family in choose_families(None)[:2]]
    texts = [Haystack(text=["Rain fell on the roof."] * 9), Haystack(text=["Rain fell on the wall."] * 9)]
    pairs = [(one, two) for one in (None, needles, needles[::-1]) for two in (None, *texts)]
    made = [ProbeBuilder(tokenizer, settings, max_positions=4096, needles=one, haystack=two) for one, two in pairs]
    assert made[0].texts == "" and len({each.texts for each in made}) == len(made)
    again = ProbeBuilder(tokenizer, settings, max_positions=4096, needles=[*needles], haystack=texts[1])
    assert again.texts == made[pairs.index((needles, texts[1]))].texts


def test_ctrl_c_keeps_the_results_and_says_how_to_go_on(tmp_path):
    loaded, file = load_tiny(), tmp_path / "p.probes.safetensors"

    def interrupt(now):
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match=r"results of 4 probes are kept in .* with --resume"):
        score_heads(loaded, builder_for(loaded, probes=24), results_path=file, on_progress=interrupt)
    with pytest.raises(InterruptedRun, match="before anything"):
        score_heads(loaded, builder_for(loaded, probes=24), on_progress=interrupt)


def results_of(kind, values, answered):
    return [
        ProbeResult(kind, f"{kind}-family", right, torch.full((2, 4), float(value)))
        for value, right in zip(values, answered, strict=True)
    ]


def test_profile_averages_the_answered_probes_and_counts_the_others():
    loaded = load_tiny()
    values = [1, 2, 3, 4, 5, 6, 7, 8, 100, 100]
    results = results_of("retrieval", values, [True] * 8 + [False] * 2)
    settings = ProbeSettings(probes=10, seed=5)
    profile = make_profile(loaded, settings, results)
    assert profile.retrieval[0, 0] == 4.5
    assert profile.standard_errors["retrieval"][1, 3] == pytest.approx((6.0**0.5) / 8**0.5)
    assert profile.probes_used == {"retrieval": 8} and list(profile.scores) == ["retrieval"]
    assert json.loads(profile.metadata["accuracy"]) == {"retrieval-family": [8, 10]}
    assert profile.metadata["seed"] == "5"
    everything = make_profile(loaded, settings, results, include_failed=True)
    assert everything.probes_used == {"retrieval": 10} and everything.retrieval[0, 0] == pytest.approx(23.6)


def test_how_sure_a_score_is_stays_unknown_with_one_context(tmp_path):
    loaded, values = load_tiny(), [1, 2, 3, 4, 5, 6, 7, 8]
    results = results_of("retrieval", values, [True] * 8)
    one = make_profile(loaded, ProbeSettings(probes=8), results, clusters=[0] * 8)
    two = make_profile(loaded, ProbeSettings(probes=8), results, clusters=[0] * 4 + [1] * 4)
    assert not one.standard_errors and not one.intervals and one.retrieval[0, 0] == 4.5
    assert two.standard_errors["retrieval"].min() > 0 and "retrieval" in two.intervals
    one.save(tmp_path / "one.safetensors")
    assert not HeadProfile.load(tmp_path / "one.safetensors").intervals


@pytest.mark.parametrize("answered", [0, 7])
def test_too_few_answered_probes_are_an_error(answered):
    loaded = load_tiny()
    results = results_of("reasoning", [1.0] * 20, [True] * answered + [False] * (20 - answered))
    with pytest.raises(ProbeError, match=f"answered {answered} of 20 reasoning probes"):
        make_profile(loaded, ProbeSettings(probes=20), results)


@pytest.mark.long
@pytest.mark.model
def test_smollm2_scores_are_found_in_the_known_place(smollm2):
    """Few heads carry retrieval, they lie in the upper half of the layers, and packed probes are mostly answered."""
    profile = score_heads(smollm2, builder_for(smollm2, probes=32, pack=8))
    accuracy = json.loads(profile.metadata["accuracy"])
    assert profile.probes_used["retrieval"] >= 12 and sum(asked for _, asked in accuracy.values()) == 32
    assert 0.02 < (profile.retrieval > 0.1).float().mean() < 0.2
    assert all(layer >= 12 for layer, _, _ in profile.top_heads("retrieval", 5))
    assert profile.retrieval.max() > 0.5


def test_answers_are_predicted_by_the_tokens_before_theirs():
    questions, answers = [(1, 2, 3), (4,)], [(5, 6), (7,)]
    suffixes, rows = teacher_forced(questions, answers)
    assert suffixes == [(1, 2, 3, 5), (4,)]
    assert [each.tolist() for each in rows] == [[2, 3], [4]]
