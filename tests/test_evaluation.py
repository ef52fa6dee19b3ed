"""Evaluation: intervals, tables, and one shared pass that equals many single ones."""

import csv
import io

import pytest
import torch
from test_compression import random_ids, random_profile
from tiny import tiny_model, tiny_tokenizer

from headprof.compression.cache import FanOutCache, HeadCache, stack_caches
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError
from headprof.evaluation.command import EvalRequest, run_evaluation
from headprof.evaluation.probing import Answer, Candidate, answer_probes
from headprof.evaluation.report import results_csv, tabulate
from headprof.evaluation.statistics import wilson_interval
from headprof.models import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.shape import HeadShape


# Expected bounds: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def answer(probe, method, budget, correct, size=10):
    return Answer(probe, "retrieval", "code", 100, method, budget, correct, size)


def test_table_counts_per_method_and_budget():
    answers = [answer(i, "full", "", i < 3, 40) for i in range(4)] + [answer(i, "snapkv", "8", i < 1) for i in range(4)]
    full, snapkv = tabulate(answers)
    assert (full.method, full.correct, full.asked, full.share, full.cache_bytes) == ("full", 3, 4, 0.75, 40.0)
    assert (snapkv.budget, snapkv.correct) == ("8", 1)
    assert full.low < 0.75 < full.high
    rows = list(csv.DictReader(io.StringIO(results_csv(answers))))
    assert len(rows) == 8 and rows[4] == {
        "probe": "0",
        "kind": "retrieval",
        "family": "code",
        "prompt_tokens": "100",
        "method": "snapkv",
        "budget": "8",
        "correct": "True",
        "cache_bytes": "10",
    }


def test_stacked_caches_continue_like_each_alone():
    model = tiny_model(num_kv_heads=2, layers=3)
    profile, ids = random_profile(model), random_ids(1, 40)
    plans = [make_plan(model, profile, method=m, budget=b) for m, b in (("full", 1), ("snapkv", 6), ("headkv", 11))]
    with attending_ragged(model):
        caches = [HeadCache(plan) for plan in plans]
        prefill(model, ids, FanOutCache(caches))
        more = random_ids(1, 5, seed=2)
        together = model(more.expand(3, -1), past_key_values=stack_caches(caches)).logits
        for number, cache in enumerate(caches):
            alone = model(more, past_key_values=cache).logits[0]
            torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-4)
        prefill(model, ids, shorter := HeadCache(plans[0]))
        with pytest.raises(ValueError, match="same number of tokens"):
            stack_caches([caches[0], shorter])


def load_tiny():
    model = tiny_model(num_kv_heads=2, layers=2)
    return LoadedModel(model, tiny_tokenizer(chat=True), HeadShape.from_config(model.config), "tiny", 4096)


@pytest.mark.parametrize(("known", "observers"), [(True, ()), (False, ()), (False, (5, 6, 7))])
def test_answers_are_judged_as_the_model_itself_would_answer(known, observers):
    """With the model's own greedy answer as the right one, the full cache is always right."""
    from dataclasses import replace

    loaded = load_tiny()
    settings = ProbeSettings(probes=3, lengths=(512,), needles_per_context=1, split="eval")
    contexts = []
    for context in ProbeBuilder(loaded.tokenizer, settings, max_positions=4096):
        probe = context.probes[0]
        for reply in ((), (7, 9)):
            prompt = torch.tensor([[*context.context_ids, *probe.asked_ids, *reply]])
            output = loaded.model.generate(
                prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=2, eos_token_id=None
            )
            said = tuple(output[0, prompt.shape[1] :].tolist())
            for right in (said, (*said[:-1], said[-1] + 1)):
                contexts.append(replace(context, probes=(replace(probe, reply_ids=reply, answer_ids=right),)))
    full = Candidate("full", "", make_plan(loaded.model, method="full", budget=1))
    answers = answer_probes(loaded.model, contexts, [full], question_known=known, observer_ids=observers)
    assert [each.correct for each in answers] == [True, False] * 6


def test_a_request_runs_every_method_at_every_budget():
    loaded = load_tiny()
    request = EvalRequest(
        ["niah"], ["full", "snapkv", "headkv"], ["8", "100%"], 2, (512,), options={"pool_factor": 2.0}
    )
    assert request.check()
    answers = run_evaluation(loaded, random_profile(loaded.model), request)
    assert len(answers) == 2 * 5 and {each.kind for each in answers} == {"retrieval"}
    by = {(each.probe, each.method, each.budget): each for each in answers}
    for probe in range(2):
        full = by[probe, "full", ""]
        assert by[probe, "snapkv", "100%"].correct == by[probe, "headkv", "100%"].correct == full.correct
        assert by[probe, "snapkv", "8"].cache_bytes < full.cache_bytes / 10
        assert by[probe, "snapkv", "8"].cache_bytes == by[probe, "headkv", "8"].cache_bytes


@pytest.mark.parametrize("observe", ["", "Who and when?"])
def test_a_document_alone_is_compressed_when_the_question_is_not_known(observe):
    loaded = load_tiny()
    methods = ["full", "snapkv", "knorm"]
    request = EvalRequest(["niah"], methods, ["8"], 2, (512,), question_known=False, observe=observe)
    assert bool(request.observer_ids(loaded)) == bool(observe)
    answers = run_evaluation(loaded, None, request)
    known = run_evaluation(loaded, None, EvalRequest(["niah"], methods, ["8"], 2, (512,)))
    for one, other in zip(answers, known, strict=True):
        assert one.prompt_tokens < other.prompt_tokens
        assert (one.cache_bytes < other.cache_bytes) if one.method == "full" else one.cache_bytes == other.cache_bytes


def test_a_request_that_needs_no_profile_says_so():
    assert not EvalRequest(["niah"], ["full", "snapkv"], ["8"], 2, (512,)).check()
    with pytest.raises(UsageError, match="no method 'magic'"):
        EvalRequest(["niah"], ["magic"], ["8"], 2, (512,)).check()
    with pytest.raises(UsageError, match="no pooling 'median'"):
        EvalRequest(["niah"], ["snapkv"], ["8"], 2, (512,), options={"pooling": "median"}).check()
