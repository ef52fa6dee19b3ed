"""Both backends of the column sums against one dense softmax in float64, over shapes, padding, options and types."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import has_triton, interpreted, on_cuda

from headprof.compression.kernels import column_sums as entrance
from headprof.compression.kernels import looking
from headprof.compression.kernels import torch_column_sums as plain
from headprof.compression.kernels.column_sums import column_sums
from headprof.errors import UsageError

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sliding": {"sliding_window": 9},
    "weights": {"weights": True},
    "all": {"softcap": 2.0, "sliding_window": 40, "weights": True},
}
PADDING = ("none", "left", "right", "gaps", "everything")
TYPES = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS = ("torch", pytest.param("triton", marks=interpreted))


def make_valid(batch, num_tokens, padding) -> torch.Tensor:
    """Bool `[B, T]`; the first sequence is padded in this way, the second less, the third not at all."""
    valid = torch.ones(batch, num_tokens, dtype=torch.bool)
    for b, share in enumerate((0.6, 0.2)[:batch]):
        padded = math.ceil(share * num_tokens)
        if padding == "left":
            valid[b, :padded] = False
        elif padding == "right":
            valid[b, num_tokens - padded :] = False
        elif padding == "gaps":
            valid[b, b :: 3 + b] = False
    if padding == "everything":
        valid[0] = False
    return valid


def make_arguments(
    *,
    batch=1,
    num_kv_heads=2,
    group_size=2,
    num_queries=20,
    num_tokens=20,
    head_dim=16,
    padding="none",
    option="plain",
    dtype=torch.float32,
    seed=0,
) -> dict:
    """Random arguments of a call; the queries sit at irregular positions."""
    generator = torch.Generator().manual_seed(seed)
    arguments = dict(OPTIONS[option])
    if arguments.get("weights"):
        arguments["weights"] = torch.rand(num_queries, generator=generator) * 5
    return {
        "query": torch.randn(batch, num_kv_heads * group_size, num_queries, head_dim, generator=generator).to(dtype),
        "key": torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator).to(dtype),
        "positions": torch.randperm(num_tokens, generator=generator)[:num_queries].sort().values,
        "valid": make_valid(batch, num_tokens, padding),
        "scaling": 2.5 * head_dim**-0.5,
        **arguments,
    }


def slow_column_sums(
    query, key, positions, valid, *, scaling, softcap=None, sliding_window=None, weights=None
) -> torch.Tensor:
    """One query at a time, in float64."""
    group_size = query.shape[1] // key.shape[1]
    sums = key.new_zeros(key.shape[:3], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i, position in enumerate(positions.tolist()):
                seen = valid[b].clone()
                seen[position + 1 :] = False
                if sliding_window is not None:
                    seen[: max(0, position - sliding_window + 1)] = False
                logits = key[b, h // group_size, seen].double() @ query[b, h, i].double() * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weight = 1.0 if weights is None else weights[i].double()
                sums[b, h // group_size, seen] += weight * logits.softmax(dim=0) / group_size
    return sums


def assert_like_slow(arguments, *, tolerance=1e-5, **how) -> None:
    sums = column_sums(**arguments, **how)
    assert sums.dtype == torch.float32
    expected = slow_column_sums(**arguments)
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=tolerance / 100)


# The slow twin itself.


def test_slow_twin_by_hand():
    """Keys whose logits are log 1, log 2 and log 5; the second query weighs 3, and a group has two heads."""
    key = torch.tensor([1.0, 2.0, 5.0]).log().view(1, 1, 3, 1)
    query = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 2, 2, 1)
    arguments = {"query": query, "key": key, "positions": torch.tensor([1, 2]), "scaling": 1.0}
    arguments["weights"] = torch.tensor([1.0, 3.0])
    everything = torch.ones(1, 3, dtype=torch.bool)
    sharp = torch.tensor([1 / 3 + 3 / 8, 2 / 3 + 6 / 8, 15 / 8])
    even = torch.tensor([1 / 2 + 1, 1 / 2 + 1, 1])
    expected = ((sharp + even) / 2).double().view(1, 1, 3)
    torch.testing.assert_close(slow_column_sums(valid=everything, **arguments), expected)
    in_window = torch.tensor([0.0, (1 + 1 + 3 * 2 / 7 + 3 / 2) / 2, (3 * 5 / 7 + 3 / 2) / 2]).double().view(1, 1, 3)
    padded = torch.tensor([[False, True, True]])
    torch.testing.assert_close(slow_column_sums(valid=padded, **arguments), in_window)
    assert slow_column_sums(valid=~everything, **arguments).abs().max() == 0


# Both backends.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("num_queries", "num_tokens"), [(70, 70), (23, 150)])
def test_options_and_padding(num_queries, num_tokens, option, padding, backend):
    arguments = make_arguments(
        batch=3, num_queries=num_queries, num_tokens=num_tokens, option=option, padding=padding, seed=num_queries
    )
    assert_like_slow(arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dimensions_and_types(head_dim, dtype, backend):
    """Products are exact to float32, whatever the type of the arguments: so a CPU calculates for either backend."""
    arguments = make_arguments(
        num_queries=40, num_tokens=90, head_dim=head_dim, dtype=dtype, option="all", padding="left"
    )
    assert_like_slow(arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 1), (3, 1), (1, 3), (2, 7), (1, 8)])
@pytest.mark.parametrize(("num_queries", "num_tokens"), [(1, 1), (1, 77), (5, 64), (130, 300), (129, 129)])
def test_groups_and_sizes(num_queries, num_tokens, num_kv_heads, group_size, backend):
    arguments = make_arguments(
        num_kv_heads=num_kv_heads, group_size=group_size, num_queries=num_queries, num_tokens=num_tokens, head_dim=64
    )
    assert_like_slow(arguments, backend=backend)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    num_tokens=st.integers(1, 60),
    share=st.floats(0, 1),
    padding=st.sampled_from(PADDING),
    option=st.sampled_from(list(OPTIONS)),
    block=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_torch_in_blocks_of_any_size(num_tokens, share, block, **rest):
    num_queries = max(1, round(share * num_tokens))
    arguments = make_arguments(num_queries=num_queries, num_tokens=num_tokens, head_dim=8, **rest)
    assert_like_slow(arguments, backend="torch", block=block)


@pytest.mark.long
@interpreted
@settings(max_examples=25, deadline=None)
@given(
    group_size=st.integers(1, 3),
    num_tokens=st.integers(1, 300),
    share=st.floats(0, 1),
    padding=st.sampled_from(PADDING),
    option=st.sampled_from(list(OPTIONS)),
    seed=st.integers(0, 2**31),
)
def test_triton_on_prompts_of_any_size(num_tokens, share, **rest):
    num_queries = max(1, round(share * num_tokens))
    arguments = make_arguments(batch=2, num_kv_heads=1, num_queries=num_queries, num_tokens=num_tokens, **rest)
    assert_like_slow(arguments, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_share_out_the_weights(backend):
    """Every query that sees something gives away its whole weight, and nothing goes to padding."""
    arguments = make_arguments(batch=2, num_queries=100, num_tokens=200, option="weights", padding="left")
    sums = column_sums(**arguments, backend=backend)
    for b, valid in enumerate(arguments["valid"]):
        seeing = arguments["positions"] >= valid.int().argmax()
        given_away = arguments["weights"][seeing].sum()
        torch.testing.assert_close(sums[b].sum(dim=-1), given_away.expand(2), rtol=1e-5, atol=0)
        assert (sums[b, :, ~valid] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_large_logits_neither_overflow_nor_vanish(offset, backend):
    """All logits of a query but for 0 to 3 are the same large number, which a softmax does not see."""
    arguments = make_arguments(num_tokens=64, num_queries=64, head_dim=16, padding="left")
    arguments["query"] = torch.zeros_like(arguments["query"])
    arguments["query"][..., 0], arguments["query"][..., 1] = 1.0, offset
    arguments["key"] = torch.zeros_like(arguments["key"])
    arguments["key"][..., 0], arguments["key"][..., 1] = torch.arange(64) % 4, 1.0
    assert_like_slow(arguments, backend=backend, tolerance=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["left", "right", "gaps"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_lies_under_padding_does_not_matter(junk, padding, backend):
    arguments = make_arguments(num_tokens=150, num_queries=100, head_dim=64, padding=padding)
    expected = column_sums(**arguments, backend=backend)
    arguments["key"][:, :, ~arguments["valid"][0]] = junk
    arguments["query"][:, :, arguments["positions"] < arguments["valid"][0].int().argmax()] = junk
    torch.testing.assert_close(column_sums(**arguments, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries(backend):
    arguments = make_arguments(num_queries=0)
    assert column_sums(**arguments, backend=backend).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_laid_out_as_a_model_does(backend):
    arguments = make_arguments(num_queries=40, num_tokens=90, head_dim=64, padding="left")
    for name in ("query", "key"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        assert not arguments[name].is_contiguous()
    assert not column_sums(**arguments, backend=backend).requires_grad
    arguments = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    assert_like_slow(arguments, backend=backend)
    with torch.inference_mode():
        assert_like_slow({**arguments, "query": arguments["query"] + 1}, backend=backend)


@pytest.mark.parametrize("by_onednn", [False, True])
def test_torch_with_either_library(by_onednn, monkeypatch):
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    monkeypatch.setattr(plain, "_PRODUCT_BY_ONEDNN", by_onednn)
    assert_like_slow(make_arguments(num_queries=150, num_tokens=300, option="weights"), backend="torch")


def test_torch_holds_a_few_rows_of_logits_at_once(monkeypatch):
    """Whatever the number of queries."""
    held = []
    products = plain._products

    def watched(query, keys):
        held.append(len(query) * len(keys))
        return products(query, keys)

    monkeypatch.setattr(plain, "_products", watched)
    arguments = make_arguments(num_queries=3000, num_tokens=3000, head_dim=8)
    column_sums(**arguments, backend="torch")
    assert max(held) <= 256 * 3000
    assert sum(held) < 1.1 * 4 * 3000 * 3000 / 2  # of 4 heads' squares little more than the half below the diagonal


# The choice of a backend.


def test_auto_on_a_cpu_is_torch(monkeypatch):
    arguments = make_arguments()
    monkeypatch.setattr(entrance, "triton_column_sums", None)
    torch.testing.assert_close(column_sums(**arguments), column_sums(**arguments, backend="torch"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"head_dim": 256}, True),
        ({"head_dim": 264}, False),
        ({"dtype": torch.float64}, False),
    ],
)
@interpreted
def test_what_triton_serves(changes, served):
    arguments = make_arguments(num_queries=3, num_tokens=3, **changes)
    if served:
        assert_like_slow(arguments, backend="triton")
    else:
        with pytest.raises(UsageError, match="'triton' for column sums needs float32, float16 or bfloat16"):
            column_sums(**arguments, backend="triton")
    assert_like_slow(arguments)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("padding", PADDING)
def test_where_nobody_may_look_for_padding(option, padding, monkeypatch):
    monkeypatch.setattr(looking, "is_free", lambda device: False)
    arguments = make_arguments(batch=3, num_queries=21, num_tokens=40, option=option, padding=padding)
    torch.testing.assert_close(column_sums(**arguments, backend="torch"), slow_column_sums(**arguments).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_padding_need_not_be_said(backend):
    arguments = make_arguments(batch=2, num_queries=21, num_tokens=40, option="weights")
    sums = column_sums(**arguments, backend=backend)
    plans = {}
    for _ in range(2):  # made, and found again
        known = arguments | {"valid": None, "on_host": arguments["positions"].tolist(), "plans": plans}
        torch.testing.assert_close(column_sums(**known, backend=backend), sums)


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="GPU"):
        column_sums(**make_arguments(), backend="triton")


def test_unknown_backend():
    with pytest.raises(UsageError, match="no backend 'cuda' for column sums: use auto, torch or triton"):
        column_sums(**make_arguments(), backend="cuda")


@pytest.mark.parametrize(
    "changes",
    [
        {"query": torch.zeros(1, 3, 20, 16)},
        {"query": torch.zeros(1, 4, 20, 8)},
        {"query": torch.zeros(2, 4, 20, 16)},
        {"positions": torch.arange(19)},
        {"valid": torch.ones(1, 19, dtype=torch.bool)},
        {"weights": torch.ones(1, 20)},
    ],
)
def test_shapes_that_do_not_fit(changes):
    with pytest.raises(ValueError, match="do not fit together"):
        column_sums(**{**make_arguments(), **changes})


def test_importing_the_module_does_not_import_triton():
    code = "import sys, headprof.compression.kernels.column_sums; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not has_triton, reason="needs Triton")
def test_kernels_compile_for_gpus():
    """What the interpreter lets through, the compiler may not; it needs no GPU to compile for one."""
    code = """
import torch
from headprof.compression.kernels import triton_column_sums as module
kernels = module._kernels()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
cases = [(80, "fp32", 80, True), (90, "bf16", 128, False), (80, "fp16", 256, True)]
kinds = [(kernels[0], False), (kernels[1], False), (kernels[1], True)]
for kernel, largest in kinds:
    for capability, dtype, head_dim, options in cases:
        tile = module._Tile.of(torch.empty(1, head_dim, dtype=dtypes[dtype]))
        blocks = [tile.held, tile.passing] if kernel is kernels[0] else [tile.passing, tile.held]
        signature = dict.fromkeys(["query", "key"], "*" + dtype)
        signature |= dict.fromkeys(["positions", "spans", "bounds"], "*i32")
        signature |= dict.fromkeys(["log_sums", "weights", "sums"], "*fp32") | {"valid": "*u8"}
        signature |= dict.fromkeys(["scaling", "softcap"], "fp32")
        fixed = dict(NUM_HEADS=32, GROUP_SIZE=4, HEAD_DIM=head_dim, BLOCK_DIM=tile.dim)
        fixed |= dict(BLOCK_QUERIES=blocks[0], BLOCK_KEYS=blocks[1], LARGEST=largest)
        fixed |= dict(DOT_DTYPE=getattr(module.tl, str(dtypes[dtype]).removeprefix("torch.")))
        if not options:
            fixed |= dict.fromkeys(["softcap", "sliding_window", "weights", "valid", "spans"])
        fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
        types = {name: "constexpr" if name in fixed else signature.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, types, fixed),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": 3},
        )
        assert compiled.metadata.shared < 99 * 1024  # what a consumer card has
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "compiled\n", done.stderr


# On a real device, where plain torch in float64 is the twin: the slow one would take hours.


def on_device(arguments) -> dict:
    return {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}


def dense_column_sums(
    query, key, positions, valid, *, scaling, softcap=None, sliding_window=None, weights=None
) -> torch.Tensor:
    """One query head at a time, as one dense softmax in float64."""
    group_size, tokens = query.shape[1] // key.shape[1], torch.arange(key.shape[2], device=key.device)
    visible = tokens <= positions[:, None]
    if sliding_window is not None:
        visible &= tokens > positions[:, None] - sliding_window
    sums = key.new_zeros(key.shape[:3], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            logits = query[b, h].double() @ key[b, h // group_size].double().T * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            attention = logits.masked_fill_(~(visible & valid[b]), float("-inf")).softmax(dim=-1).nan_to_num_(nan=0.0)
            factors = torch.ones_like(attention[:, 0]) if weights is None else weights.double()
            sums[b, h // group_size] += factors @ attention / group_size
    return sums


def test_dense_twin_is_the_slow_one():
    for option in OPTIONS:
        for padding in PADDING:
            arguments = make_arguments(batch=3, num_queries=21, num_tokens=40, option=option, padding=padding)
            torch.testing.assert_close(dense_column_sums(**arguments), slow_column_sums(**arguments))


def cuda_cases():
    for option in OPTIONS:
        for padding in PADDING:
            yield 64, 1000, option, padding, torch.bfloat16
    for head_dim, num_queries in ((64, 2000), (80, 333), (128, 2000), (256, 500)):
        for dtype in TYPES:
            yield head_dim, num_queries, "plain", "none", dtype
            yield head_dim, num_queries, "all", "left", dtype


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("head_dim", "num_queries", "option", "padding", "dtype"), cuda_cases())
def test_backends_on_cuda(head_dim, num_queries, option, padding, dtype):
    arguments = on_device(
        make_arguments(
            batch=2,
            group_size=4,
            num_queries=num_queries,
            num_tokens=2000,
            head_dim=head_dim,
            option=option,
            padding=padding,
            dtype=dtype,
        )
    )
    expected = dense_column_sums(**arguments)
    for backend in ("torch", "triton", "auto"):
        sums = column_sums(**arguments, backend=backend)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-3, atol=1e-5, msg=lambda m, b=backend: f"{b}: {m}")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("num_queries", [1024, 16384])
def test_triton_on_a_long_prompt(num_queries):
    """A layer of Llama-3-8B over 16,384 tokens, whose attention would fill 17 GB in bfloat16."""
    arguments = on_device(
        make_arguments(
            num_kv_heads=8,
            group_size=4,
            num_queries=num_queries,
            num_tokens=16384,
            head_dim=128,
            option="weights",
            dtype=torch.bfloat16,
        )
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums = column_sums(**arguments, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    torch.testing.assert_close(sums.double(), dense_column_sums(**arguments), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@on_cuda
def test_triton_never_waits_for_the_device():
    arguments = on_device(make_arguments(batch=2, num_queries=300, num_tokens=500, head_dim=64, padding="left"))
    column_sums(**arguments, backend="auto")  # compiles, and fills what is cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = column_sums(**arguments, backend="auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.shape == (2, 2, 500)
