"""Rows in a basis that heads share: directions, rows, their twins, bytes, and what waits for the device."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import interpreted
from support.host_reads import device_watched
from support.observations import observed_prompt
from support.packed import best_of_rank, held, like_a_layer, low_rank_in, weights_of
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import ARCHITECTURES, tiny_model
from test_attention import TOLERANCE, assert_like_reference, attend, make_request

from headprof import compressed
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.kernels import backends
from headprof.compression.kernels.append import torch_append
from headprof.compression.kernels.shared_basis import turned
from headprof.compression.kernels.triton_append import triton_append
from headprof.compression.methods.directions import by_eigenvectors, by_iteration, grams
from headprof.compression.methods.low_rank import LowRank
from headprof.compression.methods.table import METHODS
from headprof.compression.rows import Rows
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.models.rotary import rotary_of


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Directions.


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    head_dim=st.integers(1, 24),
    share=st.floats(0.05, 1),
    heads=st.integers(1, 2),
    find=st.sampled_from([by_eigenvectors, by_iteration]),
    seed=st.integers(0, 9),
)
def test_directions_leave_out_as_little_as_the_singular_vectors(counts, head_dim, share, heads, find, seed):
    counts[0] += 1
    rows, rank = like_a_layer(counts, head_dim, seed=seed), max(1, round(share * head_dim))
    before = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    found = find(grams(rows, before, max(counts), 2, heads), rank)
    assert found.shape == (4 // heads, rank, head_dim) and found.dtype == torch.float32
    products = found @ found.transpose(1, 2)
    torch.testing.assert_close(products, torch.eye(rank).expand_as(products), atol=1e-5, rtol=0)
    parts = rows.double().split(counts)
    for group, directions in enumerate(found.double()):
        own = torch.cat(parts[heads * group : heads * (group + 1)])
        left = (own - own @ directions.T @ directions).square().sum()
        least = torch.linalg.svdvals(own)[rank:].square().sum()
        most = 1.05 if find is by_eigenvectors else 1.3  # rounds are slow where two directions are about as large
        assert left <= most * least + 1e-5 * own.square().sum()


def test_rows_of_zeros_have_directions_too():
    for find in (by_eigenvectors, by_iteration):
        assert find(torch.zeros(2, 6, 6), 3).isfinite().all()


# Turning.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_are_turned_as_the_model_does(arch):
    rotary, keys, places = rotary_of(tiny_model(arch)), torch.randn(1, 1, 40, 16), torch.arange(0, 400, 10)
    turning = rotary.turning(16)
    numbers = torch.tensor(turning.frequencies), torch.tensor(turning.partners)
    expected = rotary.rotate(keys, *rotary.angles(places))[0, 0]
    torch.testing.assert_close(turned(keys[0, 0], places, *numbers), expected, atol=1e-3, rtol=1e-3)
    again = turned(turned(keys[0, 0], places, *numbers), -places, *numbers)
    torch.testing.assert_close(again, keys[0, 0], atol=1e-5, rtol=1e-5)


def test_dimensions_that_are_not_turned_stay():
    keys = torch.randn(5, 6)
    numbers = torch.tensor([0.3, 0.0, -0.3, 0.0, 0.0, 0.0]), torch.tensor([2, 1, 0, 3, 4, 5])
    there = turned(keys, torch.arange(5), *numbers)
    assert torch.equal(there[:, [1, 3, 4, 5]], keys[:, [1, 3, 4, 5]]) and not torch.equal(there, keys)
    assert torch.equal(turned(keys, torch.arange(5), numbers[0][:0], numbers[1][:0]), keys)


# What is packed.


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    head_dim=st.sampled_from([4, 5, 8, 16]),
    heads=st.integers(0, 4),
    ranks=st.tuples(st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.sampled_from([0.2, 0.5, 0.75])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    first=st.integers(0, 2),
    unrotated=st.booleans(),
    seed=st.integers(0, 9),
)
def test_rows_are_the_best_of_their_rank(lengths, head_dim, heads, ranks, dtype, first, unrotated, seed):
    options = {"heads": heads, "key_rank": ranks[0], "value_rank": ranks[1], "unrotated": unrotated}
    rows, low, observed = held(LowRank, lengths, head_dim, dtype=dtype, seed=seed, first=first, **options)
    assert sum(each.nbytes for each in low.tensors) <= sum(each.nbytes for each in rows.tensors)
    if low.packed is None:
        return
    whole, packed, shared = low.unpacked(), low.packed, heads or 3
    assert torch.equal(whole.positions, rows.positions) and whole.keys.dtype == dtype
    heads_of = [range(at, min(at + shared, start + 3)) for start in (0, 3) for at in range(start, start + 3, shared)]
    starts = [0, *accumulate(lengths)]
    for group in heads_of:
        counts = [packed.counts[head] for head in group]
        assert counts in ([0] * len(group), [max(0, lengths[head] - first - 2) for head in group])
        begins = [starts[head] + first for head in group]
        index = torch.cat([torch.arange(at, at + count) for at, count in zip(begins, counts, strict=True)])
        own = rows.keys[index].double()
        turn = observed.layer.rotary if unrotated else None
        asking = observed.queries[group[0] // 3, 2 * (group[0] % 3) : 2 * (group[-1] % 3) + 2].flatten(0, 1)
        weights = weights_of(asking, None if turn is None else turn.partners(head_dim))
        expected = best_of_rank(own, packed.key_basis.shape[1], rows.positions[index], turn, weights)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype] * max(1.0, float((own * weights).norm()))
        # What is left out is unique, which direction it is not where singular values are alike.
        error, least = ((found - own) * weights for found in (whole.keys[index].double(), expected))
        assert abs(error.norm() - least.norm()) <= tolerance
        own = rows.values[index].double()
        expected = best_of_rank(own, packed.value_basis.shape[1])
        assert abs((whole.values[index].double() - own).norm() - (expected - own).norm()) <= tolerance
    others = torch.cat(
        [
            torch.cat([torch.arange(start, start + min(first, n)), torch.arange(start + min(first, n) + c, start + n)])
            for start, n, c in zip(starts, lengths, packed.counts, strict=False)
        ]
    )
    assert torch.equal(whole.keys[others], rows.keys[others]) and torch.equal(low.values, rows.values[others])


def test_a_space_of_few_dimensions_is_kept_whole():
    """Rows that lie in as many dimensions as the basis has are what they were, and so are all in a basis of all."""
    keys, values = like_a_layer([30, 20], 8, rank=3), like_a_layer([30, 20], 8, rank=4, seed=1)
    block = torch.zeros(1, 2, 1, 8)
    rows = Rows(keys, values, torch.arange(50, dtype=torch.int32), [30, 20])
    observed = observed_prompt(block, block, scaling=1.0, rotary=None)
    for options in ({"key_rank": 3 / 8, "value_rank": 0.5}, {"key_rank": 1.0, "value_rank": 0.5}):
        low = LowRank(**options).hold(rows, observed, first=1, newest=2)
        assert low.packed.total == 44
        torch.testing.assert_close(low.unpacked().keys, keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(low.unpacked().values, values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "bases"), [(0, 1), (2, 2), (1, 3), (9, 1)])
def test_heads_share_a_basis(heads, bases):
    _, low, _ = held(LowRank, [80, 70, 90] * 2, 8, heads=heads, value_rank=0.625)
    assert len(low.packed.key_basis) == 2 * bases
    size = sum(low.packed.counts) * 8 * 4 + 2 * bases * 2 * 4 * 8 * 4 + 6 * 4 + 8 * 6
    assert sum(each.nbytes for each in low.packed.tensors) == size


def test_heads_with_too_few_rows_stay_as_they_are():
    rows, low, _ = held(LowRank, [4, 8, 5], 8, batch=1)
    assert low is rows
    _, low, _ = held(LowRank, [4, 60, 5] * 2, 8, heads=1)
    assert low.packed.counts == [0, 57, 0] * 2 and low.packed.groups == [0, 0, 0, 0, 1, 0]


def test_a_sequence_is_packed_as_it_would_be_alone():
    lengths = [80, 70, 90, 12, 9, 4, 60, 60, 60]
    _, low, _ = held(LowRank, lengths, 8, batch=3, heads=2)
    for sequence in range(3):
        heads, starts = range(3 * sequence, 3 * sequence + 3), [0, *accumulate(lengths)]
        own = slice(starts[heads[0]], starts[heads[-1] + 1])
        rows, _, observed = held(LowRank, lengths, 8, batch=3)
        alone = Rows(rows.keys[own], rows.values[own], rows.positions[own], [lengths[head] for head in heads])
        block, queries = torch.zeros(1, 3, 5, 8), observed.queries[sequence : sequence + 1]
        alone = LowRank(heads=2).hold(alone, observed_prompt(queries, block, scaling=1.0), first=1, newest=2)
        taken = low.of_heads(heads)
        assert taken.packed.counts == ([0] * 3 if alone.packed is None else alone.packed.counts)
        torch.testing.assert_close(taken.unpacked().keys, alone.unpacked().keys, atol=1e-5, rtol=1e-5)


def test_heads_are_taken_apart_and_put_together():
    _, low, _ = held(LowRank, [50, 40, 0, 45, 30, 60], 8, heads=2)
    packed = low.packed
    assert packed.groups[:2] == [0, 0] and len(packed.key_basis) == 3
    whole, starts = packed.unpacked(torch.float32)[0], [0, *accumulate(packed.counts)]
    chosen = packed.of_heads([5, 0, 0, 2])
    expected = torch.cat([whole[starts[h] : starts[h + 1]] for h in (5, 0, 0, 2)])
    assert chosen.counts == [57, 47, 47, 0] and len(chosen.key_basis) == 2
    torch.testing.assert_close(chosen.unpacked(torch.float32)[0], expected)
    joined = packed.joined_with([2, chosen, packed])
    assert joined.counts == [0, 0, *chosen.counts, *packed.counts] and len(joined.key_basis) == 5
    torch.testing.assert_close(joined.unpacked(torch.float32)[0], torch.cat([expected, whole]))
    none = packed.of_heads([2])
    assert none.total == 0 and none.unpacked(torch.float32)[0].shape == (0, 8)


def test_rows_take_the_place_of_those_that_are_laid_out_alike():
    _, low, _ = held(LowRank, [50, 40, 30] * 2, 8, heads=1)
    _, other, _ = held(LowRank, [50, 40, 30] * 2, 8, heads=1, seed=3)
    own = low.packed.lasting()
    assert own.take(other.packed) and torch.equal(own.low_keys, other.packed.low_keys)
    assert torch.equal(own.key_basis, other.packed.key_basis)
    assert not own.take(low.packed.of_heads([0, 1, 2, 0, 1, 2])) and not own.take(None)
    assert not own.take(held(LowRank, [50, 40, 30] * 2, 8)[1].packed)


# Attention.


def low_rank_request(lengths, counts, groups, *, first=1, rank=6, turns=True, **shape):
    request = make_request(lengths, **shape)
    rows = low_rank_in(request.rows, counts, groups, first=first, rank=rank, turns=turns)
    return replace(request, rows=rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("option", "num_queries"), [("plain", 1), ("all", 3), ("hidden", 1)])
def test_attention_is_that_over_unpacked_rows(dtype, option, num_queries):
    shape = {"num_kv_heads": 2, "group_size": 3, "num_queries": num_queries, "dtype": dtype, "option": option}
    request = low_rank_request([30, 6, 150, 21], [25, 0, 140, 10], [0, 0, 1, 1], head_dim=20, **shape)
    assert_like_reference(attend(request, "torch"), request)


@pytest.mark.parametrize("turns", [True, False])
def test_the_reference_unpacks_by_the_slow_twin(turns):
    """Each row by itself in float64: what it is in its head's basis, turned to its position."""
    lengths, counts, groups = [12, 6, 9], [9, 0, 5], [1, 0, 0]
    shape = {"num_kv_heads": 3, "group_size": 1, "num_queries": 1, "space": 0}
    plain = make_request(lengths, **shape)
    torch.manual_seed(0)
    rows = low_rank_in(plain.rows, counts, groups, turns=turns)
    packed, keys, values, at = rows.packed, plain.rows.keys.clone(), plain.rows.values.clone(), 0
    for start, count, group in zip((0, 12, 18), counts, groups, strict=True):
        for row in range(start + 1, start + 1 + count):
            key = packed.low_keys[at].double() @ packed.key_basis[group].double()
            values[row] = (packed.low_values[at].double() @ packed.value_basis[group].double()).float()
            at += 1
            if turns:
                half = (torch.arange(1, 9) / 16 * int(rows.positions[row])).double()
                pairs = torch.complex(key[:8], key[8:]) * torch.polar(torch.ones(8).double(), half)
                key = torch.cat([pairs.real, pairs.imag])
            keys[row] = key.float()
    expected = attend(replace(plain, rows=replace(plain.rows, keys=keys, values=values)), "reference")
    torch.testing.assert_close(attend(replace(plain, rows=rows), "reference"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("append", [torch_append, pytest.param(triton_append, marks=interpreted)])
def test_rows_are_appended_behind_those_in_full(append):
    shape = {"num_kv_heads": 2, "group_size": 2, "num_queries": 1, "space": 5}
    request = low_rank_request([30, 6], [25, 0], [0, 0], **shape)
    rows = replace(request.rows, next_positions=torch.tensor([60, 60], dtype=torch.int32), uniform=0, in_use=None)
    before = rows.unpacked()
    states = torch.randn(1, 2, 3, 16)
    append(rows, states, -states)
    after = rows.unpacked()
    for head, length in enumerate((30, 6)):
        start, end = after.bounds[2 * head : 2 * head + 2].tolist()
        assert torch.equal(after.keys[end - 3 : end], states[0, head])
        assert torch.equal(after.keys[start : start + length], before.keys[start : start + length])


def test_backends_that_read_no_bases_say_so():
    request = low_rank_request([30, 6], [25, 0], [0, 0], num_kv_heads=2, group_size=2, num_queries=1)
    for name in ("flash-attn", "varlen", "triton"):
        assert backends.BACKENDS[name].unsupported(request) is not None
    assert attend(request, "auto").shape == (1, 1, 4, 16)


# Whole caches.


@pytest.mark.parametrize("heads", [0, 1])
def test_nothing_waits_for_the_device(heads):
    lengths = [80, 70, 90] * 2
    held(LowRank, lengths, 8, heads=heads)  # what is made once for all layers
    block = torch.zeros(2, 3, 1, 8)
    rows = Rows(*(like_a_layer(lengths, 8) for _ in range(2)), torch.arange(480, dtype=torch.int32), lengths)
    observed = observed_prompt(block, block, scaling=1.0)
    with device_watched() as watched:
        low = LowRank(heads=heads).hold(rows, observed, first=1, newest=2)
        low.packed.at(torch.arange(low.packed.total), torch.float32)
    assert watched.waits == [] and low.packed.total == 462
    products = torch.eye(3)[None]
    with device_watched() as watched:
        by_eigenvectors(products, 2)
    assert len(watched.waits) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_before_they_are_turned_are_those_of_one_token(arch):
    """One token again and again has one key before it is turned, so a basis of one dimension is enough for it."""
    model = tiny_model(arch, layers=1)
    plan = make_plan(model, random_profile(model), method="lowrank", budget=60, key_rank=0.1, value_rank=0.1, heads=1)
    cache, whole = HeadCache(plan), HeadCache(make_plan(model, random_profile(model), method="headkv-r2", budget=60))
    with attending_ragged(model):
        for each in (cache, whole):
            prefill(model, torch.full((1, 200), 7), each)
    low, rows = (each.head_layers[0].storage.compact() for each in (cache, whole))
    assert low.packed is not None and low.packed.key_basis.shape[1] == 2
    torch.testing.assert_close(low.unpacked().keys, rows.keys, atol=2e-3, rtol=2e-3)


def test_beams_go_on_as_alone():
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(2, 120)
    with compressed(model, random_profile(model), method="lowrank", budget=40, buffer=8):
        alone = model.generate(ids[:1], max_new_tokens=30, num_beams=3, do_sample=False)
        both = model.generate(ids, max_new_tokens=30, num_beams=3, do_sample=False)
    assert alone[0].tolist() == both[0].tolist()


def test_the_table_has_them_with_the_importance_and_budgets_of_headkv():
    for name in ("lowrank", "latent"):
        assert METHODS[name].with_options(representation="full") == METHODS["headkv-r2"]
