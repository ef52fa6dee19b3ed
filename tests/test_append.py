"""Appending rows: both ways against a slow twin, and what attention then sees; the operators for compiled code."""

from dataclasses import replace

import pytest
import torch
from support.devices import interpreted, on_cuda
from support.packed import packed_in
from test_attention import OPTIONS, assert_like_reference, attend, make_request
from torch._subclasses.fake_tensor import FakeTensorMode

from headprof.compression.kernels import append
from headprof.compression.kernels.append import append_rows, torch_append
from headprof.compression.kernels.backends import ragged_attention
from headprof.compression.kernels.packed_kinds import as_arguments
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.kernels.triton_append import triton_append

WAYS = [torch_append, pytest.param(triton_append, marks=interpreted)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def roomy_rows(lengths, head_dim, *, space=40, dtype=torch.float32, columns=("bias", "received"), seed=0) -> RaggedRows:
    """Random heads with so much free space each, in which there is whatever was there before."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + space * len(lengths)
    stops = (torch.tensor(lengths) + space).cumsum(0)
    starts = stops - torch.tensor(lengths) - space
    bounds = torch.cat([torch.stack([starts, starts + torch.tensor(lengths)], dim=1).flatten(), stops[-1:]])
    return RaggedRows(
        torch.randn(total, head_dim, generator=generator).to(dtype),
        torch.randn(total, head_dim, generator=generator).to(dtype),
        torch.arange(total, dtype=torch.int32),
        bounds.int(),
        max(lengths) + space,
        0,
        **{name: torch.rand(total, generator=generator) for name in columns},
        next_positions=torch.arange(len(lengths), dtype=torch.int32) + total,
        in_use=max(lengths),
    )


def copied(rows: RaggedRows) -> RaggedRows:
    tensors = {name: each.clone() for name, each in vars(rows).items() if isinstance(each, torch.Tensor)}
    return replace(rows, **tensors, plans={})


def tensors_of(rows: RaggedRows) -> dict[str, torch.Tensor]:
    return {name: each for name, each in vars(rows).items() if isinstance(each, torch.Tensor)}


def new_states(num_heads, num_kv_heads, count, head_dim, dtype=torch.float32, *, seed=1):
    """Keys as a model's rotary embedding leaves them, values as a projection does: not contiguous in this order."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_heads // num_kv_heads, count, num_kv_heads, head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    return keys.contiguous(), values


def slow_append(rows: RaggedRows, key_states, value_states) -> None:
    """One row after the other."""
    _, num_kv_heads, count, _ = key_states.shape
    for head in range(rows.num_heads):
        for token in range(count):
            row, sequence = int(rows.bounds[2 * head + 1]), divmod(head, num_kv_heads)
            rows.keys[row], rows.values[row] = key_states[*sequence, token], value_states[*sequence, token]
            rows.positions[row] = rows.next_positions[head]
            for column in (rows.bias, rows.received):
                if column is not None:
                    column[row] = 0.0
            rows.bounds[2 * head + 1] += 1
            rows.next_positions[head] += 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(), ("bias",), ("received",), ("bias", "received")])
@pytest.mark.parametrize(("count", "head_dim"), [(1, 16), (3, 20), (33, 80)])
def test_appending(count, head_dim, columns, dtype, way):
    rows = roomy_rows([1, 30, 7, 12], head_dim, dtype=dtype, columns=columns)
    expected = copied(rows)
    addresses = {name: each.data_ptr() for name, each in tensors_of(rows).items()}
    states = new_states(4, 2, count, head_dim, dtype)
    way(rows, *states)
    slow_append(expected, *states)
    for name, each in tensors_of(expected).items():
        assert torch.equal(getattr(rows, name), each), name
    assert addresses == {name: each.data_ptr() for name, each in tensors_of(rows).items()}


def test_plain_torch_appends_without_asking_the_device():
    """Fake tensors have no data: whoever asks for some fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for count in (1, 5):
            torch_append(roomy_fake_rows(4), torch.empty(2, 2, count, 16), torch.empty(2, 2, count, 16))


def roomy_fake_rows(num_heads) -> RaggedRows:
    def whole(*shape):
        return torch.empty(*shape, dtype=torch.int32)

    keys = torch.empty(100, 16)
    return RaggedRows(keys, keys, whole(100), whole(2 * num_heads + 1), 25, 0, next_positions=whole(num_heads))


def test_appending_takes_triton_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(append, "torch_append", lambda *_: taken.append("torch"))
    monkeypatch.setattr(append, "triton_append", lambda *_: taken.append("triton"))
    taken: list[str] = []
    append_rows(roomy_rows([3, 4], 16), *new_states(2, 2, 1, 16))
    assert taken == ["torch"]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_attention_sees_the_rows_that_came(option, backend):
    """What was planned at the first step holds while rows come; the free space holds NaN until then."""
    request = make_request(
        [4, 250, 12, 120], num_kv_heads=2, group_size=3, num_queries=1, head_dim=64, space=25, option=option
    )
    lengths = [4, 250, 12, 120]
    rows = replace(
        request.rows, longest=275, next_positions=torch.full((4,), 600, dtype=torch.int32), in_use=None, uniform=0
    )
    generator = torch.Generator().manual_seed(0)
    for step, count in enumerate([1, 1, 1, 4, 1, 9, 1]):
        append_rows(rows, *new_states(4, 2, count, 64, seed=step))
        lengths = [length + count for length in lengths]
        assert (rows.bounds[1::2] - rows.bounds[:-1:2]).tolist() == lengths
        query = torch.randn(2, 6, count, 64, generator=generator)
        now = replace(request, query=query, rows=rows)
        assert_like_reference(attend(now, backend), now)
    assert len(rows.plans) == (backend == "triton")


@interpreted
def test_heads_that_moved_are_seen_after_a_refresh():
    request = make_request([300, 20, 40, 140], num_kv_heads=4, group_size=2, num_queries=1, head_dim=64, space=0)
    attend(request, "triton")
    request.rows.bounds.copy_(torch.tensor([0, 17, 20, 300, 340, 360, 370, 500, 500]))
    for plan in request.rows.plans.values():
        plan.refresh()
    assert_like_reference(attend(request, "triton"), request)


# Compiled.


def step(tensors, query, key_states, value_states, sinks, option):
    """A layer's part of a decode step, as a cache layer would write it."""
    names = ("keys", "values", "positions", "bounds", "next_positions", "bias", "received")
    given = dict(zip(names, tensors, strict=True))
    rows = RaggedRows(**given, longest=300, uniform=0)
    append_rows(rows, key_states, value_states)
    options = {name: value for name, value in option.items() if name not in ("bias", "sinks")}
    return ragged_attention(query, rows, 2, scaling=0.2, sinks=sinks, **options) * 2


@pytest.mark.parametrize("columns", [(), ("bias", "received")])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_a_step_compiles_as_one_graph(option, columns):
    torch._dynamo.reset()
    compilations: list[int] = []

    def count(graph, _inputs):
        compilations.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    plain_rows = roomy_rows([4, 250, 12, 120], 64, columns=columns)
    rows = copied(plain_rows)
    compiled = torch.compile(step, fullgraph=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for each in range(6):
        states = new_states(4, 2, 1, 64, seed=each)
        query = torch.randn(2, 6, 1, 64, generator=generator)
        sinks = torch.randn(6, generator=generator) if OPTIONS[option].get("sinks") else None
        outputs = []
        for function, its_rows in ((step, plain_rows), (compiled, rows)):
            tensors = [getattr(its_rows, name) for name in ("keys", "values", "positions", "bounds", "next_positions")]
            tensors += [its_rows.bias, its_rows.received]
            outputs.append(function(tensors, query, *states, sinks, OPTIONS[option]))
        torch.testing.assert_close(*outputs)
    for name, each in tensors_of(plain_rows).items():
        assert torch.equal(each, getattr(rows, name)), name
    assert len(compilations) == 1 and compilations[0] < 10


def operator_arguments(option: str, packed_counts=()) -> tuple:
    request = make_request([4, 50, 12, 20], num_kv_heads=2, group_size=3, num_queries=2, option=option)
    rows = request.rows if not packed_counts else packed_in(request.rows, packed_counts)
    tensors = (rows.keys.nan_to_num(), rows.values.nan_to_num(), rows.positions, rows.bounds)
    columns = (None if rows.bias is None else rows.bias.nan_to_num(neginf=-float("inf")), request.sinks)
    numbers = (rows.longest, rows.uniform, 2, request.scaling, request.softcap, request.sliding_window)
    packed = as_arguments(rows.packed)
    return (request.query, *tensors, *columns, rows.bounds.new_empty(0), *packed, *numbers, "auto")


@pytest.mark.parametrize("packed_counts", [(), (0, 40, 8, 17)])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_the_operator_of_attention(option, packed_counts):
    arguments = operator_arguments(option, packed_counts)
    torch.library.opcheck(torch.ops.headprof.ragged_attention.default, arguments)


@pytest.mark.parametrize("packed_counts", [(), (0, 20, 8, 17)])
@pytest.mark.parametrize("columns", [(), ("bias",), ("bias", "received")])
def test_the_operator_of_appending(columns, packed_counts):
    rows = roomy_rows([4, 30, 12, 20], 16, columns=columns)
    rows = packed_in(rows, packed_counts) if packed_counts else rows
    tensors = (rows.keys, rows.values, rows.positions, rows.bounds, rows.next_positions, rows.bias, rows.received)
    packed = as_arguments(rows.packed)
    torch.library.opcheck(torch.ops.headprof.append_rows.default, (*tensors, *new_states(4, 2, 3, 16), *packed))


@interpreted
def test_the_operator_of_attention_takes_the_storages_plan():
    request = make_request([4, 500, 12, 20], num_kv_heads=2, group_size=3, num_queries=1)
    expected = attend(request, "triton")
    torch._dynamo.reset()
    compiled = torch.compile(lambda: attend(request, "triton"), fullgraph=True, backend="eager")
    table = request.rows.plans["triton"].table
    assert torch.equal(compiled(), expected)
    table[:] = torch.where(table == 1, 3, table)  # head 1 is not computed any more, and head 3 several times
    assert not torch.equal(compiled(), expected)


# On a real device.


def on_device(rows: RaggedRows) -> RaggedRows:
    return replace(rows, **{name: each.cuda() for name, each in tensors_of(rows).items()}, plans={})


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "head_dim"), [(1, 128), (3, 80), (33, 64)])
@pytest.mark.parametrize("way", [torch_append, triton_append])
def test_appending_on_cuda(way, count, head_dim, dtype):
    rows = roomy_rows([1, 300, 7, 12], head_dim, dtype=dtype)
    states = new_states(4, 2, count, head_dim, dtype)
    appended = on_device(rows)
    way(appended, *(each.cuda() for each in states))
    slow_append(rows, *states)
    for name, each in tensors_of(rows).items():
        assert torch.equal(getattr(appended, name).cpu(), each), name


@pytest.mark.gpu
@on_cuda
def test_a_captured_graph_appends_and_attends_step_after_step():
    """Addresses, grid and arguments stay; replaying is a step. It is compared with the reference after each."""
    lengths = [4, 2500, 600, 130, 1, 1300, 257, 900]
    rows = on_device(roomy_rows(lengths, 128, dtype=torch.bfloat16))
    query = torch.empty(2, 16, 1, 128, dtype=torch.bfloat16, device="cuda")
    keys, values = (torch.empty(2, 4, 1, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def run():
        append_rows(rows, keys, values)
        return ragged_attention(query, rows, 4, scaling=0.1, backend="triton")

    before = copied(rows)
    run()  # compiles, and makes the plan
    for name, each in tensors_of(before).items():
        getattr(rows, name).copy_(each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for seed in range(30):
        generator = torch.Generator("cuda").manual_seed(seed)
        for each in (query, keys, values):
            each.normal_(generator=generator)
        output.fill_(float("nan"))
        graph.replay()
        expected = ragged_attention(query, rows, 4, scaling=0.1, backend="reference")
        torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert (rows.bounds[1::2] - rows.bounds[:-1:2]).tolist() == [length + 30 for length in lengths]


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("num_queries", [1, 5, 40])
def test_the_last_program_of_a_head_finds_what_all_have_written(num_queries):
    """Many programs a head, and the same answer every time."""
    request = make_request(
        [20000, 130, 9000, 64], num_kv_heads=2, group_size=4, num_queries=num_queries, head_dim=128, seed=2
    )
    query, sources = request.query.cuda(), on_device(request.rows)
    arguments = {"scaling": request.scaling, "backend": "triton"}
    expected = ragged_attention(query.double(), sources, 2, scaling=request.scaling, backend="reference").float()
    first = ragged_attention(query, sources, 2, **arguments)
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    for _ in range(200):
        assert torch.equal(ragged_attention(query, sources, 2, **arguments), first)
    assert not sources.plans["triton"].counts.any()
