"""Rows in 8, 4 and 2 bits: the packing and attention over it against slow twins in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import interpreted
from support.packed import packed_in, slow_twin
from test_attention import TOLERANCE, assert_like_reference, attend, attend_in_parts, make_request

from headprof.compression.kernels import backends, flash
from headprof.compression.kernels.append import torch_append
from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.kernels.triton_append import triton_append
from headprof.errors import UsageError

BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]


def random_rows(counts, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (sum(counts), head_dim)
    keys = torch.randn(size, generator=generator) * torch.rand(head_dim, generator=generator) * 9
    return keys.to(dtype), torch.randn(size, generator=generator).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    head_dim=st.sampled_from([4, 12, 16]),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_rows_are_those_of_the_slow_twin(counts, head_dim, bits, group_size, dtype, seed):
    keys, values = random_rows(counts, head_dim, dtype, seed)
    packed = QuantisedRows.quantised(keys, values, counts, first=1, bits=bits, group_size=group_size)
    expected = slow_twin(keys, values, counts, bits, group_size)
    for found, own, plain in zip(packed.unpacked(torch.float32), expected, (keys, values), strict=True):
        # A number half way between two codes may become either.
        far, error = (found.double() - own).abs() > 1e-5, (own - plain.double()).abs().max() if own.numel() else 0
        assert far.sum() <= 1 + own.numel() // 50
        assert ((found.double() - own).abs() <= 2.1 * error + 1e-5).all()
    groups = sum(-(-count // group_size) for count in counts)
    size = sum(counts) * (2 * head_dim * bits // 8 + 4) + groups * head_dim * 4
    assert sum(each.nbytes for each in packed.tensors) == size
    assert packed.total == sum(counts)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_off_by_half_a_step(bits):
    keys, values = random_rows([40, 7], 16, torch.float32)
    packed = QuantisedRows.quantised(keys, values, [40, 7], first=0, bits=bits, group_size=8)
    new_keys, new_values = packed.unpacked(torch.float32)
    step = (values.amax(1) - values.amin(1)) / (2**bits - 1)
    rounding = 2**-10 * values.abs().amax(1)  # of scale and zero
    assert ((new_values - values).abs().amax(1) <= 0.5 * step + rounding).all()
    assert (new_keys - keys).abs().max() < 9 * 6 / (2**bits - 1)


def test_heads_are_taken_apart_and_put_together():
    counts = [5, 0, 9, 2]
    keys, values = random_rows(counts, 8, torch.float32)
    packed = QuantisedRows.quantised(keys, values, counts, first=1, bits=4, group_size=4)
    whole, starts = packed.unpacked(torch.float32)[0], [0, 5, 5, 14]
    chosen = packed.of_heads([2, 0, 0, 1])
    expected = torch.cat([whole[starts[h] : starts[h] + counts[h]] for h in (2, 0, 0, 1)])
    assert chosen.counts == [9, 5, 5, 0]
    assert torch.equal(chosen.unpacked(torch.float32)[0], expected)
    joined = packed.joined_with([2, chosen, packed])
    assert joined.counts == [0, 0, 9, 5, 5, 0, 5, 0, 9, 2]
    assert torch.equal(joined.unpacked(torch.float32)[0], torch.cat([expected, whole]))


def quantised_request(lengths, counts, *, bits=4, first=1, group_rows=8, **shape):
    request = make_request(lengths, **shape)
    return replace(request, rows=packed_in(request.rows, counts, first=first, bits=bits, group_size=group_rows))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("option", "num_queries"), [("plain", 1), ("all", 3), ("hidden", 1)])
def test_attention_is_that_over_dequantised_rows(backend, dtype, bits, option, num_queries):
    shape = {"num_kv_heads": 2, "group_size": 3, "num_queries": num_queries, "dtype": dtype, "option": option}
    request = quantised_request([30, 6, 150, 21], [25, 0, 140, 10], bits=bits, head_dim=20, **shape)
    assert_like_reference(attend(request, backend), request)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 40), min_size=2, max_size=2),
    first=st.integers(0, 2),
    group_size=st.integers(1, 33),
    num_queries=st.integers(1, 2),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_attention_over_any_lengths(lengths, first, group_size, num_queries, bits, seed):
    counts = [max(0, length - first - num_queries - seed % 2) for length in lengths]
    shape = {"num_kv_heads": 2, "group_size": 2, "num_queries": num_queries, "seed": seed}
    request = quantised_request(lengths, counts, bits=bits, first=first, group_rows=group_size, **shape)
    assert_like_reference(attend(request, "torch"), request)


@interpreted
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parts_of_a_head_are_joined(bits):
    request = quantised_request([700, 140], [690, 100], bits=bits, num_kv_heads=2, group_size=2, num_queries=2)
    assert_like_reference(attend_in_parts(request), request)


def test_the_reference_unpacks_by_the_slow_twin():
    """Attention in float64 over what the slow twin leaves of each head's rows."""
    counts, plain = [9, 4], make_request([12, 6], num_kv_heads=2, group_size=1, num_queries=1, space=0)
    packed = replace(plain, rows=packed_in(plain.rows, counts, first=1, bits=8, group_size=4))
    keys, values = plain.rows.keys.clone(), plain.rows.values.clone()
    for start, count in ((1, 9), (13, 4)):
        own = slice(start, start + count)
        new_keys, new_values = slow_twin(keys[own], values[own], [count], 8, 4)
        keys[own], values[own] = new_keys.float(), new_values.float()
    expected = attend(replace(plain, rows=replace(plain.rows, keys=keys, values=values)), "reference")
    torch.testing.assert_close(attend(packed, "reference"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("append", [torch_append, pytest.param(triton_append, marks=interpreted)])
def test_rows_are_appended_behind_those_in_full(append):
    request = quantised_request([30, 6], [25, 0], num_kv_heads=2, group_size=2, num_queries=1, space=5)
    rows = replace(request.rows, next_positions=torch.tensor([60, 60], dtype=torch.int32), uniform=0, in_use=None)
    before = rows.unpacked()
    for count in (1, 3):
        states = torch.randn(1, 2, count, 16)
        append(rows, states, -states)
        after = rows.unpacked()
        for head in (0, 1):
            start, end = after.bounds[2 * head : 2 * head + 2].tolist()
            assert torch.equal(after.keys[end - count : end], states[0, head])
            assert torch.equal(after.values[end - count : end], -states[0, head])
            length = (30, 6)[head]
            assert torch.equal(after.keys[start : start + length], before.keys[start : start + length])


def test_a_backend_that_reads_full_rows_alone_says_so():
    request = quantised_request([30, 6], [25, 0], num_kv_heads=2, group_size=2, num_queries=1)
    assert backends.BACKENDS["flash-attn"].unsupported(request) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "device_unsupported", lambda device: None)
        half = replace(request, query=request.query.half())
        with pytest.raises(UsageError, match="'varlen' reads only rows that are held in full: use --backend auto"):
            attend(half, "varlen")
