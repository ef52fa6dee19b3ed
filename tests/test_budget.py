"""Allocation: exact sums, bounds, order, and what users may write as a budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof.compression.budget import Budget, ProfileBudget, UniformBudget, headkv_allocation, normalized
from headprof.errors import UsageError


@st.composite
def allocations(draw):
    """Any scores and any budget that can be met."""
    layers, heads = draw(st.integers(1, 100)), draw(st.integers(1, 8))
    kind = draw(st.sampled_from(["random", "sparse", "equal", "zero", "one hot", "wild"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(layers, heads, generator=generator)
    if kind == "sparse":
        scores = scores * (torch.rand(layers, heads, generator=generator) < 0.1)
    elif kind == "equal":
        scores = torch.full_like(scores, 0.37)
    elif kind == "zero":
        scores = torch.zeros_like(scores)
    elif kind == "one hot":
        scores = torch.zeros_like(scores)
        scores[0, 0] = 1.0
    elif kind == "wild":
        scores = 10 ** (scores * 30 - 20)
    always_kept = draw(st.integers(0, 12))
    context = draw(st.integers(1, 3000))
    budget = draw(st.integers(max(1, always_kept), 4000))
    options = {
        "pool_factor": draw(st.sampled_from([1.0, 1.005, 1.1, 2.0, 10.0])),
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        "minimum": draw(st.integers(0, 6)),
    }
    return scores, {"budget": budget, "context_length": context, "always_kept": always_kept, **options}


@given(allocations())
@settings(max_examples=150, deadline=None)
def test_sum_is_exact_and_bounds_hold(case):
    scores, options = case
    counts = headkv_allocation(scores, **options)
    context, budget = options["context_length"], options["budget"]
    assert counts.dtype == torch.int64 and counts.shape == scores.shape
    assert int(counts.sum()) == min(budget, context) * scores.numel()
    assert int(counts.max()) <= context
    if budget < context:
        lowest = options["always_kept"] + min(options["minimum"], budget - options["always_kept"])
        assert int(counts.min()) >= min(lowest, context)


@given(allocations())
@settings(max_examples=100, deadline=None)
def test_a_higher_score_never_gets_less(case):
    scores, options = case
    counts = headkv_allocation(scores, **options).flatten()
    order = scores.flatten().argsort()
    ordered, values = counts[order], scores.flatten()[order]
    drops = (ordered[1:] < ordered[:-1]) & (values[1:] > values[:-1])
    # Scores that float64 cannot tell apart after normalization may differ by the last rounded token.
    assert not (drops & (ordered[:-1] - ordered[1:] > 1)).any()
    clear = (values[1:] - values[:-1]) > 1e-6 * values.max()
    assert not (drops & clear).any()


@given(allocations())
@settings(max_examples=60, deadline=None)
def test_equal_scores_get_equal_budgets(case):
    scores, options = case
    counts = headkv_allocation(torch.full_like(scores, 0.5), **options)
    assert int(counts.max() - counts.min()) <= 1


@given(allocations(), st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]))
@settings(max_examples=60, deadline=None)
def test_scaling_the_scores_changes_nothing(case, factor):
    scores, options = case
    assert torch.equal(
        headkv_allocation(scores.double(), **options), headkv_allocation(scores.double() * factor, **options)
    )


def test_the_papers_formula_where_no_bound_bites():
    scores = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    counts = headkv_allocation(scores, budget=108, context_length=10_000, always_kept=8, pool_factor=2.0)
    # base 100, floor 50, pool 50 * 4 = 200 by shares .4 .1 .3 .2, and 8 that are always kept
    assert counts.tolist() == [[58 + 80, 58 + 20], [58 + 60, 58 + 40]]


def test_surplus_above_the_context_is_handed_on():
    scores = torch.tensor([[1000.0, 1.0, 1.0, 2.0]])
    counts = headkv_allocation(scores, budget=30, context_length=50, always_kept=0, pool_factor=1.0)
    assert counts.tolist() == [[50, 17, 18, 35]] or counts.tolist() == [[50, 18, 17, 35]]


def test_budget_of_the_whole_context_keeps_everything():
    counts = headkv_allocation(torch.rand(3, 2), budget=500, context_length=40, always_kept=4)
    assert (counts == 40).all()


def test_budget_below_what_is_always_kept_is_refused():
    with pytest.raises(UsageError, match="budget of 3 tokens is below the 5 that every head keeps"):
        headkv_allocation(torch.rand(3, 2), budget=3, context_length=40, always_kept=5)


def test_policies_agree_with_the_formula():
    scores = torch.rand(4, 3)
    common = {"budget": 20, "context_length": 200, "always_kept": 3}
    assert torch.equal(UniformBudget().allocate(scores, **common), torch.full((4, 3), 20))
    policy = ProfileBudget("reasoning", pool_factor=1.3, temperature=0.7, minimum=1)
    expected = headkv_allocation(scores, **common, pool_factor=1.3, temperature=0.7, minimum=1)
    assert torch.equal(policy.allocate(scores, **common), expected)


def test_normalized_sums_to_one_even_for_tiny_scores():
    assert normalized(torch.tensor([[1e-38, 2e-38]]), 2.0).flatten().tolist() == pytest.approx([0.2, 0.8])
    assert normalized(torch.zeros(2, 2)).flatten().tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", 64),
        (64, 64),
        ("1.5%", 15),
        ("100%", 1000),
        ("512MB", 512_000),
        ("2 GiB", 2 * 2**30 // 1000),
        ("10kb", 10),
        ("0.01%", 1),
    ],
)
def test_budget_texts(text, expected):
    assert Budget.parse(text).tokens(1000, bytes_per_token=1000) == expected


@pytest.mark.parametrize("text", ["", "x", "-4", "0", "0%", "3.5", "12 apples", "1e3", "101%", "%"])
def test_budget_texts_that_make_no_sense(text):
    with pytest.raises(UsageError):
        Budget.parse(text)
