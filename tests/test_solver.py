"""The solver of budgets by influence curves, against all that could have been done, and the budgets it makes."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.profiles import random_curves

from headprof.compression.methods.curve_budget import CurveBudget, curve_scores
from headprof.compression.methods.solver import convex_hull, falling, losses_at, refined, solve
from headprof.errors import UsageError
from headprof.models.shape import HeadShape

LOSSES = st.floats(-2, 10, allow_nan=False)


@st.composite
def problems(draw, heads=st.integers(1, 4)):
    """Curves `[1, heads, N]`, their grid, bounds and a total."""
    grid = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))
    count = draw(heads)
    curves = torch.tensor([[[draw(LOSSES) for _ in grid] for _ in range(count)]], dtype=torch.float64)
    lower = torch.tensor([[draw(st.integers(1, 4)) for _ in range(count)]])
    upper = torch.tensor([[low + draw(st.integers(0, 6)) for low in lower[0].tolist()]])
    return curves, grid, draw(st.integers(int(lower.sum()), int(upper.sum()))), lower, upper


def hull_loss(grid, losses, tokens):
    """What a head loses at any number of tokens, by its hull, one corner after the other."""
    corners = convex_hull(grid, falling(losses))
    if len(corners) == 1 or tokens >= corners[-1][0]:
        return corners[-1][1]
    pair = next(pair for pair in pairwise(corners) if tokens <= pair[1][0])
    (start, high), (stop, low) = pair
    return high + (low - high) * (tokens - start) / (stop - start)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_nothing_loses_less(problem):
    curves, grid, total, lower, upper = problem
    counts = solve(curves, grid, total, lower, upper)
    assert int(counts.sum()) == total and counts.dtype == torch.int64
    assert (counts >= lower).all() and (counts <= upper).all()
    ranges = [range(low, high + 1) for low, high in zip(lower[0].tolist(), upper[0].tolist(), strict=True)]
    tables = [
        {n: hull_loss(grid, losses, n) for n in each} for losses, each in zip(curves[0].tolist(), ranges, strict=True)
    ]
    every = (each for each in product(*ranges) if sum(each) == total)
    best = min(sum(table[n] for table, n in zip(tables, each, strict=True)) for each in every)
    assert sum(table[n] for table, n in zip(tables, counts[0].tolist(), strict=True)) <= best + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_more_tokens_take_none_from_any_head(problem, data):
    curves, grid, total, lower, upper = problem
    more = data.draw(st.integers(total, int(upper.sum())))
    # Shared evenly, what saves alike may move a token within its share; nothing else may.
    fewer, counts = solve(curves, grid, total, lower, upper), solve(curves, grid, more, lower, upper)
    assert (counts - fewer).min() >= -1


@settings(max_examples=200, deadline=None)
@given(st.lists(LOSSES, min_size=1, max_size=12))
def test_levelled_losses_never_rise_and_keep_their_mean(losses):
    level = falling(losses)
    assert all(high >= low for high, low in pairwise(level)) and len(level) == len(losses)
    assert sum(level) == pytest.approx(sum(losses), abs=1e-9)
    if all(high >= low for high, low in pairwise(losses)):
        assert level == pytest.approx(losses)


@settings(max_examples=200, deadline=None)
@given(st.lists(LOSSES, min_size=1, max_size=8))
def test_a_hull_is_the_largest_convex_curve_below(losses):
    grid = [2**number for number in range(len(losses))]
    corners = convex_hull(grid, losses)
    slopes = [(low[1] - high[1]) / (low[0] - high[0]) for high, low in pairwise(corners)]
    assert all(before < after for before, after in pairwise(slopes))
    assert set(corners) <= set(zip(grid, losses, strict=True)) and (corners[0][0], corners[-1][0]) == (1, grid[-1])
    for at, loss in zip(grid, losses, strict=True):
        (start, high), (stop, low) = next((p for p in pairwise(corners) if at <= p[1][0]), (corners[0], corners[-1]))
        on_hull = high if start == stop else high + (low - high) * (at - start) / (stop - start)
        assert on_hull <= loss + 1e-9


def test_finer_curves_go_through_the_points():
    curves, grid = torch.tensor([[[8.0, 2.0, 1.0]]]), (4, 16, 17)
    finer, points = refined(curves, grid, 2)
    assert points == [4, 8, 16, 17]
    assert finer[0, 0].tolist() == pytest.approx([8, 5, 2, 1])
    counts = torch.tensor([[[2]], [[8]], [[16]], [[100]]])
    assert losses_at(curves, grid, counts).flatten().tolist() == pytest.approx([8, 5, 2, 1])
    assert losses_at(curves[..., :1], grid[:1], counts).flatten().tolist() == [8] * 4


@settings(max_examples=60, deadline=None)
@given(
    situation=st.sampled_from(["known", "unknown"]),
    layers=st.integers(1, 5),
    heads=st.integers(1, 3),
    context=st.integers(4, 3000),
    budget=st.integers(3, 3000),
    seed=st.integers(0, 99),
)
def test_budgets_sum_exactly_within_bounds(situation, layers, heads, context, budget, seed):
    curves = random_curves(HeadShape("M", layers, heads, heads, 8, 100), seed)
    scores = curve_scores(curves)
    assert (scores[1] >= 0).all() and (scores[1].diff(dim=0) <= 0).all() and (scores[1, -1] == 0).all()
    counts = CurveBudget(situation).allocate(scores, budget=budget, context_length=context, always_kept=3)
    assert int(counts.sum()) == min(budget, context) * layers * heads
    assert int(counts.min()) >= min(budget, 3, context) and int(counts.max()) <= context


def test_steep_heads_keep_more_by_tokens_or_by_shares():
    shape = HeadShape("M", 1, 2, 2, 8, 100)
    curves = random_curves(shape, grid=(4, 16, 64, 1000))
    losses = torch.tensor([[[9.0, 1.0, 0.2, 0.0], [0.1, 0.1, 0.1, 0.0]]])
    scores = curve_scores(type(curves)(losses, losses, curves.grid))
    sizes = {"budget": 40, "always_kept": 3}
    short, long = (CurveBudget().allocate(scores, context_length=n, **sizes) for n in (1000, 8000))
    assert torch.equal(short, long) and int(short[0, 0]) >= 64
    budgets = (
        CurveBudget("unknown", minimum=0),
        {"budget": 80, "context_length": 1000},
        {"budget": 640, "context_length": 8000},
    )
    short, long = (budgets[0].allocate(scores, always_kept=0, **each) for each in budgets[1:])
    torch.testing.assert_close(long, 8 * short, atol=8, rtol=0)


def test_no_such_budget():
    with pytest.raises(UsageError, match="A question cannot be 'open': choose known or unknown"):
        CurveBudget("open")
    with pytest.raises(UsageError, match="minimum 0 or more"):
        CurveBudget(minimum=-1)
