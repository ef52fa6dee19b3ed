"""Global and local importance together, and the importance of rows that a cache still holds, against plain loops."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.observations import as_held_rows, observed_prompt, with_rows
from support.twins import slow_attention, slow_both, slow_local, slow_received, slow_score

from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.importance import KeepAll, KeyDiff, KeyNorm, Recency
from headprof.compression.methods.received_attention import (
    Accumulated,
    GlobalLocal,
    received_attention,
    sampled_queries,
)
from headprof.compression.methods.table import METHODS
from headprof.compression.methods.window_attention import LastQuery, WindowAttention
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
    WindowAttention(window=5, kernel=3, pooling="mean", power=2.0, ramp=True, shared=True),
    WindowAttention(window=1, kernel=5, pooling="max", shared=True),
    LastQuery(),
    Accumulated(),
    KeyNorm(),
    KeyDiff(),
    Recency(),
    KeepAll(),
    *(replace(BOTH, combine=combine) for combine in COMBINATIONS),
    replace(BOTH, pooling="max", balance=0.5, recency=0.5, power=2.0, ramp=True),
    ExpectedAttention(future=5, skip_first=1),
    ExpectedAttention(future=2, skip_first=0, covariance=False, epsilon=0.1),
    ExpectedAttention(future=9, skip_first=2, value_norm=False),
]
KNOWN = [method.importance for method in METHODS.values() if not method.importance.needs_token_kinds]
USED = {importance for importance in KNOWN if not importance.needs_surrogate}


def exact(importance):
    """The same importance, but it asks all queries, and does not look so far ahead that loops take long."""
    if isinstance(importance, ExpectedAttention):
        return replace(importance, future=6)
    return replace(importance, samples=0) if isinstance(importance, GlobalLocal) else importance


EVERY = sorted({*VARIANTS, *map(exact, USED)}, key=repr)


def check(score, expected, valid):
    assert score.dtype == torch.float32 and score.isfinite().all()
    torch.testing.assert_close(score.double()[valid], expected[valid], **CLOSE)


# What is observed.


@st.composite
def prompts(draw):
    """One layer's queries and keys, padding in front in some, without anything a cache remembers."""
    batch, num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.sampled_from([12, 7, 2, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : draw(st.integers(0, tokens - 1))] = False
    return observed_prompt(
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
    observed = draw(prompts())
    batch, num_kv_heads, num_rows, _ = observed.keys.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seen = num_rows + draw(st.sampled_from([0, 3, 30]))
    positions = torch.rand(batch, num_kv_heads, seen, generator=generator).argsort(dim=-1)[..., :num_rows].sort().values
    valid = torch.rand(positions.shape, generator=generator) < draw(st.sampled_from([1.0, 0.7]))
    count = draw(st.integers(1, min(9, seen)))
    own = torch.rand(batch, count, generator=generator) < 0.6
    held = replace(
        as_held_rows(observed),
        queries=torch.randn(batch, observed.queries.shape[1], count, 8, generator=generator),
        valid=valid,
        query_positions=torch.arange(seen - count, seen),
        query_valid=own if padding else None,
        seen=seen,
        layer=replace(observed.layer, sliding_window=draw(st.sampled_from([None, 5]))),
    )
    return with_rows(
        held,
        positions,
        bias=torch.randn(positions.shape, generator=generator) if draw(st.booleans()) else None,
        received=torch.rand(positions.shape, generator=generator) * 5 if draw(st.booleans()) else None,
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
def test_global_local_equals_its_slow_twin(combine, observed, window, pooling, balance, recency):
    importance = replace(
        BOTH, combine=combine, window=window, pooling=pooling, balance=balance, recency=recency, emphasis=3.0
    )
    assessment = importance.assess(observed)
    whole = as_held_rows(observed)
    check(assessment.importance, slow_score(importance, whole), whole.valid)
    assert torch.equal(importance.score(observed), assessment.importance)
    attention = slow_attention(whole)
    for b in range(observed.keys.shape[0]):
        for k in range(observed.keys.shape[1]):
            mean = torch.tensor(slow_both(importance, whole, attention, b, k)[1])
            local = torch.tensor(slow_local(replace(importance, kernel=1), whole, attention, b, k))
            expected = {"global": mean, "local": local}.get(combine, mean + 3 * local)[observed.valid[b]]
            torch.testing.assert_close(assessment.weights[b, k, observed.valid[b]].to(expected), expected, **CLOSE)
            received = torch.tensor(slow_received(whole, attention, b, k))
            torch.testing.assert_close(assessment.columns["received"][b, k], received, **CLOSE)


@given(prompts(), st.sampled_from([1, 3, 30]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_local_score_is_window_attentions(observed, window, ramp):
    options = {"window": window, "kernel": 3, "pooling": "mean", "power": 2.0, "ramp": ramp}
    local = replace(BOTH, combine="local", **options).score(observed)
    assert torch.equal(local, WindowAttention(**options).score(observed))
    slow = slow_score(WindowAttention(**options), as_held_rows(observed))
    torch.testing.assert_close(local.double(), slow, **CLOSE)


@given(prompts())
@settings(max_examples=40, deadline=None)
def test_global_scores_from_the_mean_to_the_sum(observed):
    """With recency 1 a head's tokens stand in the order of H2O's sum; with 0 each by its mean."""
    total, num_tokens = Accumulated().score(observed), observed.keys.shape[2]
    single = replace(BOTH, combine="global")
    torch.testing.assert_close(replace(single, recency=1.0).score(observed) * num_tokens, total, **CLOSE)
    torch.testing.assert_close(single.score(observed) * torch.arange(num_tokens, 0, -1), total, **CLOSE)


@given(st.integers(1, 300), st.integers(0, 320), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_sampled_queries_stand_for_all(num_tokens, samples, last):
    positions, weights = sampled_queries(num_tokens, samples, last)
    assert positions.dtype == torch.int64 and weights.dtype == torch.float32 and len(positions) == len(weights)
    assert (positions.diff() > 0).all() and positions[0] >= 0 and positions[-1] == num_tokens - 1
    assert weights.sum() == num_tokens and (weights >= 1).all()
    own = min(last, num_tokens)
    assert positions[len(positions) - own :].tolist() == list(range(num_tokens - own, num_tokens))
    assert (weights[len(positions) - own :] == 1).all()
    spaced = positions[: len(positions) - own]
    if samples == 0 or samples >= num_tokens:
        assert len(positions) == num_tokens
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
    observed = observed_prompt(query, key, scaling=0.7)
    single = replace(BOTH, combine=combine, recency=1.0)
    every = single.score(observed)
    assert torch.equal(replace(single, samples=400).score(observed), every)
    errors = []
    for samples in (20, 200):
        score = replace(single, samples=samples).score(observed)
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


@pytest.mark.parametrize("power", [1.0, 2.0])
@given(prompts(), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_prompt_with_padding_before_it_is_scored_as_it_is_alone(power, observed, padding):
    """Also one that is shorter than the window."""
    importance = WindowAttention(window=8, kernel=5, pooling="mean", power=power, ramp=True)
    alone = observed_prompt(
        observed.queries, observed.keys, scaling=observed.layer.scaling, sliding_window=observed.layer.sliding_window
    )

    def padded(states):
        return torch.cat([torch.randn(*states.shape[:2], padding, states.shape[3]), states], dim=2)

    valid = torch.nn.functional.pad(torch.ones_like(alone.valid), (padding, 0), value=False)
    queries, keys = padded(alone.queries), padded(alone.keys)
    together = observed_prompt(
        queries, keys, valid, scaling=alone.layer.scaling, sliding_window=alone.layer.sliding_window
    )
    torch.testing.assert_close(importance.score(together)[..., padding:], importance.score(alone), **CLOSE)


# Rows that heads still hold.


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(held_rows())
@settings(max_examples=30, deadline=None)
def test_held_rows_are_scored_as_by_the_slow_twin(importance, observed):
    check_held_rows(importance, observed)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(held_rows(padding=True))
@settings(max_examples=30, deadline=None)
def test_queries_of_padding_do_not_count(importance, observed):
    check_held_rows(importance, observed)


def check_held_rows(importance, observed):
    assessment = importance.assess(observed)
    check(assessment.importance, slow_score(importance, observed), observed.valid)
    if "received" in assessment.columns:
        attention = slow_attention(observed)
        for b in range(observed.keys.shape[0]):
            for k in range(observed.keys.shape[1]):
                received = torch.tensor(slow_received(observed, attention, b, k))
                torch.testing.assert_close(assessment.columns["received"][b, k], received, **CLOSE)


def assert_alike(one, other, valid, **tolerance):
    """Two assessments say the same of the valid rows."""
    assert one.columns.keys() == other.columns.keys() and (one.weights is None) == (other.weights is None)
    pairs = [(one.importance, other.importance), *((one.columns[name], other.columns[name]) for name in one.columns)]
    for a, b in [*pairs, (one.weights, other.weights)] if one.weights is not None else pairs:
        torch.testing.assert_close(a[valid], b[valid], **tolerance)


@pytest.mark.parametrize("importance", [each for each in EVERY if each.at_hand is not None], ids=repr)
@given(held_rows(padding=True), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_queries_that_need_not_be_at_hand_count_by_what_they_paid(importance, observed, more):
    start = max(0, observed.queries.shape[2] - importance.at_hand - more)

    def of_queries(part, received):
        return replace(
            with_rows(observed, received=received),
            queries=observed.queries[:, :, part],
            query_positions=observed.query_positions[part],
            query_valid=observed.query_valid[:, part],
        )

    before = received_attention(of_queries(slice(start), observed.rows.columns.get("received")))
    one, other = importance.assess(observed), importance.assess(of_queries(slice(start, None), before))
    assert_alike(one, other, observed.valid, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
@given(prompts())
@settings(max_examples=15, deadline=None)
def test_holding_the_whole_prompt_is_scored_as_the_prompt(importance, observed):
    held = as_held_rows(observed)
    one, other = importance.assess(observed), importance.assess(held)
    assert_alike(one, other, held.valid, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_rows_that_no_query_observes_have_an_importance(importance):
    prompt = observed_prompt(torch.rand(1, 4, 0, 8), torch.rand(1, 2, 5, 8), scaling=1.0)
    held = with_rows(as_held_rows(prompt), received=torch.rand(1, 2, 5))
    assert importance.score(held).shape == (1, 2, 5) and importance.score(held).isfinite().all()
