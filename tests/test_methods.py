"""The methods of the papers: every importance against loops in float64, the choice of tokens, and whole generations."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.observations import as_held_rows, observed_prompt
from support.profiles import judging, random_curves, random_profile, random_rows
from support.prompts import random_ids
from support.tiny_models import tiny_model
from support.twins import slow_attention, slow_score

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.methods.curve_budget import CurveBudget, curve_scores
from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.importance import KeyDiff, KeyNorm, Recency
from headprof.compression.methods.method import Method
from headprof.compression.methods.received_attention import Accumulated
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.reduction import largest, ranking
from headprof.compression.methods.refined_budget import RefinedBudget
from headprof.compression.methods.table import METHODS, deal_options, find_method
from headprof.compression.methods.window_attention import LastQuery, WindowAttention
from headprof.compression.rows import HeadCounts
from headprof.compression.session import compressed, prefill
from headprof.errors import UsageError
from headprof.models.shape import HeadShape

IMPORTANCES = [
    WindowAttention(5, 3),
    WindowAttention(5, 3, shared=True),
    LastQuery(),
    Accumulated(),
    Reconstruction(5),
    KeyNorm(),
    KeyDiff(),
    Recency(),
    ExpectedAttention(future=4, skip_first=1),
]


@st.composite
def prompts(draw):
    """One layer's queries and keys with any grouping, padding in front, and last tokens that only observe."""
    batch, num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    tokens = draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : draw(st.integers(0, tokens - 1))] = False
    valid[:, tokens - draw(st.integers(0, min(2, tokens - 1))) :] = False
    return observed_prompt(
        torch.randn(batch, num_kv_heads * group, tokens, 8, generator=generator).to(dtype),
        torch.randn(batch, num_kv_heads, tokens, 8, generator=generator).to(dtype),
        valid,
        scaling=draw(st.sampled_from([0.4, 2.0])),
        softcap=draw(st.sampled_from([None, 2.0])),
        sliding_window=draw(st.sampled_from([None, 1, 5])),
    )


@pytest.mark.parametrize("importance", IMPORTANCES, ids=repr)
@given(prompts())
@settings(max_examples=25, deadline=None)
def test_importance_equals_its_slow_twin(importance, observed):
    score = importance.score(observed)
    assert score.dtype == torch.float32 and score.shape == observed.keys.shape[:3]
    torch.testing.assert_close(score.double(), slow_score(importance, as_held_rows(observed)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", IMPORTANCES, ids=repr)
@given(prompts(), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_the_queries_it_names_are_all_it_needs(importance, observed, more):
    num_tokens = observed.keys.shape[2]
    needed = num_tokens if importance.queries is None else min(importance.queries, num_tokens)
    held = min(needed + more, num_tokens)
    fewer = replace(observed, queries=observed.queries[:, :, num_tokens - held :], shared={})
    assert torch.equal(importance.score(fewer), importance.score(observed))


@given(prompts(), st.data())
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_the_whole_matrix(observed, data):
    batch, num_kv_heads, num_tokens, _ = observed.keys.shape
    start = data.draw(st.integers(0, num_tokens))
    stop = data.draw(st.integers(max(1, start), num_tokens))
    rows = observed.attention(start, stop)
    group = observed.queries.shape[1] // num_kv_heads
    assert rows.shape == (batch, num_kv_heads, group, stop - start, stop)
    expected = slow_attention(as_held_rows(observed))[:, :, start:stop]
    assert not expected[..., stop:].any()
    torch.testing.assert_close(rows.flatten(1, 2).double(), expected[..., :stop], atol=1e-5, rtol=1e-4)
    assert torch.equal(observed.last_attention(num_tokens - start), observed.attention(start, num_tokens))


def test_rows_of_queries_that_are_not_held_are_refused():
    observed = observed_prompt(torch.rand(1, 2, 3, 8), torch.rand(1, 2, 9, 8), scaling=1.0)
    assert observed.attention(6, 9).shape == (1, 2, 1, 3, 9)
    with pytest.raises(ValueError, match="queries 5 to 9 asked for, 6 to 9 held"):
        observed.last_attention(4)


def test_parameters_that_make_no_sense():
    with pytest.raises(UsageError, match="window of 0 queries"):
        WindowAttention(window=0)
    with pytest.raises(UsageError, match=r"recent_share of 1\.5"):
        find_method("h2o").with_options(recent_share=1.5)


def chosen(method, importance, counts, valid):
    """The tokens that each head keeps, bool `[B, K, T]`."""
    ranked, kept = method.ranked(importance, HeadCounts.looked_up(counts), valid)
    return largest(ranked, kept.counts, most=kept.most)


def slow_top_tokens(importance, counts, valid, sinks, keep_last):
    """Sort everything; `keep_last` is `[B, K]`."""
    from_start = valid.cumsum(dim=-1)[:, None]
    from_end = valid.flip(-1).cumsum(dim=-1).flip(-1)[:, None]
    protected = (from_start <= sinks) | (from_end <= keep_last[..., None])
    ranked = importance.masked_fill(protected, float("inf")).masked_fill(~valid[:, None], float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    for b, k in torch.cartesian_prod(torch.arange(kept.shape[0]), torch.arange(kept.shape[1])).tolist():
        kept[b, k, order[b, k, : int(counts[b, k])]] = True
    return kept


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 2, 7, 50, 300, 5000]),
    st.sampled_from([1, 2, 10, 10**5]),
    st.integers(0, 4),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_the_largest_of_a_ranking_are_those_that_sorting_finds(batch, heads, tokens, distinct, sinks, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(-distinct, distinct, (batch, heads, tokens), generator=generator) / distinct
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    valid = torch.arange(tokens) >= tokens - lengths
    counts = (torch.rand(batch, heads, generator=generator) ** 2 * (lengths + 1)).long()
    keep_last = (torch.rand(batch, heads, generator=generator) * (counts + 3)).long()
    kept = largest(ranking(importance, valid, sinks=sinks, keep_last=keep_last), counts)
    assert torch.equal(kept, slow_top_tokens(importance, counts, valid, sinks, keep_last))
    assert torch.equal(kept.sum(-1), counts)
    same = torch.full_like(counts, 2)
    assert torch.equal(
        largest(ranking(importance, valid, sinks=sinks, keep_last=2), counts),
        slow_top_tokens(importance, counts, valid, sinks, same),
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_what_differs_by_noise_is_equal(sign):
    """In whichever order it is added up."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(11, generator=generator)
    orders = torch.stack([torch.randperm(11, generator=generator) for _ in range(200)])
    sums = sign * torch.stack([sum(part) for part in numbers[orders]])
    assert len(sums.unique()) > 2
    values = torch.cat([sums[:99], sums.new_tensor([2 * sums.max() if sign > 0 else 0.0]), sums[99:]])
    marked = largest(values[None], torch.tensor([5]))[0].nonzero().flatten().tolist()
    assert marked == [0, 1, 2, 3, 99]
    apart = torch.tensor([[1.0, 1 + 2.0**-19, 1 - 2.0**-19]]) * sign
    assert largest(apart, torch.tensor([1])).int().tolist() == [[0, 1, 0] if sign > 0 else [0, 0, 1]]


def test_the_latest_of_very_many_tokens_are_told_apart():
    layer = observed_prompt(torch.randn(1, 2, 1, 2), torch.randn(1, 1, 9, 2), scaling=1.0)
    late = replace(layer.rows, positions=torch.arange(3_000_000, 3_000_009)[None, None])
    observed = replace(layer, rows=late, is_prompt=False, seen=3_000_009)
    score = Recency().score(observed)
    assert largest(score, torch.tensor([[4]]), Recency().noise)[0, 0].int().tolist() == [0] * 5 + [1] * 4


def test_largest_marks_the_earlier_of_equal_values():
    values = torch.tensor([[2.0, 1.0, 2.0, 2.0], [0.0, -0.0, 0.0, 1.0]])
    assert largest(values, torch.tensor([2, 3])).int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1]]
    assert largest(values, torch.tensor([0, 4])).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_ranking_puts_padding_last_even_among_the_tokens_always_kept():
    valid = torch.tensor([[False, True, True, True, True, False]])
    ranked = ranking(torch.zeros(1, 1, 6), valid, sinks=1, keep_last=1)
    inf = float("inf")
    assert ranked.tolist() == [[[-inf, inf, 0, 0, inf, -inf]]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 1.0])
def test_a_recent_share_keeps_that_many_of_the_last(share):
    method = Method(KeyNorm(), sinks=2, keep_last=3, recent_share=share)
    importance = torch.linspace(1, 0, 40)[None, None].expand(1, 36, 40)  # without it the first would be kept
    counts, valid = torch.arange(5, 41)[None], torch.ones(1, 40, dtype=torch.bool)
    kept = chosen(method, importance, counts, valid)
    for count, row in zip(counts[0].tolist(), kept[0], strict=True):
        recent = max(3, min(math.floor(share * count), count - 2))
        assert row[:2].all() and row[40 - recent :].all() and int(row.sum()) == count
        assert row[: count - recent].all()


def test_adaptive_heads_compete_without_the_tokens_that_all_keep():
    method = find_method("adakv").with_options(safeguard=0.0, sinks=1, keep_last=1)
    importance = torch.tensor([[[0, 5, 4, 3, 2, 0], [99, 3.5, 3.4, 0, 1, 99]]])
    kept = chosen(method, importance, torch.tensor([[3, 3]]), torch.ones(1, 6, dtype=torch.bool))
    assert kept.int().tolist() == [[[1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1]]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full" and METHODS[name].always_kept < 8])
@given(st.integers(1, 2), st.integers(1, 3), st.integers(9, 40), st.integers(0, 20), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_every_method_spends_exactly_its_budget(name, batch, heads, tokens, padding, seed):
    method = METHODS[name]
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : min(padding, tokens - 9)] = False
    importance = torch.rand(batch, heads, tokens, generator=generator)
    scores = torch.rand(2, heads, generator=generator)
    if isinstance(method.budget, CurveBudget):
        scores = curve_scores(random_curves(HeadShape("M", 2, heads, heads, 8, 100), seed % 1000, grid=(4, 6, 9)))
    elif isinstance(method.budget, RefinedBudget):
        scores = random_rows(HeadShape("M", 2, heads, heads, 8, 100), seed % 1000, (4.0, 7.0))
    elif method.budget.goes_by_share:  # and has them for several
        scores = torch.stack([scores * 0.2 + 0.01, scores * 0.5 + 0.05])
    counts = torch.stack(
        [
            method.budget.allocate(
                scores,
                budget=8,
                context_length=int(length),
                always_kept=method.always_kept,
            )[0]
            for length in valid.sum(-1)
        ]
    )
    kept = chosen(method, importance, counts, valid)
    assert torch.equal(kept.sum(dim=(1, 2)), counts.sum(-1))
    assert not (kept & ~valid[:, None]).any()
    for b in range(batch):
        real = valid[b].nonzero().flatten()
        assert kept[b, :, real[: method.sinks]].all()
        assert kept[b, :, real[len(real) - method.keep_last :]].all()


def test_parameters_may_follow_a_methods_name():
    assert find_method("ems:mass=false:threshold=0.5") == find_method("ems").with_options(mass=False, threshold=0.5)
    with pytest.raises(UsageError, match="no method 'magic'"):
        find_method("magic:mass=false")
    with pytest.raises(UsageError, match="no parameter 'mass'"):
        find_method("snapkv:mass=false")
    with pytest.raises(UsageError, match="cannot be read"):
        find_method("ems:mass")


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_is_made_again_from_its_parameters(name):
    changed = find_method(name).with_options(sinks=2, keep_last=5)
    assert find_method(name).with_options(**changed.options()) == changed


@pytest.mark.parametrize("name", list(METHODS))
def test_generation_with_every_method(name):
    model = tiny_model(num_kv_heads=2, layers=3)
    ids = random_ids(1, 40, seed=1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    full = model.generate(ids, **options)
    by = {"method": name} | judging(model, name)
    whole = {"recovery": 1.0} if METHODS[name].budget.follows_content else {}
    if METHODS[name].representation.is_full:
        with compressed(model, random_profile(model), **by, budget=40, **whole):
            assert torch.equal(model.generate(ids, **options), full)
    few = max(9, METHODS[name].always_kept + 4)
    with compressed(model, random_profile(model), **by, budget=few) as plan:
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    lengths = cache.lengths[:, 0]
    if plan.follows_content:  # and a budget is but the most
        assert (lengths.sum(-1) <= plan.allocation(40).sum(-1)).all()
        assert int(lengths.min()) >= plan.method.always_kept
        return
    assert lengths.sum() == plan.allocation(40).sum()
    if not plan.method.budget.ranks_together:
        assert torch.equal(lengths.sum(-1), plan.allocation(40).sum(-1))
    if not plan.method.budget.ranks_together and not plan.method.budget.spreads:
        assert torch.equal(lengths, plan.allocation(40))
    assert int(lengths.min()) >= plan.method.always_kept


def test_options_for_several_methods_go_to_those_that_have_them():
    options = {"window": 5, "keep_last": 0, "mass": True, "power": None}
    dealt = deal_options(["snapkv", "knorm", "ems:balance=0.5"], options)
    assert dealt == {
        "snapkv": {"window": 5, "keep_last": 0},
        "knorm": {"keep_last": 0},
        "ems:balance=0.5": {"window": 5, "keep_last": 0, "mass": True},
    }


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["snapkv", "tova"], {"redundancy": 1.0}, "None of the methods has a parameter 'redundancy'"),
        (["snapkv", "knorm"], {"window": "wide"}, "'window' cannot be 'wide'"),
        (["snapkv", "chess"], {}, "no method 'chess'"),
        (["snapkv"], {"kernel": -3}, "A kernel of -3 tokens"),
        (["snapkv"], {"power": float("nan")}, "'power' cannot be nan"),
        (["pyramidkv"], {"taper": float("inf")}, "'taper' cannot be inf"),
        (["snapkv", "ems:mass=false"], {"mass": True}, "'mass' of 'ems:mass=false' is given once more"),
    ],
)
def test_options_that_no_method_can_take(names, options, message):
    with pytest.raises(UsageError, match=message):
        deal_options(names, options)
