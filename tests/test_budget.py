"""Allocation: exact sums, bounds, order, and what users may write as a budget."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof import HeadProfile
from headprof.compression.methods.allocation import headkv_allocation, normalized, water_filled
from headprof.compression.methods.budget import (
    AdaptiveBudget,
    ProfileBudget,
    PyramidBudget,
    UniformBudget,
)
from headprof.compression.methods.given_budget import Budget, ratio_budget
from headprof.compression.rows import HeadCounts
from headprof.errors import UsageError
from headprof.models.shape import HeadShape

KINDS_OF_SCORES = ["random", "sparse", "equal", "zero", "one hot", "wild"]


def made_scores(kind, layers, heads, seed):
    """Query heads' scores of one kind, float32 `[layers, heads]`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, heads, generator=generator)
    if kind == "sparse":
        return scores * (torch.rand(layers, heads, generator=generator) < 0.1)
    if kind == "equal":
        return torch.full_like(scores, 0.37)
    if kind == "zero":
        return torch.zeros_like(scores)
    if kind == "one hot":
        scores = torch.zeros_like(scores)
        scores[0, 0] = 1.0
        return scores
    if kind == "wild":
        return 10 ** (scores * 30 - 20)
    return scores


@st.composite
def profiles(draw):
    """Scores of KV heads `[L, K]` as a profile gives them, for any model and any way to join a group."""
    layers, num_kv_heads, group = draw(st.integers(1, 100)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    shape = HeadShape("Any", layers, num_kv_heads * group, num_kv_heads, 8, 10)
    kind, seed = draw(st.sampled_from(KINDS_OF_SCORES)), draw(st.integers(0, 2**31))
    profile = HeadProfile("any", shape, {"reasoning": made_scores(kind, layers, num_kv_heads * group, seed)})
    return profile.kv_head_scores("reasoning", draw(st.sampled_from(["max", "mean"])))


@st.composite
def sizes(draw):
    """Any budget that can be met."""
    always_kept = draw(st.integers(0, 12))
    return {
        "budget": draw(st.integers(max(1, always_kept), 4000)),
        "context_length": draw(st.integers(1, 3000)),
        "always_kept": always_kept,
    }


@st.composite
def allocations(draw):
    """Any scores, any budget that can be met, any parameters."""
    return draw(profiles()), draw(sizes()) | {
        "pool_factor": draw(st.sampled_from([1.0, 1.005, 2.0]) | st.floats(1.0, 1000.0)),
        "temperature": draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 5.0)),
        "minimum": draw(st.integers(0, 6)),
    }


def slow_levels(shares, floor, lower, upper, total):
    """`floor + shares * x` within bounds, before rounding: plain bisection, one head at a time."""

    def filled(share_level, even_level):
        return [
            min(max(floor + even_level + share * share_level, lower), most)
            for share, most in zip(shares, upper, strict=True)
        ]

    def bisected(fill, low, high):
        for _ in range(300):
            middle = (low + high) / 2
            low, high = (middle, high) if math.fsum(fill(middle)) < total else (low, middle)
        return fill(high)

    if sum(filled(0, 0)) > total:
        return bisected(lambda level: filled(0, level), -floor, 0)
    highest = max(upper) / min(share for share in shares if share > 0)
    if sum(filled(highest, 0)) >= total:
        return bisected(lambda level: filled(level, 0), 0, highest)
    return bisected(lambda level: filled(highest, level), 0, max(upper))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_water_filled_equals_its_slow_twin(data):
    count = data.draw(st.integers(1, 12))
    weights = data.draw(
        st.lists(st.sampled_from([0.0, 1e-9, 1.0, 1.0]) | st.floats(1e-6, 8.0), min_size=count, max_size=count).filter(
            lambda each: max(each) > 1e-6
        )
    )
    shares = normalized(torch.tensor(weights, dtype=torch.float64))
    lower = data.draw(st.integers(0, 5))
    upper = data.draw(st.lists(st.integers(lower, 60), min_size=count, max_size=count))
    total = data.draw(st.integers(lower * count, sum(upper)))
    floor = data.draw(st.floats(0.0, 40.0))
    counts = water_filled(shares, floor, lower, torch.tensor(upper), total).tolist()
    assert sum(counts) == total
    assert all(lower <= number <= most for number, most in zip(counts, upper, strict=True))
    exact = slow_levels(shares.tolist(), floor, lower, upper, total)
    down = [math.floor(number + 1e-5) for number in exact]
    lost = [number - whole for number, whole in zip(exact, down, strict=True)]
    ups = [number - whole for number, whole in zip(counts, down, strict=True)]
    assert set(ups) <= {0, 1}
    # Rounded up are those that lost most; the twin's last digits differ.
    rounded_up = [part for part, up in zip(lost, ups, strict=True) if up]
    rounded_down = [part for part, up in zip(lost, ups, strict=True) if not up]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0) - 1e-4


def test_a_share_too_small_to_divide_by_is_no_share():
    shares = torch.tensor([1.0, 1e-310, 0.0], dtype=torch.float64)
    assert water_filled(shares, 0.0, 0, torch.tensor([10, 10, 10]), 20).tolist() == [10, 5, 5]


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
@settings(max_examples=150, deadline=None)
def test_a_higher_score_never_gets_less(case):
    scores, options = case
    shares = normalized(scores, options["temperature"]).flatten()
    order = scores.flatten().argsort()
    # A power may come out one last digit apart for nearly equal scores.
    assert (shares[order][1:] >= shares[order][:-1] * (1 - 1e-12)).all()
    order = shares.argsort()
    counts = headkv_allocation(scores, **options).flatten()[order]
    assert not ((counts[1:] < counts[:-1]) & (shares[order][1:] > shares[order][:-1])).any()


@given(allocations())
@settings(max_examples=60, deadline=None)
def test_equal_scores_get_equal_budgets(case):
    scores, options = case
    counts = headkv_allocation(torch.full_like(scores, 0.5), **options)
    assert int(counts.max() - counts.min()) <= 1


@given(allocations(), st.data())
@settings(max_examples=100, deadline=None)
def test_heads_with_the_same_score_differ_by_rounding_alone(case, data):
    scores, options = case
    scores = scores.flatten()
    twins = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=20))
    scores[twins] = float(scores[data.draw(st.integers(0, len(scores) - 1))])
    counts = headkv_allocation(scores[None], **options)[0]
    for value in scores.unique():
        same = counts[scores == value]
        assert int(same.max() - same.min()) <= 1


@given(allocations(), st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_scaling_the_scores_changes_nothing(case, power_of_two, factor):
    scores, options = case
    scores = scores.double()
    counts = headkv_allocation(scores, **options)
    assert torch.equal(counts, headkv_allocation(scores * power_of_two, **options))
    # Another factor rounds the scores' last digit, which may move a token between two heads that tie for it.
    assert int((counts - headkv_allocation(scores * factor, **options)).abs().max()) <= 1


@pytest.mark.parametrize(
    "policy", [UniformBudget(), PyramidBudget(), PyramidBudget(taper=1.0), AdaptiveBudget(), ProfileBudget()]
)
@given(profiles(), sizes())
@settings(max_examples=40, deadline=None)
def test_every_policy_sums_exactly_within_bounds(policy, scores, options):
    counts = policy.allocate(scores, **options)
    context, budget = options["context_length"], options["budget"]
    assert counts.dtype == torch.int64 and counts.shape == scores.shape
    assert int(counts.sum()) == min(budget, context) * scores.numel()
    assert int(counts.max()) <= context
    assert int(counts.min()) >= min(options["always_kept"], context)


@given(profiles(), sizes(), st.floats(1.0, 100.0))
@settings(max_examples=100, deadline=None)
def test_a_pyramid_never_widens_and_treats_a_layers_heads_alike(scores, options, taper):
    counts = PyramidBudget(taper=taper).allocate(scores, **options)
    assert (counts == counts[:, :1]).all()
    assert (counts[1:] <= counts[:-1]).all()
    if taper == 1.0:
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (1000, [195 + 3, 100 + 3, 5 + 3]),  # base 100
        (150, [150, 149, 10]),  # the first layer's surplus of 48 goes 100 : 5 to the others: 45.7 and 2.3
    ],
)
def test_pyramid_by_hand(context, expected):
    counts = PyramidBudget().allocate(torch.ones(3, 2), budget=103, context_length=context, always_kept=3)
    assert counts.tolist() == [[each] * 2 for each in expected]


def test_pyramid_and_its_parameters_that_make_no_sense():
    with pytest.raises(UsageError, match="budget of 3 tokens is below the 5"):
        PyramidBudget().allocate(torch.ones(3, 2), budget=3, context_length=40, always_kept=5)
    with pytest.raises(UsageError, match=r"taper of 0\.5"):
        PyramidBudget(taper=0.5)
    with pytest.raises(UsageError, match=r"safeguard of 1\.5"):
        AdaptiveBudget(safeguard=1.5)


def slow_spread(counts, importance, lengths, always_kept, safeguard):
    """Take tokens one by one, the best first. `importance[b, k]` begins with padding."""
    result = torch.zeros_like(counts)
    for b, length in enumerate(lengths):
        first = importance.shape[-1] - length
        left = int(counts[b].sum())
        waiting = []
        for k in range(counts.shape[1]):
            best = sorted(range(first, first + length), key=lambda j, k=k: (-float(importance[b, k, j]), j))
            spare = max(0, int(counts[b, k]) - always_kept)
            least = int(counts[b, k]) - spare + math.floor(safeguard * spare)
            result[b, k] += least
            left -= least
            waiting += [(-float(importance[b, k, j]), j, k) for j in best[least:]]
        for _, _, k in sorted(waiting)[:left]:
            result[b, k] += 1
    return result


def handed_on(policy, counts, importance, valid, always_kept):
    """What each head has once a policy has spread the layer's tokens, int64 `[B, K]`."""
    held = valid.sum(dim=-1)
    if held.ndim == 1:
        held = held[:, None].expand_as(counts)
    total = int(counts.sum(dim=-1).minimum(held.sum(dim=-1)).sum())
    spread = policy.spread(HeadCounts(counts, int(counts.max()), total), importance, valid, always_kept)
    assert spread.total == spread.counts.sum() and spread.most >= spread.counts.max()
    return spread.counts


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_adaptive_spread_equals_its_slow_twin(data):
    batch, heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    safeguard = data.draw(st.sampled_from([0.0, 0.2, 1.0]) | st.floats(0.0, 1.0))
    values = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5]), min_size=tokens, max_size=tokens)  # many ties
    importance = torch.tensor([[data.draw(values) for _ in range(heads)] for _ in range(batch)])
    lengths = [data.draw(st.integers(1, tokens)) for _ in range(batch)]
    valid = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    always_kept = data.draw(st.integers(0, 4))
    counts = torch.tensor(
        [[data.draw(st.integers(min(always_kept, length), length)) for _ in range(heads)] for length in lengths]
    )
    spread = handed_on(AdaptiveBudget(safeguard=safeguard), counts, importance, valid, always_kept)
    assert torch.equal(spread, slow_spread(counts, importance, lengths, always_kept, safeguard))
    assert spread.dtype == torch.int64 and torch.equal(spread.sum(-1), counts.sum(-1))
    assert (spread <= torch.tensor(lengths)[:, None]).all()
    assert (spread >= torch.tensor(lengths).clamp(max=always_kept)[:, None]).all()


def test_adaptive_spread_by_hand():
    importance = torch.tensor([[[9.0, 8.0, 7.0, 6.0, 5.0, 4.0], [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]]])
    counts, valid = torch.tensor([[3, 3]]), torch.ones(1, 6, dtype=torch.bool)
    assert handed_on(AdaptiveBudget(safeguard=0.0), counts, importance, valid, 0).tolist() == [[6, 0]]
    assert handed_on(AdaptiveBudget(safeguard=0.4), counts, importance, valid, 0).tolist() == [[5, 1]]
    assert handed_on(AdaptiveBudget(safeguard=1.0), counts, importance, valid, 0).tolist() == [[3, 3]]
    assert handed_on(AdaptiveBudget(safeguard=0.0), counts, importance, valid, 1).tolist() == [[5, 1]]
    assert handed_on(AdaptiveBudget(safeguard=0.0), counts + 5, importance, valid, 0).tolist() == [[6, 6]]
    alike = AdaptiveBudget().spread(HeadCounts(counts + 5, 8, 12), importance, None, 0)  # heads without padding
    assert alike.counts.tolist() == [[6, 6]] and alike.most == 6
    equal = torch.ones_like(importance)
    assert handed_on(AdaptiveBudget(safeguard=0.0), counts, equal, valid, 0).tolist() == [[3, 3]]


def test_other_policies_leave_the_counts():
    counts, valid = HeadCounts.looked_up(torch.tensor([[3, 1]])), torch.ones(1, 6, dtype=torch.bool)
    for policy in (UniformBudget(), PyramidBudget(), ProfileBudget()):
        assert not policy.spreads and policy.spread(counts, torch.rand(1, 2, 6), valid, 1) is counts


def test_heads_that_share_a_layer_hand_on_no_more_than_there_is():
    """Held rows differ from head to head: three of four, and one of four."""
    valid = torch.tensor([[[True, True, True, False], [False, False, False, True]]])
    importance = torch.rand(1, 2, 4)
    assert handed_on(AdaptiveBudget(safeguard=0.5), torch.tensor([[2, 2]]), importance, valid, 0).tolist() == [[3, 1]]
    assert handed_on(AdaptiveBudget(safeguard=0.5), torch.tensor([[4, 4]]), importance, valid, 0).tolist() == [[3, 1]]


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
        ("1.5%B", 15),
        ("0.01 %b", 1),
        ("2 GiB", 2 * 2**30 // 1000),
        ("10kb", 10),
        ("0.01%", 1),
        ("ratio 0", 1000),
        ("ratio 0.0", 1000),
        ("ratio 0.5", 500),
        ("ratio .75", 250),
        ("ratio 0.9", 100),  # 1 - 0.9 is less than 0.1 in binary fractions
        ("ratio 9e-1", 100),
        ("ratio 0.999999", 1),
        (ratio_budget(" 0.875 "), 125),
    ],
)
def test_budget_texts(text, expected):
    assert Budget.parse(text).tokens(1000, bytes_per_token=1000) == expected


@given(st.integers(1, 100), st.integers(1, 9_999))
def test_a_share_of_bytes_is_that_share_of_tokens_where_rows_are_as_they_are(percent, length):
    of_bytes, of_tokens = Budget.parse(f"{percent}%B"), Budget.parse(f"{percent}%")
    assert of_bytes.tokens(length, 512) == of_tokens.tokens(length, 512)
    assert of_bytes.num_bytes(length, 512) == pytest.approx(percent * length * 5.12)
    assert of_tokens.num_bytes(length, 512) is None


@pytest.mark.parametrize(
    "text", ["", "x", "-4", "0", "0%", "3.5", "12 apples", "1e3", "101%", "%", "101%B", "0%B", "%B"]
)
def test_budget_texts_that_make_no_sense(text):
    with pytest.raises(UsageError):
        Budget.parse(text)


@pytest.mark.parametrize("ratio", ["", "1", "1.0", "-0.1", "1.5", "75%", "half", "nan", "inf", "-inf", "0,5", "1e9"])
def test_ratios_that_make_no_sense(ratio):
    with pytest.raises(UsageError, match=r"compression ratio of .* is no share of the cache to remove: give 0 or more"):
        Budget.parse(ratio_budget(ratio))


@given(st.integers(0, 999), st.integers(1, 100_000))
def test_a_ratio_is_the_share_that_is_left(thousandths, length):
    kept = Budget.parse(f"ratio {thousandths / 1000}")
    assert kept.unit == "share"
    exact = Fraction(1000 - thousandths, 1000) * length
    assert abs(kept.tokens(length, 1) - max(1, exact)) <= Fraction(1, 2) + Fraction(1, 10**6)
