"""Every attention backend against the float64 reference, over shapes, layouts, options and types."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.devices import has_triton, interpreted, on_cuda
from torch.nn.functional import scaled_dot_product_attention

from headprof.compression.kernels import (
    backends,
    flash,
    requirements,
    torch_attention,
    triton_attention,
    triton_support,
)
from headprof.compression.kernels.backends import (
    BACKENDS,
    PREFERENCE,
    Backend,
    available_backends,
    check_backend,
    ragged_attention,
)
from headprof.compression.kernels.ragged_rows import RaggedRows, Request
from headprof.compression.kernels.triton_attention import Tile
from headprof.compression.kernels.work_items import WorkItems
from headprof.errors import UsageError

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sliding": {"sliding_window": 9},
    "sinks": {"sinks": True},
    "mass": {"bias": "mass"},
    "hidden": {"bias": "hidden"},
    "all": {"softcap": 3.0, "sliding_window": 9, "sinks": True, "bias": "hidden"},
}


def make_rows(lengths, head_dim, dtype, generator, *, space=None, bias=None) -> RaggedRows:
    """Random heads of these lengths; their free space is `space` rows, or as many as it likes, and holds NaN."""
    keys, values, positions, biases, bounds = [], [], [], [], []
    total = 0
    for head, length in enumerate(lengths):
        free = (head * 5) % 4 if space is None else space
        for flat in (keys, values):
            flat += [torch.randn(length, head_dim, generator=generator), torch.full((free, head_dim), NAN)]
        ascending = torch.randperm(2 * length, generator=generator)[:length].sort().values
        positions += [ascending, torch.full((free,), -7)]
        mass = torch.rand(length, generator=generator) * 3
        if bias == "hidden":
            mass[torch.rand(length, generator=generator) < (1.0 if head == 0 else 0.4)] = -math.inf
        biases += [mass, torch.full((free,), NAN)]
        bounds += [total, total + length]
        total += length + free
    alike = space is not None and len(set(lengths)) == 1
    return RaggedRows(
        torch.cat(keys).to(dtype),
        torch.cat(values).to(dtype),
        torch.cat(positions).int(),
        torch.tensor([*bounds, total], dtype=torch.int32),
        max(lengths),
        lengths[0] + space if alike else 0,
        None if bias is None else torch.cat(biases),
        in_use=max(lengths),
    )


def make_request(
    lengths, *, num_kv_heads, group_size, num_queries, head_dim=16, dtype=torch.float32, seed=0, space=None, option=None
) -> Request:
    """A random request; `lengths` are the heads' rows, `num_kv_heads` for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    chosen = dict(OPTIONS[option or "plain"])
    rows = make_rows(lengths, head_dim, dtype, generator, space=space, bias=chosen.pop("bias", None))
    num_heads = num_kv_heads * group_size
    query = torch.randn(len(lengths) // num_kv_heads, num_heads, num_queries, head_dim, generator=generator)
    if chosen.get("sinks"):
        chosen["sinks"] = torch.randn(num_heads, generator=generator)
    return Request(query.to(dtype), rows, num_kv_heads, 1.7 * head_dim**-0.5, **chosen)


def attend(request: Request, backend: str) -> torch.Tensor:
    return ragged_attention(
        request.query,
        request.rows,
        request.num_kv_heads,
        scaling=request.scaling,
        softcap=request.softcap,
        sliding_window=request.sliding_window,
        sinks=request.sinks,
        backend=backend,
    )


def attend_in_parts(request: Request, item_rows: int = 128) -> torch.Tensor:
    """By Triton, a program for every so many rows."""
    return triton_attention.triton_attention(request, items=WorkItems.of(request.rows, item_rows))


def assert_like_reference(output: torch.Tensor, request: Request) -> None:
    expected = attend(request, "reference")
    assert output.dtype == request.query.dtype
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.cpu(), expected.cpu(), atol=tolerance, rtol=tolerance)


# The reference itself.


@pytest.mark.parametrize("num_queries", [1, 4, 9])
@pytest.mark.parametrize("group_size", [1, 3])
def test_reference_on_alike_heads_is_causal_attention(group_size, num_queries):
    request = make_request([9] * 4, num_kv_heads=2, group_size=group_size, num_queries=num_queries, space=0)
    keys, values = (
        flat.view(2, 2, 9, 16).repeat_interleave(group_size, dim=1) for flat in (request.rows.keys, request.rows.values)
    )
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[9 - num_queries :]
    expected = scaled_dot_product_attention(request.query, keys, values, attn_mask=causal, scale=request.scaling)
    torch.testing.assert_close(attend(request, "reference"), expected.transpose(1, 2))


def test_reference_weighs_by_the_mass_of_a_row():
    generator = torch.Generator().manual_seed(3)
    rows = make_rows([4], 8, torch.float32, generator, space=0)
    query = torch.randn(1, 2, 1, 8, generator=generator)
    order = torch.tensor([0, 1, 1, 1, 2, 3])
    repeated = RaggedRows(rows.keys[order], rows.values[order], order.int(), torch.tensor([0, 6, 6]), 6, 6)
    mass = torch.tensor([1.0, 3.0, 1.0, 1.0]).log()
    merged = RaggedRows(rows.keys, rows.values, rows.positions, rows.bounds, 4, 4, mass)
    outputs = [ragged_attention(query, each, 1, scaling=0.5, backend="reference") for each in (merged, repeated)]
    torch.testing.assert_close(*outputs)


def test_reference_by_hand():
    """Logits 2 log 2 = log 4, 0 and 0, a sink of log 3, and a window that hides the first row or keeps it."""
    rows = RaggedRows(
        torch.tensor([[2.0], [0.0], [0.0]]),
        torch.tensor([[1.0], [10.0], [100.0]]),
        torch.tensor([0, 5, 6], dtype=torch.int32),
        torch.tensor([0, 3, 3], dtype=torch.int32),
        longest=3,
        uniform=3,
    )
    query = torch.ones(1, 1, 1, 1)
    options = {"scaling": math.log(2), "sinks": torch.tensor([math.log(3.0)]), "backend": "reference"}
    assert ragged_attention(query, rows, 1, **options).item() == pytest.approx((4 + 10 + 100) / 9)
    assert ragged_attention(query, rows, 1, sliding_window=7, **options).item() == pytest.approx((4 + 10 + 100) / 9)
    assert ragged_attention(query, rows, 1, sliding_window=6, **options).item() == pytest.approx((10 + 100) / 5)
    capped = math.exp(0.5 * math.tanh(math.log(4) / 0.5))
    expected = (capped + 10 + 100) / (capped + 2 + 3)
    assert ragged_attention(query, rows, 1, softcap=0.5, **options).item() == pytest.approx(expected)


# Plain torch.

LAYOUTS = {
    "dense": ([13] * 6, 2),
    "each": ([5, 40, 11, 7], None),
    "padded": ([5, 23, 11, 7, 30, 6], None),
}


def watched_route(monkeypatch) -> list[str]:
    """A list to which plain torch's way of serving a request is added."""
    taken: list[str] = []
    for layout in LAYOUTS:
        serve = getattr(torch_attention, f"_attend_{layout}")

        def watched(request, layout=layout, serve=serve):
            taken.append(layout)
            return serve(request)

        monkeypatch.setattr(torch_attention, f"_attend_{layout}", watched)
    return taken


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("num_queries", [1, 3, 5])
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout, num_kv_heads, group_size, num_queries, option, dtype, monkeypatch):
    taken = watched_route(monkeypatch)
    if layout == "each":
        monkeypatch.setattr(torch_attention, "_PADDED_ELEMENTS", 0)
    lengths, space = LAYOUTS[layout]
    request = make_request(
        lengths,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        num_queries=num_queries,
        dtype=dtype,
        seed=num_queries + group_size,
        space=space,
        option=option,
    )
    assert_like_reference(attend(request, "torch"), request)
    assert taken == [layout]


@pytest.mark.parametrize(
    ("lengths", "num_queries", "option", "layout"),
    [
        ([13] * 6, 1, "all", "dense"),
        ([30, 40, 50], 1, "plain", "each"),
        ([30, 40, 50], 1, "mass", "each"),
        ([30, 40, 50], 1, "softcap", "padded"),  # with more operations a head, one call for all pays sooner
        ([30, 40, 5000], 1, "softcap", "each"),
        ([30, 40, 50] * 2, 1, "plain", "padded"),
        ([30, 40, 900] * 2, 1, "plain", "each"),
        ([30, 40, 50] * 2, 20, "plain", "each"),
    ],
)
def test_torch_takes_the_way_that_pays(lengths, num_queries, option, layout, monkeypatch):
    taken = watched_route(monkeypatch)
    space = 2 if layout == "dense" else None
    request = make_request(lengths, num_kv_heads=3, group_size=2, num_queries=num_queries, space=space, option=option)
    assert_like_reference(attend(request, "torch"), request)
    assert taken == [layout]


@pytest.mark.parametrize("option", ["plain", "sliding", "all"])
@pytest.mark.parametrize("lengths", [[40, 2000, 300], [40, 21, 33, 25, 900, 60]])
def test_torch_on_long_heads_and_many_new_tokens(lengths, option):
    request = make_request(lengths, num_kv_heads=3, group_size=2, num_queries=20, option=option)
    assert_like_reference(attend(request, "torch"), request)


def test_a_query_laid_out_as_a_model_does():
    request = make_request([9, 14], num_kv_heads=2, group_size=2, num_queries=3)
    request.query = request.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not request.query.is_contiguous()
    assert_like_reference(attend(request, "torch"), request)


# Our kernel, in Triton's interpreter.


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_triton_over_head_dimensions_and_types(head_dim, dtype):
    request = make_request(
        [3, 70, 150], num_kv_heads=3, group_size=2, num_queries=3, head_dim=head_dim, dtype=dtype, option="all"
    )
    assert_like_reference(attend(request, "triton"), request)
    assert_like_reference(attend_in_parts(request), request)


@interpreted
@pytest.mark.parametrize("item_rows", [128, 256, 640])
@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_triton_over_options_and_items(option, num_queries, item_rows):
    request = make_request(
        [4, 600, 12, 129, 257, 5],
        num_kv_heads=2,
        group_size=3,
        num_queries=num_queries,
        head_dim=64,
        seed=5,
        option=option,
    )
    assert_like_reference(attend_in_parts(request, item_rows), request)


@interpreted
@pytest.mark.parametrize("rows", [16, 32, 128])
@pytest.mark.parametrize("queries", [16, 64])
def test_triton_over_tiles(rows, queries):
    request = make_request([5, 600, 12, 129], num_kv_heads=2, group_size=3, num_queries=5, head_dim=64, option="all")
    items, tile = WorkItems.of(request.rows, 128), Tile(queries, rows, 64, warps=4, stages=2)
    output = triton_attention.triton_attention(request, items=items, tile=tile)
    assert_like_reference(output, request)
    assert not items.counts.any()


@interpreted
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(4, 1), (2, 5), (1, 8)])
@pytest.mark.parametrize("num_queries", [1, 5, 11])
def test_triton_over_groups_and_new_tokens(num_kv_heads, group_size, num_queries):
    """Up to 8 * 11 queries a head: two blocks of them, the second partly empty."""
    request = make_request(
        [11, 140, 64, 33], num_kv_heads=num_kv_heads, group_size=group_size, num_queries=num_queries, option="sliding"
    )
    assert_like_reference(attend(request, "triton"), request)
    assert_like_reference(attend_in_parts(request), request)


@interpreted
@pytest.mark.parametrize("option", ["plain", "all"])
def test_triton_on_one_long_head_among_short_ones(option):
    request = make_request(
        [1, 4000, 65], num_kv_heads=3, group_size=3, num_queries=1, head_dim=64, dtype=torch.bfloat16, option=option
    )
    assert_like_reference(attend(request, "triton"), request)


@interpreted
def test_triton_gives_zeros_for_a_head_without_rows():
    request = make_request([7, 7], num_kv_heads=2, group_size=2, num_queries=1, space=0)
    request.rows.bounds.copy_(torch.tensor([0, 7, 7, 7, 14]))
    output = attend_in_parts(request)
    assert output[0, 0, :2].abs().min() > 0 and not output[0, 0, 2:].any()


@interpreted
def test_the_storages_plan_is_made_once_and_leaves_nothing_behind():
    request = make_request([1, 700, 65], num_kv_heads=3, group_size=2, num_queries=1)
    first = attend(request, "triton")
    items = request.rows.plans["triton"]
    assert torch.equal(attend(request, "triton"), first)
    assert request.rows.plans == {"triton": items} and not items.counts.any()


@pytest.mark.skipif(not has_triton, reason="needs Triton")
def test_kernels_compile_for_gpus():
    """What the interpreter lets through, the compiler may not; it needs no GPU to compile for one."""
    code = """
from headprof.compression.kernels import triton_append, triton_attention as module
kernels = [module._kernel(), triton_append._kernel()]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
floats = ("bias", "received", "partial", "log_sums")
data = ("query", "keys", "values", "output", "sinks", "key_states", "value_states")
packed = ("before", "groups_before", "key_codes", "key_scales", "value_codes", "value_scales")
for kernel in kernels:
    for capability, dtype, options, bits in [
        (80, "fp32", True, 0), (90, "bf16", True, 4), (90, "bf16", False, 0), (80, "bf16", False, 8)
    ]:
        whole = ("bounds", "positions", "next_positions", "items", "counts", "before", "groups_before", "behind")
        pointers = dict.fromkeys(whole, "*i32") | dict.fromkeys(packed[2::2], "*u8")
        pointers |= dict.fromkeys(packed[3::2], "*fp16")
        pointers |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(data, "*" + dtype)
        signature = pointers | dict(scaling="fp32", softcap="fp32")
        fixed = dict(NUM_KV_HEADS=2, GROUP_SIZE=4, HEAD_DIM=80, BLOCK_DIM=128, BLOCK_QUERIES=16, BLOCK_TOKENS=4)
        fixed |= dict(BLOCK_ROWS={"fp32": 32, "bf16": 64}[dtype], FIRST=1, GROUP_ROWS=32, BITS=bits)
        fixed |= dict(DOT_DTYPE={"fp32": module.tl.float32, "bf16": module.tl.bfloat16}[dtype])
        if not options:
            fixed |= dict.fromkeys(["bias", "received", "sinks", "softcap", "sliding_window"])
        if not bits:
            fixed |= dict.fromkeys([*packed, "behind"])
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        types = {name: "constexpr" if name in fixed else signature.get(name, "i32") for name in kernel.arg_names}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(ASTSource(kernel, types, fixed), target=target, options={"num_stages": 3})
        assert compiled.metadata.shared < 99 * 1024  # what a consumer card has
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "compiled\n", done.stderr


# FlashAttention's arguments, given to a plain twin of its functions for sequences of several lengths.


def slow_varlen(query, keys, values, cu_q, cu_k, max_q, max_k, scale, causal, softcap=0.0):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert cu_q[0] == 0 and cu_q[-1] == len(query) and (cu_q.diff() >= 0).all() and (cu_k.diff() >= 0).all()
    # With one query a sequence and grouped heads, the kernels rearrange queries as if every sequence had one.
    assert max_q > 1 or query.shape[1] == keys.shape[1]
    output = torch.full_like(query, NAN)
    group_size = query.shape[1] // keys.shape[1]
    for q, q_end, k, k_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if q == q_end:
            continue
        assert q_end - q <= max_q and k_end - k <= max_k
        for head in range(query.shape[1]):
            logits = query[q:q_end, head].float() @ keys[k:k_end, head // group_size].float().T * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if causal:  # aligned at the bottom right
                shape = logits.shape
                logits[~torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])] = -math.inf
            output[q:q_end, head] = (logits.softmax(-1) @ values[k:k_end, head // group_size].float()).to(query.dtype)
    return output


def fake_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, softcap=0.0
):
    return slow_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap)


def fake_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert query.shape[1] == key.shape[1] and window_size in [(-1, -1), (-1, 0)]
    return slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))


def fake_old_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None):
    assert query.shape[1] == key.shape[1]
    return slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, is_causal)


def varlen_requests():
    for num_queries in (1, 3):
        for num_kv_heads, group_size in ((4, 1), (2, 3), (1, 8)):
            for space in (None, 0):
                yield pytest.param(
                    {"num_kv_heads": num_kv_heads, "group_size": group_size, "num_queries": num_queries, "space": space}
                )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("options", varlen_requests())
def test_arguments_for_flash_attn(options, softcap, monkeypatch):
    fake = SimpleNamespace(flash_attn_varlen_func=fake_flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    request = make_request([5, 40, 11, 7], option="softcap" if softcap else "plain", **options)
    assert_like_reference(flash.flash_attention(request), request)


@pytest.mark.parametrize("fake", [fake_varlen_attn, fake_old_varlen_attn])
@pytest.mark.parametrize("options", varlen_requests())
def test_arguments_for_varlen(options, fake, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake)
    request = make_request([5, 40, 11, 7], **options)
    assert_like_reference(flash.varlen_attention(request), request)


def test_cached_query_counts_may_be_used_outside_inference_mode():
    flash._cumulative_queries.cache_clear()
    with torch.inference_mode():
        counts = flash._cumulative_queries(2, 3, torch.device("cpu"))
    assert counts.tolist() == [0, 3, 3, 6, 6] and not counts.is_inference()


# Which backend, and what each cannot do.


def some_request(**options) -> Request:
    return make_request([5, 8], num_kv_heads=2, group_size=2, num_queries=1, **options)


def serve_any_device(monkeypatch) -> None:
    for module in (flash, triton_support):
        monkeypatch.setattr(module, "device_unsupported", lambda device: None)


def test_auto_is_plain_torch_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    request = some_request()
    assert torch.equal(attend(request, "auto"), attend(request, "torch"))
    monkeypatch.setattr(backends, "torch_attention", lambda request: "torch")
    assert attend(request, "auto") == "torch"


@pytest.mark.parametrize("first", PREFERENCE)
def test_auto_takes_the_first_of_the_preferred_on_cuda(first, monkeypatch):
    def backend(name):
        refuses = PREFERENCE.index(name) < PREFERENCE.index(first)
        return Backend(lambda request: name, lambda request: "cannot" if refuses else None)

    monkeypatch.setattr(backends, "BACKENDS", {name: backend(name) for name in PREFERENCE})
    query = SimpleNamespace(is_cuda=True)
    assert ragged_attention(query, some_request().rows, 2, scaling=1.0) == first


def test_an_unknown_backend_is_refused_with_the_names():
    message = "no attention backend 'tritn': use auto, reference, torch, flash-attn, varlen, triton"
    with pytest.raises(UsageError, match=message):
        check_backend("tritn")
    with pytest.raises(UsageError, match=message):
        attend(some_request(), "tritn")


def test_known_backends_pass_the_check():
    for name in ("auto", "reference", "torch", "varlen"):
        check_backend(name)


@pytest.mark.parametrize(("name", "package"), [("triton", "triton"), ("flash-attn", "flash-attn")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setattr(requirements, "_importable", lambda module: False)
    with pytest.raises(UsageError, match=f"'{name}' needs a package that is missing: `pip install {package}`, or"):
        check_backend(name)
    serve_any_device(monkeypatch)
    assert BACKENDS[name].unsupported(some_request(dtype=torch.float16)) == f"needs `pip install {package}`"


def test_a_broken_package_counts_as_missing(tmp_path, monkeypatch):
    (tmp_path / "headprof_broken.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not requirements._importable("headprof_broken")
    assert requirements._importable("json")


@pytest.mark.parametrize("name", ["varlen", "triton"])
def test_a_forced_backend_says_why_it_cannot(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if name == "triton" and not has_triton:
        pytest.skip("needs Triton")
    with pytest.raises(UsageError, match=f"'{name}' needs a CUDA device: use --backend auto or torch"):
        attend(some_request(), name)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("varlen", {"dtype": torch.float32}, "needs float16 or bfloat16"),
        ("varlen", {"head_dim": 12}, "multiple of 8"),
        ("varlen", {"head_dim": 264}, "at most 256"),
        ("varlen", {"option": "mass"}, "cannot weigh merged rows or hide padding"),
        ("varlen", {"option": "sinks"}, "has no attention sinks"),
        ("varlen", {"option": "sliding"}, "has no sliding window"),
        ("varlen", {"option": "softcap"}, "has no softcap"),
        ("varlen", {}, None),
        ("flash-attn", {"option": "mass"}, "cannot weigh merged rows or hide padding"),
        ("flash-attn", {"option": "softcap"}, None),
        ("triton", {"dtype": torch.float64}, "needs float32, float16 or bfloat16"),
        ("triton", {"head_dim": 264}, "at most 256"),
        ("triton", {"option": "all"}, None),
        ("torch", {"option": "all", "head_dim": 300}, None),
        ("reference", {"option": "all", "head_dim": 300}, None),
    ],
)
def test_what_a_backend_cannot_do(name, options, reason, monkeypatch):
    serve_any_device(monkeypatch)
    monkeypatch.setattr(requirements, "_importable", lambda module: True)
    found = BACKENDS[name].unsupported(some_request(**{"dtype": torch.bfloat16, **options}))
    assert found is None if reason is None else reason in found


def test_old_gpus_are_refused(monkeypatch):
    requirements.device_unsupported.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in requirements.device_unsupported(torch.device("cuda", 3))
    requirements.device_unsupported.cache_clear()


def test_available_backends_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert available_backends("cpu", torch.bfloat16) == ("torch",)
    if has_triton:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert available_backends("cpu", torch.bfloat16) == ("torch", "triton")


def test_importing_the_module_does_not_import_triton():
    code = "import sys, headprof.compression.kernels.backends; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# On a real device.


def moved(request: Request) -> Request:
    rows = request.rows
    tensors = [None if t is None else t.cuda() for t in (rows.keys, rows.values, rows.positions, rows.bounds)]
    bias = None if rows.bias is None else rows.bias.cuda()
    sinks = None if request.sinks is None else request.sinks.cuda()
    return Request(
        request.query.cuda(),
        RaggedRows(*tensors, rows.longest, rows.uniform, bias, in_use=rows.in_use),
        request.num_kv_heads,
        request.scaling,
        request.softcap,
        request.sliding_window,
        sinks,
    )


def cuda_cases():
    for option in OPTIONS:
        for num_queries in (1, 5, 40):
            yield 64, option, num_queries
    for head_dim in (80, 96, 128, 256):
        for option in ("plain", "all"):
            yield head_dim, option, 1
            yield head_dim, option, 5


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("space", [None, 4])
@pytest.mark.parametrize(("head_dim", "option", "num_queries"), cuda_cases())
def test_backends_on_cuda(head_dim, option, num_queries, space, dtype):
    lengths = [1500] * 6 if space else [40, 3000, 300, 65, 64, 1025]
    request = make_request(
        lengths,
        num_kv_heads=3,
        group_size=4,
        num_queries=num_queries,
        head_dim=head_dim,
        dtype=dtype,
        space=space,
        option=option,
    )
    on_device = moved(request)
    served = [name for name in available_backends("cuda", dtype) if BACKENDS[name].unsupported(on_device) is None]
    assert "torch" in served
    expected = attend(request, "reference")
    tolerance = TOLERANCE[dtype]
    for name in (*served, "auto"):
        output = attend(on_device, name)
        torch.testing.assert_close(
            output.cpu(), expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("num_queries", [1, 5])
def test_cuda_backends_never_wait_for_the_device(num_queries):
    request = moved(
        make_request(
            [40, 3000, 300, 65],
            num_kv_heads=2,
            group_size=4,
            num_queries=num_queries,
            head_dim=64,
            dtype=torch.bfloat16,
        )
    )
    for name in available_backends("cuda", torch.bfloat16):
        attend(request, name)  # compiles, and fills what is cached
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = attend(request, name)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert output.shape == (2, num_queries, 8, 64)
