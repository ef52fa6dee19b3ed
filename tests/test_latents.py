"""Latents of key and value in codes, in a basis that heads share."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.observations import observed_prompt
from support.packed import best_of_rank, held, latents_in, like_a_layer, weights_of
from test_attention import assert_like_reference, attend, make_request

from headprof.compression.kernels import backends
from headprof.compression.methods.latent import Latent
from headprof.compression.rows import Rows


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=4, max_size=4),
    head_dim=st.sampled_from([4, 5, 8]),
    heads=st.integers(0, 2),
    rank=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    counts=st.sampled_from([1.0, 10.0]),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([5, 32]),
    seed=st.integers(0, 9),
)
def test_latents_are_the_best_of_their_rank_in_codes(lengths, head_dim, heads, rank, counts, bits, group_size, seed):
    """What the twin has before it rounds, head by head and channel by channel, and half a step of error after it."""
    options = {"heads": heads, "rank": rank, "keys": counts, "bits": bits, "group_size": group_size}
    rows, held_as, observed = held(Latent, lengths, head_dim, seed=seed, **options)
    assert sum(each.nbytes for each in held_as.tensors) <= sum(each.nbytes for each in rows.tensors)
    if held_as.packed is None:
        return
    rotary, shared = observed.layer.rotary, heads or 2
    packed, whole, starts = held_as.packed, held_as.unpacked(), [0, *accumulate(lengths)]
    assert packed.latent_basis.shape[1] * bits % 8 == 0
    for group in range(packed.num_bases):
        own = [head for head in range(4) if packed.counts[head] and packed.groups[head] == group]
        first = own[0] // shared * shared
        last = first + shared - 1
        index = torch.cat([torch.arange(starts[head] + 1, starts[head] + 1 + packed.counts[head]) for head in own])
        keys, values = rows.keys[index].double(), rows.values[index].double()
        asking = observed.queries[own[0] // 2, 2 * (first % 2) : 2 * (last % 2) + 2].flatten(0, 1)
        weights = weights_of(asking, None if rotary is None else rotary.partners(head_dim))
        sizes = ((keys * weights).square().mean() / counts).sqrt() / weights, values.square().mean().sqrt()
        if rotary is not None:
            keys = rotary.unrotate(keys[None, None].float(), rows.positions[index])[0, 0].double()
        both = torch.cat([keys / sizes[0], values / sizes[1]], dim=1)
        best = best_of_rank(both, packed.latent_basis.shape[1])
        found = torch.cat([whole.keys[index] / sizes[0], whole.values[index] / sizes[1]], dim=1).double()
        if rotary is not None:
            turned_back = rotary.unrotate(found[None, None, :, :head_dim].float(), rows.positions[index])[0, 0]
            found = torch.cat([turned_back.double(), found[:, head_dim:]], dim=1)
        latents = torch.linalg.svd(best, full_matrices=False)
        reach = 2 * (latents.U * latents.S).abs().amax(dim=0).square().sum().sqrt()
        step = reach / (2**bits - 1)
        assert abs((found - both).norm() - (best - both).norm()) <= (0.51 * step + 5e-3) * len(both) ** 0.5


def test_latents_of_few_dimensions_in_many_bits_are_the_rows():
    keys, values = like_a_layer([60, 50], 8, rank=2), like_a_layer([60, 50], 8, rank=2, seed=1)
    block = torch.zeros(1, 2, 1, 8)
    rows = Rows(keys, values, torch.arange(110, dtype=torch.int32), [60, 50])
    observed = observed_prompt(block, block, scaling=1.0, rotary=None)
    low = Latent(rank=0.25, bits=8).hold(rows, observed, first=1, newest=2)
    assert low.packed.total == 104 and low.packed.latent_basis.shape == (1, 4, 16)
    torch.testing.assert_close(low.unpacked().keys, keys, atol=0.05, rtol=0.05)
    torch.testing.assert_close(low.unpacked().values, values, atol=0.05, rtol=0.05)


def test_the_bytes_of_latents_are_counted_one_by_one():
    _, low, _ = held(Latent, [80, 70, 90] * 2, 8, rank=0.25)
    groups = sum(-(-count // 32) for count in low.packed.counts)
    size = sum(low.packed.counts) * 2 + groups * 2 * 4 * 2 + 2 * 4 * 16 * 4 + 6 * 4 + 8 * 6
    assert sum(each.nbytes for each in low.packed.tensors) == size


def test_heads_of_latents_are_taken_apart_and_put_together():
    _, low, _ = held(Latent, [50, 40, 0, 45, 30, 60], 8, rank=0.25, heads=2)
    packed = low.packed
    whole, starts = packed.unpacked(torch.float32)[0], [0, *accumulate(packed.counts)]
    chosen = packed.of_heads([5, 0, 0, 2])
    expected = torch.cat([whole[starts[h] : starts[h + 1]] for h in (5, 0, 0, 2)])
    torch.testing.assert_close(chosen.unpacked(torch.float32)[0], expected)
    joined = packed.joined_with([2, chosen, packed])
    assert joined.counts == [0, 0, *chosen.counts, *packed.counts] and joined.num_bases == 5
    torch.testing.assert_close(joined.unpacked(torch.float32)[0], torch.cat([expected, whole]))


@pytest.mark.parametrize("num_queries", [1, 3])
def test_attention_is_that_over_latents_unpacked(num_queries):
    shape = {"num_kv_heads": 2, "group_size": 3, "num_queries": num_queries, "option": "all"}
    request = make_request([30, 6, 150, 21], **shape)
    request = replace(request, rows=latents_in(request.rows, [25, 0, 140, 10], [0, 0, 1, 1]))
    assert_like_reference(attend(request, "torch"), request)
    assert backends.BACKENDS["triton"].unsupported(request) is not None
