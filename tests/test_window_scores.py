"""The Triton kernels of a window's judgement and of marking the largest, against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import has_triton, interpreted, on_cuda
from support.observations import as_held_rows, observed_prompt, with_rows

from headprof.compression.kernels import marking
from headprof.compression.methods import reduction, window_attention
from headprof.compression.methods.reduction import largest
from headprof.compression.methods.window_attention import LastQuery, WindowAttention

LAYERS = {"plain": {}, "softcap": {"softcap": 2.0}, "sliding": {"sliding_window": 9}}
WINDOWS = {
    "snapkv": WindowAttention(window=7),
    "tuned": WindowAttention(window=5, kernel=3, pooling="mean", power=2, ramp=True),
    "cubic": WindowAttention(window=20, kernel=1, power=3.0),
}


def make_prompt(batch, num_kv_heads, group_size, tokens, head_dim, dtype, *, window, padded, **layer):
    """A prompt whose first sequence is padded on the left by half, or not at all."""
    generator = torch.Generator().manual_seed(tokens * head_dim + group_size)
    queries = torch.randn(batch, num_kv_heads * group_size, min(window, tokens), head_dim, generator=generator)
    keys = torch.randn(batch, tokens, num_kv_heads, head_dim, generator=generator).transpose(1, 2)  # strided
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    if padded:
        valid[0, : tokens // 2] = False
    observed = observed_prompt(queries.to(dtype), keys.to(dtype), valid, scaling=1.5 * head_dim**-0.5, **layer)
    return replace(observed, padded=padded)


def make_held(observed):
    """The same as held rows: out of order, some hidden, each with a bias."""
    order = torch.rand(observed.keys.shape[:3], generator=torch.Generator().manual_seed(1)).argsort(dim=-1)
    held = as_held_rows(observed)
    rows = held.rows.map(lambda each: each.gather(2, order[..., None].expand_as(each) if each.ndim == 4 else order))
    held = replace(held, rows=rows, valid=held.valid.gather(2, order), padded=True)
    return with_rows(held, bias=torch.randn(order.shape, generator=torch.Generator().manual_seed(2)))


def by_both(importance, observed):
    """What an importance says by plain torch and by the kernels."""
    plain = importance.attention(observed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_attention, "serves", lambda queries: True)
        return plain, importance.attention(observed)


@interpreted
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "group_size", "tokens", "head_dim", "dtype"),
    [
        (1, 2, 4, 150, 16, torch.float32),
        (2, 1, 3, 40, 80, torch.bfloat16),
        (1, 1, 9, 3, 8, torch.float16),
        (2, 2, 1, 70, 256, torch.float32),
    ],
)
def test_the_kernels_judge_like_plain_torch(name, layer, batch, num_kv_heads, group_size, tokens, head_dim, dtype):
    window = WINDOWS[name]
    tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 5e-3, "atol": 1e-5}
    for padded in (False, True):
        shape = (batch, num_kv_heads, group_size, tokens, head_dim, dtype)
        prompt = make_prompt(*shape, window=window.window, padded=padded, **LAYERS[layer])
        for observed in (prompt, make_held(prompt)):
            plain, ours = by_both(window, observed)
            torch.testing.assert_close(ours, plain, **tolerance)


@interpreted
def test_the_kernels_add_up_several_splits(monkeypatch):
    monkeypatch.setattr("headprof.compression.kernels.window_scores._num_processors", lambda device: 100)
    prompt = make_prompt(1, 2, 2, 700, 16, torch.float32, window=7, padded=False)
    plain, ours = by_both(WINDOWS["snapkv"], prompt)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@interpreted
def test_the_last_query_by_the_kernels():
    for padded in (False, True):
        prompt = make_prompt(2, 2, 3, 50, 16, torch.float32, window=1, padded=padded)
        for observed in (prompt, make_held(prompt)):
            plain = LastQuery().score(observed)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(window_attention, "serves", lambda queries: True)
                torch.testing.assert_close(LastQuery().score(observed), plain, rtol=1e-4, atol=1e-6)


@interpreted
@given(
    st.integers(1, 3),
    st.sampled_from([1, 7, 300, 5000]),
    st.sampled_from([1, 3, 10**6]),
    st.sampled_from([0.0, 2.0**-20]),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_the_kernel_marks_what_plain_torch_marks(rows, size, distinct, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-distinct, distinct, (rows, size), generator=generator) / distinct
    values[:, : size // 5] = float("-inf")
    values[:, size - 1] = float("inf")
    most = min(size, 200)
    counts = torch.randint(0, most + 1, (rows,), generator=generator)
    plain = largest(values, counts, noise, most=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction.marking, "serves", lambda values: True)
        assert torch.equal(largest(values, counts, noise, most=most), plain)
    assert torch.equal(plain.sum(-1), counts)


@pytest.mark.skipif(not has_triton, reason="needs Triton")
def test_kernels_compile_for_gpus():
    """What the interpreter lets through, the compiler may not; it needs no GPU to compile for one."""
    code = """
import torch
from headprof.compression.kernels import marking, window_scores as module
kernels = [*module._kernels(), marking._kernel()]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
cases = [(80, "fp32", 80, True), (90, "bf16", 128, False), (80, "fp16", 256, True)]
for kernel in kernels:
    for capability, dtype, head_dim, options in cases:
        tile = module._Tile.of(torch.empty(1, head_dim, dtype=dtypes[dtype]), 64)
        signature = dict.fromkeys(["query", "key"], "*" + dtype)
        signature |= dict.fromkeys(["positions", "query_positions"], "*i32") | {"counts": "*i64"}
        signature |= dict.fromkeys(["bias", "partial", "weights", "shares", "scores", "values", "top"], "*fp32")
        signature |= dict.fromkeys(["valid", "marks"], "*u8")
        signature |= dict.fromkeys(["scaling", "softcap", "power", "noise"], "fp32")
        fixed = dict(NUM_KV_HEADS=8, GROUP_SIZE=4, WINDOW=16, HEAD_DIM=head_dim, BLOCK_DIM=tile.dim, ROOT=0, BLOCK=2048)
        fixed |= dict(BLOCK_QUERIES=tile.queries, BLOCK_ROWS=tile.rows, BLOCK_SPLITS=64)
        fixed |= dict(DOT_DTYPE=getattr(module.tl, str(dtypes[dtype]).removeprefix("torch.")))
        if not options:
            fixed |= dict.fromkeys(["bias", "softcap", "sliding_window", "valid", "positions", "query_positions"])
            fixed["ROOT"] = 2
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        types = {name: "constexpr" if name in fixed else signature.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, types, fixed),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps},
        )
        assert compiled.metadata.shared < 99 * 1024  # what a consumer card has
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "compiled\n", done.stderr


# On a real device.


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1000, 32768])
def test_the_kernels_judge_a_long_prompt_on_cuda(tokens, dtype):
    window = WindowAttention(window=16, kernel=11, pooling="mean", power=2, ramp=True)
    prompt = make_prompt(1, 8, 4, tokens, 128, dtype, window=16, padded=False)
    expected = window.attention(prompt)
    on_device = replace(
        prompt,
        queries=prompt.queries.cuda(),
        rows=prompt.rows.map(lambda each: each.cuda()),
        valid=prompt.valid.cuda(),
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = window.attention(on_device)
    assert torch.cuda.max_memory_allocated() - before < 16 * tokens * 8 + 2**20
    torch.testing.assert_close(found.cpu(), expected, rtol=5e-3, atol=1e-6)


@pytest.mark.gpu
@on_cuda
def test_marking_on_cuda():
    values = torch.randint(-50, 50, (8, 100_000), generator=torch.Generator().manual_seed(0)) / 50
    counts = torch.arange(8) * 700
    plain = largest(values, counts, most=5000)
    assert marking.serves(values.cuda())
    assert torch.equal(largest(values.cuda(), counts.cuda(), most=5000).cpu(), plain)
