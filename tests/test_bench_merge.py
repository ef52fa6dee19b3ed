"""All heads at once beside one after the other; the global score beside the attention."""

import json

import bench_parts
import pytest
import torch
from support.clock import Clock
from torch.utils.flop_counter import FlopCounterMode

from headprof.bench import importance as bench_importance
from headprof.bench import measure
from headprof.bench import merge as bench_merge
from headprof.bench.importance import run_importance_bench
from headprof.bench.merge import run_merge_bench
from headprof.compression.kernels import column_sums
from headprof.errors import UsageError
from headprof.models.published import SHAPES


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "now", clock)
    return clock


def slowed(monkeypatch, module, name, clock, seconds):
    """Let function `name` of a module take so many seconds, given its arguments."""
    work = getattr(module, name)

    def slow(*arguments):
        clock.wait(seconds(*arguments))
        return work(*arguments)

    monkeypatch.setattr(module, name, slow)


def test_both_ways_keep_the_same_rows_and_are_timed(monkeypatch, clock):
    """Each call takes a second: all heads at once, or the three heads of two sequences one after the other."""
    slowed(monkeypatch, bench_merge, "_reduce", clock, lambda *_: 1)
    seen = []
    times = run_merge_bench(
        "smollm2-135m", (300, 200), (16, 40), batch=2, repeats=2, on_progress=lambda *done: seen.append(done)
    )
    assert [(each.length, each.budget) for each in times] == [(300, 16), (300, 40), (200, 16), (200, 40)]
    assert all((each.equal, each.together, each.looped, each.ratio) == (True, 1, 6, 6) for each in times)
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]


def test_other_rows_are_noticed():
    rows, choice = bench_merge._random_layer("smollm2-135m", 100, 16, 1, "cpu", torch.float32, 0)
    reduction = bench_merge.METHODS["ems"].reduction
    together = reduction.reduce(rows, choice)
    parts = [reduction.reduce(*bench_merge._head(rows, choice, 0, k)) for k in range(3)]
    assert bench_merge._equal(together, parts)
    parts[1].values[0] += 1
    assert not bench_merge._equal(together, parts)


def test_rows_do_merge_there():
    numbers = SHAPES["llama-3-8b"]
    rows, choice = bench_merge._random_layer("llama-3-8b", 400, 16, 1, "cpu", torch.float32, 0)
    assert rows.keys.shape == (1, numbers["num_key_value_heads"], 400, numbers["head_dim"])
    assert int(choice.kept.sum()) == 16 * numbers["num_key_value_heads"]
    reduced = bench_merge.METHODS["ems"].reduction.reduce(rows, choice)
    assert (reduced.columns["bias"] > 0).float().mean() > 0.2


def test_what_cannot_be_run():
    with pytest.raises(UsageError, match="no model shape 'llama-9'"):
        run_merge_bench("llama-9", (100,), (16,))
    with pytest.raises(UsageError, match="at least 1"):
        run_merge_bench("smollm2-135m", (100,), (16,), repeats=0)


def run_parts(capsys, *words):
    bench_parts.main([*words, "--shape", "smollm2-135m", "--repeats", "1"])
    return capsys.readouterr().out


def test_the_script_times_merging(capsys):
    words = ("merge", "--lengths", "200", "--budgets", "16,20")
    cases = json.loads(run_parts(capsys, *words, "--json"))
    assert [case["budget"] for case in cases] == [16, 20]
    assert all(case["equal"] and case["ratio"] == case["looped"] / case["together"] for case in cases)
    head, *rows = run_parts(capsys, *words).splitlines()
    assert head.split() == ["shape", "length", "budget", "batch", "together", "looped", "equal", "ratio"]
    assert [row.split()[:4] for row in rows] == [["smollm2-135m", "200", budget, "1"] for budget in ("16", "20")]


def test_the_script_times_importance(capsys):
    words = ("importance", "--lengths", "64")
    assert [case["samples"] for case in json.loads(run_parts(capsys, *words, "--json"))] == [0, 1024]
    shown = run_parts(capsys, *words, "--samples", "0,16")
    assert "attention" in shown and [row.split()[2] for row in shown.splitlines()[1:]] == ["0", "16"]


def test_the_script_says_what_is_wrong_in_a_sentence():
    with pytest.raises(SystemExit, match="Error: There is no model shape 'llama-9'"):
        bench_parts.main(["merge", "--shape", "llama-9"])


def test_every_time_of_the_score_counts_the_attention_anew(monkeypatch):
    """What is shared between the importances of a prompt is not what is timed."""
    counted, count = [], column_sums.torch_column_sums

    def watched(request, block):
        counted.append((request.key.shape[2], request.query.shape[2]))
        return count(request, block)

    monkeypatch.setattr(column_sums, "torch_column_sums", watched)
    run_importance_bench("smollm2-135m", (64, 128), (0, 4), repeats=3)
    each_time = [(64, 64), (64, 20), (128, 128), (128, 20)]  # a sample has the last 16 queries beside its own
    assert counted == [case for length in (0, 2) for _ in range(4) for case in each_time[length : length + 2]]


def test_a_longer_prompt_is_more_work_to_score():
    """Sixteen times the tokens: as many times the products for a few queries, and 256 times for all of them."""
    operations = {}
    for length in (128, 2048):
        observed = bench_importance._random_layer("smollm2-135m", length, "cpu", torch.float32, 0)
        for samples in (0, 4):
            for time in range(2):
                with FlopCounterMode(display=False) as counter:
                    bench_importance._score(observed, samples)
                operations[length, samples, time] = counter.get_total_flops()
    for time in range(2):
        assert operations[2048, 0, time] > 100 * operations[128, 0, time] > 0
        assert 10 < operations[2048, 4, time] / operations[128, 4, time] < 20


def test_the_scores_time_grows_with_the_prompt():
    """256 times the products take more than twice the time on any machine, however busy it is."""
    short, long = run_importance_bench("smollm2-135m", (128, 2048), (0,), repeats=3)
    assert long.score > 2 * short.score and long.attention > 2 * short.attention


def test_the_score_is_timed_beside_the_attention(monkeypatch, clock):
    slowed(monkeypatch, bench_importance, "_attend", clock, lambda *_: 4)
    slowed(monkeypatch, bench_importance, "_score", clock, lambda states, samples: 1 if samples else 8)
    times = run_importance_bench("smollm2-135m", (64, 128), (0, 16), repeats=1)
    assert [(each.length, each.samples) for each in times] == [(64, 0), (64, 16), (128, 0), (128, 16)]
    assert [(each.attention, each.score, each.ratio) for each in times] == [(4, 8, 2), (4, 1, 0.25)] * 2
    with pytest.raises(UsageError, match="no model shape"):
        run_importance_bench("llama-9", (64,), (0,))
    with pytest.raises(UsageError, match="at least"):
        run_importance_bench("smollm2-135m", (64,), (-1,))
