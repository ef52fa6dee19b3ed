"""Global and local importance together, and the judgement of rows that a cache still holds, against plain loops."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.twins import slow_attention, slow_both, slow_local, slow_received, slow_score, whole_prompt

from headprof.compression.methods.importance import (
    Accumulated,
    GlobalLocal,
    KeyNorm,
    LastQuery,
    Recency,
    WindowAttention,
    received_attention,
    sampled_queries,
)
from headprof.compression.methods.states import PromptStates
from headprof.compression.methods.table import METHODS
from headprof.errors import UsageError

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
COMBINATIONS = ("max", "sum", "product", "global", "local")
BOTH = GlobalLocal(
    window=5,
    kernel=3,
    pooling="mean",
    power=1.0,
    ramp=False,
    combine="max",
    balance=1.0,
    samples=0,
    recency=0.0,
    emphasis=0.0,
)
VARIANTS = [
    WindowAttention(window=4, kernel=1, pooling="max", power=1.0, ramp=False),
    WindowAttention(window=5, kernel=3, pooling="mean", power=2.0, ramp=True),
    LastQuery(),
    Accumulated(),
    KeyNorm(),
    Recency(),
    *(replace(BOTH, combine=combine) for combine in COMBINATIONS),
    replace(BOTH, pooling="max", balance=0.5, recency=0.5, power=2.0, ramp=True),
]
USED = {method.importance for method in METHODS.values() if method.importance is not None}


def exact(importance):
    """The same importance, but it asks all queries."""
    return replace(importance, samples=0) if isinstance(importance, GlobalLocal) else importance


EVERY = sorted({*VARIANTS, *map(exact, USED)}, key=repr)


def check(score, expected, valid):
    assert score.dtype == torch.float32 and score.isfinite().all()
    torch.testing.assert_close(score.double()[valid], expected[valid], **CLOSE)


# What is judged.


@st.composite
def prompts(draw):
    """One layer's queries and keys, padding in front in some, without anything a cache remembers."""
    batch, num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.sampled_from([12, 7, 2, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : draw(st.integers(0, tokens - 1))] = False
    return PromptStates(
        torch.randn(batch, num_kv_heads * group, tokens, 8, generator=generator),
        torch.randn(batch, num_kv_heads, tokens, 8, generator=generator),
        valid,
        scaling=draw(st.sampled_from([0.4, 2.0])),
        softcap=draw(st.sampled_from([None, 2.0])),
        sliding_window=draw(st.sampled_from([None, 1, 5])),
    )


@st.composite
def held_rows(draw, *, padding=False):
    """Rows that heads still hold of a longer sequence, each its own, and the newest queries, some of them padding."""
    states = draw(prompts())
    batch, num_kv_heads, num_rows, _ = states.key.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seen = num_rows + draw(st.sampled_from([0, 3, 30]))
    positions = torch.rand(batch, num_kv_heads, seen, generator=generator).argsort(dim=-1)[..., :num_rows].sort().values
    valid = torch.rand(positions.shape, generator=generator) < draw(st.sampled_from([1.0, 0.7]))
    count = draw(st.integers(1, min(9, seen)))
    judges = torch.rand(batch, count, generator=generator) < 0.6
    return replace(
        states,
        query=torch.randn(batch, states.query.shape[1], count, 8, generator=generator),
        valid=valid,
        positions=positions,
        places=torch.arange(seen - count, seen),
        seen=seen,
        bias=torch.randn(positions.shape, generator=generator) if draw(st.booleans()) else None,
        received=torch.rand(positions.shape, generator=generator) * 5 if draw(st.booleans()) else None,
        judges=judges if padding else None,
        sliding_window=draw(st.sampled_from([None, 5])),
    )


# A prompt.


@pytest.mark.parametrize("combine", COMBINATIONS)
@given(
    prompts(),
    st.sampled_from([1, 5, 30]),
    st.sampled_from(["max", "mean"]),
    st.sampled_from([0.25, 1.0, 3.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_global_local_equals_its_slow_twin(combine, states, window, pooling, balance, recency):
    importance = replace(
        BOTH, combine=combine, window=window, pooling=pooling, balance=balance, recency=recency, emphasis=3.0
    )
    judgement = importance.judge(states)
    whole = whole_prompt(states)
    check(judgement.importance, slow_score(importance, whole), whole.valid)
    assert torch.equal(importance.score(states), judgement.importance)
    attention = slow_attention(whole)
    for b in range(states.key.shape[0]):
        for k in range(states.key.shape[1]):
            mean = torch.tensor(slow_both(importance, whole, attention, b, k)[1])
            local = torch.tensor(slow_local(replace(importance, kernel=1), whole, attention, b, k))
            expected = {"global": mean, "local": local}.get(combine, mean + 3 * local)[states.valid[b]]
            torch.testing.assert_close(judgement.weights[b, k, states.valid[b]].to(expected), expected, **CLOSE)
            received = torch.tensor(slow_received(whole, attention, b, k))
            torch.testing.assert_close(judgement.received[b, k], received, **CLOSE)


@given(prompts(), st.sampled_from([1, 3, 30]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_local_score_is_window_attentions(states, window, ramp):
    options = {"window": window, "kernel": 3, "pooling": "mean", "power": 2.0, "ramp": ramp}
    local = replace(BOTH, combine="local", **options).score(states)
    assert torch.equal(local, WindowAttention(**options).score(states))
    slow = slow_score(WindowAttention(**options), whole_prompt(states))
    torch.testing.assert_close(local.double(), slow, **CLOSE)


@given(prompts())
@settings(max_examples=40, deadline=None)
def test_global_scores_from_the_mean_to_the_sum(states):
    """With recency 1 a head's tokens stand in the order of H2O's sum; with 0 each by its mean."""
    total, num_tokens = Accumulated().score(states), states.key.shape[2]
    single = replace(BOTH, combine="global")
    torch.testing.assert_close(replace(single, recency=1.0).score(states) * num_tokens, total, **CLOSE)
    torch.testing.assert_close(single.score(states) * torch.arange(num_tokens, 0, -1), total, **CLOSE)


@given(st.integers(1, 300), st.integers(0, 320), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_sampled_queries_stand_for_all(num_tokens, samples, last):
    places, weights = sampled_queries(num_tokens, samples, last)
    assert places.dtype == torch.int64 and weights.dtype == torch.float32 and len(places) == len(weights)
    assert (places.diff() > 0).all() and places[0] >= 0 and places[-1] == num_tokens - 1
    assert weights.sum() == num_tokens and (weights >= 1).all()
    own = min(last, num_tokens)
    assert places[len(places) - own :].tolist() == list(range(num_tokens - own, num_tokens))
    assert (weights[len(places) - own :] == 1).all()
    spaced = places[: len(places) - own]
    if samples == 0 or samples >= num_tokens:
        assert len(places) == num_tokens
    else:
        assert len(spaced) <= samples and 2 * len(spaced) >= min(samples, num_tokens - own)
    if len(spaced):
        stride = math.ceil((num_tokens - own) / samples) if samples else 1
        assert (spaced.diff() == stride).all() and spaced[-1] == num_tokens - own - 1
        assert (weights[1 : len(spaced)] == stride).all() and weights[0] == spaced[0] + 1


@pytest.mark.parametrize("combine", ["max", "global"])
def test_fewer_queries_approximate_all(combine):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 400, 8)
    query, key = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)[:, :2]
    states = PromptStates(query, key, torch.ones(1, 400, dtype=torch.bool), 0.7)
    single = replace(BOTH, combine=combine, recency=1.0)
    every = single.score(states)
    assert torch.equal(replace(single, samples=400).score(states), every)
    errors = []
    for samples in (20, 200):
        score = replace(single, samples=samples).score(states)
        assert not torch.equal(score, every)
        errors.append(float((score - every).norm() / every.norm()))
    assert errors[1] < errors[0] < 0.6 and errors[1] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "least"}, "cannot be joined by 'least'"),
        ({"balance": 0.0}, r"A balance of 0\.0"),
        ({"emphasis": -1.0}, r"An emphasis of -1\.0"),
        ({"samples": -1}, "There are no -1 queries"),
        ({"window": 0}, "window of 0 queries"),
    ],
)
def test_parameters_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        replace(BOTH, **options)


# Rows that heads still hold.


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(held_rows())
@settings(max_examples=30, deadline=None)
def test_held_rows_are_judged_as_by_the_slow_twin(importance, states):
    check_held_rows(importance, states)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(held_rows(padding=True))
@settings(max_examples=30, deadline=None)
def test_queries_of_padding_do_not_count(importance, states):
    check_held_rows(importance, states)


def check_held_rows(importance, states):
    judgement = importance.judge(states)
    check(judgement.importance, slow_score(importance, states), states.valid)
    if judgement.received is not None:
        attention = slow_attention(states)
        for b in range(states.key.shape[0]):
            for k in range(states.key.shape[1]):
                received = torch.tensor(slow_received(states, attention, b, k))
                torch.testing.assert_close(judgement.received[b, k], received, **CLOSE)


@pytest.mark.parametrize("importance", [each for each in EVERY if each.at_hand is not None], ids=repr)
@given(held_rows(padding=True), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_queries_that_need_not_be_at_hand_count_by_what_they_paid(importance, states, more):
    start = max(0, states.query.shape[2] - importance.at_hand - more)

    def of_queries(part, received):
        query, places, judges = states.query[:, :, part], states.places[part], states.judges[:, part]
        return replace(states, query=query, places=places, judges=judges, received=received, shared={})

    before = received_attention(of_queries(slice(start), states.received))
    one, other = importance.judge(states), importance.judge(of_queries(slice(start, None), before))
    for part in fields(one):
        a, b = getattr(one, part.name), getattr(other, part.name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a[states.valid], b[states.valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(prompts())
@settings(max_examples=15, deadline=None)
def test_holding_the_whole_prompt_is_judged_as_the_prompt(importance, states):
    held = whole_prompt(states)
    one, other = importance.judge(states), importance.judge(held)
    for part in fields(one):
        a, b = getattr(one, part.name), getattr(other, part.name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a[held.valid], b[held.valid], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_rows_that_no_query_judges_have_an_importance(importance):
    held = replace(
        whole_prompt(PromptStates(torch.rand(1, 4, 0, 8), torch.rand(1, 2, 5, 8), torch.ones(1, 5).bool(), 1.0)),
        received=torch.rand(1, 2, 5),
    )
    assert importance.score(held).shape == (1, 2, 5) and importance.score(held).isfinite().all()
