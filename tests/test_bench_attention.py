"""Attention over what a layer holds beside the bandwidth of the machine."""

import json

import bench_parts
import pytest
import torch
from support.clock import Clock
from support.devices import on_cuda

from headprof.bench import attention as bench_attention
from headprof.bench import measure
from headprof.bench.attention import AttentionTimes, run_attention_bench
from headprof.errors import UsageError


def test_attention_and_appending_are_timed_apart(monkeypatch):
    """A call of attention takes 2 seconds and one that appends half a second, on a device of 1,000 bytes a second."""
    clock = Clock()
    monkeypatch.setattr(measure, "now", clock)
    monkeypatch.setattr(bench_attention, "measure_bandwidth", lambda device: 1000.0)
    monkeypatch.setattr(bench_attention, "_read_bandwidth", lambda device: 900.0)
    for name, seconds in (("ragged_attention", 2.0), ("append_rows", 0.5)):
        work = getattr(bench_attention, name)

        def slow(*arguments, work=work, seconds=seconds, **options):
            clock.wait(seconds)
            return work(*arguments, **options)

        monkeypatch.setattr(bench_attention, name, slow)
    seen = []
    times = run_attention_bench(
        "smollm2-135m", [(2, 40), (1, 300)], repeats=2, on_progress=lambda *done: seen.append(done)
    )
    assert [(each.sequences, each.rows, each.even) for each in times] == [
        (2, 40, True),
        (2, 40, False),
        (1, 300, True),
        (1, 300, False),
    ]
    assert all((each.attention, each.append, each.bandwidth) == (2.0, 0.5, 1000) for each in times)
    assert times[0].nbytes == 2 * 2 * 3 * 40 * 64 * 4  # keys and values, sequences, heads, rows, dimension, float32
    assert all(each.ratio == each.nbytes / 2000 for each in times)
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]


def test_uneven_heads_have_about_as_many_rows_in_all():
    generator = torch.Generator().manual_seed(0)
    even, uneven = (bench_attention._lengths(128, 1024, even, generator) for even in (True, False))
    assert set(even.tolist()) == {1024} and 0.99 < uneven.sum() / even.sum() <= 1
    assert uneven.min() >= 256 and 3 * 1024 < uneven.max() < 6 * 1024


def test_more_sets_of_rows_than_a_cache_holds():
    sets = bench_attention._Sets(
        {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 16},
        1,
        100,
        True,
        torch.float32,
        torch.device("cpu"),
        torch.Generator().manual_seed(0),
        space=3,
    )
    assert len(sets.requests) * sets.nbytes >= 4 * bench_attention._cache_size(torch.device("cpu"))
    assert len({request.rows.keys.data_ptr() for request in sets.requests}) == len(sets.requests)
    assert sets.requests[0].rows.bounds.tolist() == [0, 100, 103, 203, 206]


def test_the_best_settings_of_each_layout_are_shown():
    times = [
        AttentionTimes(sequences, 100, False, 1, 1, attention=seconds, append=0.0, item_rows=each)
        for sequences in (2, 1)
        for each, seconds in enumerate([3.0, 1.0, 2.0])
    ]
    shown = bench_parts.fastest(times, most=2)
    assert [(each.sequences, each.item_rows) for each in shown] == [(2, 1), (2, 2), (1, 1), (1, 2)]


def test_on_the_command_line(tmp_path, capsys):
    words = ["attention", "--shape", "smollm2-135m", "--layouts", "1x20,2x30", "--repeats", "1"]
    bench_parts.main([*words, "--json", "--output", str(tmp_path / "times.json")])
    measured = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "times.json").read_text()) == measured
    assert [each["rows"] for each in measured] == [20, 20, 30, 30]
    assert all(each["ratio"] > 0 and each["append"] > 0 for each in measured)
    bench_parts.main(words)
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "16by1024"], "'16by1024' are no layouts: write them as 16x1024,64x1024 with --layouts"),
        (["--layouts", "1x0"], "--layouts 0 is too small"),
        (["--device", "cpu", "--sweep"], "needs a CUDA device: leave --sweep away"),
    ],
)
def test_what_cannot_be_measured(words, message):
    with pytest.raises(SystemExit, match=message):
        bench_parts.main(["attention", *words])


def test_a_sweep_needs_a_gpu():
    with pytest.raises(UsageError, match="sweep"):
        run_attention_bench("llama-3-8b", sweep=True)


@pytest.mark.gpu
@on_cuda
def test_a_sweep():
    times = run_attention_bench("llama-3-8b", [(2, 300)], sweep=True, repeats=2, device="cuda", dtype=torch.bfloat16)
    assert len({(each.item_rows, each.tile_rows, each.warps, each.stages) for each in times}) == len(times) > 16
    assert all(0 < each.ratio < 1 for each in times)
