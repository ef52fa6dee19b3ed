"""Compressing a layer, the host never waits for the device; and it issues few operators."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import bench_compress
import pytest
import torch
from support import observations
from support.devices import interpreted, on_cuda
from support.host_reads import device_watched, serve_by_kernels
from support.observations import as_held_rows, compress, observed_prompt, with_rows
from support.profiles import random_surrogate
from support.tiny_models import tiny_model

from headprof.compression.methods import reduction
from headprof.compression.methods.table import METHODS as UNBOUND
from headprof.compression.methods.window_attention import WindowAttention
from headprof.compression.rows import HeadCounts
from headprof.models.token_kinds import TokenKinds

TOKENS, BUDGET, KV_HEADS = 300, 40, 2
SURROGATE = random_surrogate(tiny_model(head_dim=8, num_kv_heads=KV_HEADS, num_heads=2 * KV_HEADS))
KINDS = TokenKinds(frozenset(range(3)), frozenset(range(3, 40)))
METHODS = {
    name: replace(method, importance=method.importance.with_surrogate(SURROGATE).with_token_kinds(KINDS).of_layer(1))
    for name, method in UNBOUND.items()
}


def layer(method, kind):
    """A prompt, one with padding, or held rows as a method asks for them, and what each head is to keep of them."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 2 * KV_HEADS, TOKENS, 8, generator=generator)
    keys, values = (torch.randn(2, TOKENS, KV_HEADS, 8, generator=generator).transpose(1, 2) for _ in range(2))
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    if kind == "padded":
        valid[0, :90] = False
    needed = method.importance.queries
    queries = queries if needed is None else queries[:, :, TOKENS - needed :]
    observed = observed_prompt(queries, keys, valid, values, scaling=0.4)
    if kind == "held":
        observed = with_rows(as_held_rows(observed), bias=torch.randn(2, KV_HEADS, TOKENS))
    else:
        observed = replace(observed, padded=kind == "padded")
    return observed, HeadCounts.of(torch.tensor([[BUDGET - 10, BUDGET + 10]] * 2), "cpu")


@pytest.mark.parametrize("kind", ["prompt", "padded", "held"])
@pytest.mark.parametrize("name", METHODS)
def test_no_method_waits_for_the_device(name, kind):
    method = METHODS[name]
    observed, counts = layer(method, kind)
    with device_watched() as watched:
        rows = compress(method, observed, counts)
    assert watched.waits == []
    assert len(rows.keys) == 2 * KV_HEADS * BUDGET == int(rows.counts.sum())
    assert rows.lengths is None if method.budget.spreads else rows.counts.tolist() == list(rows.lengths)


@interpreted
@pytest.mark.parametrize("kind", ["prompt", "padded", "held"])
@pytest.mark.parametrize("name", METHODS)
def test_no_method_waits_for_its_kernels(name, kind, monkeypatch):
    method = METHODS[name]
    observed, counts = layer(method, kind)
    plain = compress(method, replace(observed, shared={}), counts)
    serve_by_kernels(monkeypatch)
    with device_watched() as watched:
        rows = compress(method, replace(observed, shared={}), counts)
    assert watched.waits == []
    assert torch.equal(rows.positions, plain.positions)
    torch.testing.assert_close(rows.values, plain.values)


@pytest.mark.parametrize("name", ["headkv-r2", "adakv", "ems"])
def test_one_who_waits_is_seen(name, monkeypatch):
    plain = reduction.largest

    def waiting(values, counts, *args, **options):
        options["most"] = counts.max().item()
        return plain(values, counts, *args, **options)

    monkeypatch.setattr(observations, "largest", waiting)
    observed, counts = layer(METHODS[name], "prompt")
    with device_watched() as watched:
        compress(METHODS[name], observed, counts)
    assert len(watched.waits) == 1 and __file__ in watched.waits[0]


# The watch itself.

NUMBERS = torch.arange(6).view(2, 3)

WAITING = {
    "item": lambda: NUMBERS[0, 0].item(),
    "tolist": lambda: NUMBERS.tolist(),
    "if": lambda: 1 if (NUMBERS > 3).any() else 0,
    "int": lambda: int(NUMBERS.max()),
    "range": lambda: range(NUMBERS[1, 1]),
    "numpy": lambda: NUMBERS.numpy(),
    "cpu": lambda: NUMBERS.cpu(),
    "nonzero": lambda: NUMBERS.nonzero(),
    "where": lambda: torch.where(NUMBERS > 2),
    "mask": lambda: NUMBERS[NUMBERS > 2],
    "mask of some": lambda: NUMBERS[:, NUMBERS[0] > 1],
    "put by mask": lambda: NUMBERS.clone().__setitem__(NUMBERS > 2, torch.arange(3, device="cpu")),
    "masked_select": lambda: NUMBERS.masked_select(NUMBERS > 2),
    "unique": lambda: torch.unique(NUMBERS),
    "equal": lambda: torch.equal(NUMBERS, NUMBERS.clone()),
    "repeat_interleave": lambda: NUMBERS[0].repeat_interleave(NUMBERS[0]),
    "index by a list": lambda: NUMBERS[[0, 1]],
    "index of the host": lambda: NUMBERS[torch.tensor([0, 1])],
    "copy to the host": lambda: torch.zeros(2, 3).copy_(NUMBERS),
    "upload": lambda: torch.tensor([1, 2], device="cpu"),
    "upload by to": lambda: torch.arange(3).to("cpu"),
}

GOING_ON = {
    "arithmetic": lambda: (NUMBERS * 2 + 1).sum(),
    "fill by mask": lambda: NUMBERS.clone().__setitem__(NUMBERS > 2, 0),
    "index": lambda: NUMBERS[:, NUMBERS[0]],
    "nonzero_static": lambda: torch.nonzero_static(NUMBERS > 2, size=3),
    "made on the device": lambda: torch.arange(3, device="cpu") + NUMBERS,
    "the host's own": lambda: [*(torch.arange(3) + 1).tolist(), int(torch.tensor([5]).max())],
    "upload that does not wait": lambda: torch.arange(3).to("cpu", non_blocking=True) + NUMBERS,
    "repeat_interleave of known size": lambda: NUMBERS[0].repeat_interleave(NUMBERS[0], output_size=3),
}


@pytest.mark.parametrize("how", WAITING)
def test_the_watch_sees_every_way_to_wait(how):
    with device_watched() as watched:
        WAITING[how]()
    assert len(watched.waits) == 1, watched.waits
    assert __file__ in watched.waits[0]


@pytest.mark.parametrize("how", GOING_ON)
def test_the_watch_lets_pass_what_does_not_wait(how):
    with device_watched() as watched:
        GOING_ON[how]()
    assert watched.waits == []


def test_what_was_the_hosts_before_can_be_named():
    scores = torch.rand(3)
    with device_watched(hosts=[scores]) as watched:
        scores.max().item()
        scores.to("cpu", non_blocking=True).tolist()
    assert len(watched.waits) == 1  # what has been taken to the device is no longer the host's


def test_what_was_read_is_the_hosts():
    with device_watched() as watched:
        read = (NUMBERS + 1).cpu()
        assert (read > 0).all() and read[0].tolist() == [1, 2, 3]
        NUMBERS.sum().item()
    assert [each.split(" at ")[0] for each in watched.waits] == ["cpu", "_local_scalar_dense"]


def test_operators_are_counted_without_views():
    with device_watched() as watched:
        (NUMBERS.view(3, 2).transpose(0, 1)[0] + 1).sum()
    assert watched.operators == ["add", "sum"]


# How many operators are issued for one layer.


def operators(name):
    """Operators for one sequence without padding, by plain torch."""
    observed, _ = layer(METHODS[name], "prompt")
    one = replace(
        observed,
        queries=observed.queries[:1],
        rows=observed.rows.map(lambda each: each[:1]),
        valid=observed.valid[:1],
    )
    counts = HeadCounts.of(torch.tensor([[BUDGET - 10, BUDGET + 10]]), "cpu")
    compress(METHODS[name], replace(one, shared={}), counts)  # what is made once for all layers
    with device_watched() as watched:
        compress(METHODS[name], replace(one, shared={}), counts)
    return watched.operators


AT_MOST_BY_KERNELS = {"headkv-r2": 12, "snapkv": 12, "headkv-ems": 112, "ems": 112, "adakv": 27, "h2o": 25, "tova": 12}


@interpreted
@pytest.mark.parametrize("name", AT_MOST_BY_KERNELS)
def test_by_its_kernels_it_takes_fewer(name, monkeypatch):
    serve_by_kernels(monkeypatch)
    assert len(operators(name)) <= AT_MOST_BY_KERNELS[name]


AT_MOST = {"headkv-r2": 34, "snapkv": 31, "adakv": 72, "tova": 30}


@pytest.mark.parametrize("name", AT_MOST)
def test_compressing_a_layer_takes_few_operators(name):
    assert len(operators(name)) <= AT_MOST[name]


def test_a_window_alone_needs_no_more_than_its_arithmetic():
    observed, _ = layer(METHODS["headkv-r2"], "prompt")
    window = METHODS["headkv-r2"].importance
    assert isinstance(window, WindowAttention)
    window.score(observed)
    with device_watched() as watched:
        window.score(observed)
    assert len(watched.operators) == 12


# The bench of it.


def test_the_bench_prints_a_row_for_each_method(capsys):
    words = ["--shape", "smollm2-135m", "--lengths", "256", "--methods", "headkv-r2,ems", "--repeats", "2"]
    bench_compress.main([*words, "--budget", "20", "--device", "cpu", "--json"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["method"], first["length"], first["budget"]) == ("headkv-r2", 256, 20)
    assert 20 < first["operators"] <= 34 < second["operators"] and first["milliseconds"] > 0
    assert first["waits"] == second["waits"] == 0 and first["launches"] is None
    bench_compress.main([*words, "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit, match="llama-9"):
        bench_compress.main(["--shape", "llama-9", "--device", "cpu"])


# On a real device.


def on_device(observed):
    rotary = observed.layer.rotary
    rotary = replace(rotary, embedding=copy.deepcopy(rotary.embedding).cuda())
    return replace(
        observed,
        queries=observed.queries.cuda(),
        rows=observed.rows.map(lambda each: each.cuda()),
        valid=observed.valid.cuda(),
        layer=replace(observed.layer, rotary=rotary),
        query_positions=None if observed.query_positions is None else observed.query_positions.cuda(),
        query_valid=None if observed.query_valid is None else observed.query_valid.cuda(),
        shared={},
    )


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("kind", ["prompt", "padded", "held"])
@pytest.mark.parametrize("name", METHODS)
def test_no_method_waits_on_cuda(name, kind):
    method = METHODS[name]
    observed, counts = layer(method, kind)
    plain = compress(method, observed, counts)
    observed, counts = on_device(observed), replace(counts, counts=counts.counts.cuda())
    compress(method, observed, counts)  # compiles, and makes what is made once
    observed.shared.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = compress(method, observed, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same = (rows.positions.cpu() == plain.positions).float().mean()
    assert same > 0.98  # but for what is all but equal


@pytest.mark.gpu
@on_cuda
def test_a_layer_of_an_8b_model_is_compressed_in_little_time():
    for each in bench_compress.run_compress_bench(
        "llama-3-8b", [8192], methods=["headkv-r2", "headkv-ems"], device="cuda", dtype=torch.bfloat16
    ):
        assert each.waits == 0 and each.launches is not None and each.launches < 200
