"""One command for a GPU machine: what one part finds stays when another fails, and without a GPU it says so."""

import gc
import json
import shutil
import subprocess
import sys
import time

import gpu_report
import pytest
import torch
from bench_compress import TIMED
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.configuration_utils import CompileConfig

from headprof.bench import generate as bench
from headprof.bench.generate import LargestBatch
from headprof.models.published import SHAPES

SMALL = {"num_hidden_layers": 2, "hidden_size": 288, "intermediate_size": 96, "vocab_size": 128}
WORDS = ["--device", "cpu", "--shape", "smollm2-135m", "--budget", "16", "--new-tokens", "3"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model of two layers, a bandwidth that nothing is copied for, and steps that are compiled to no machine code."""

    def config(device):
        config = CompileConfig(backend="eager")
        config._compile_all_devices = True
        return config

    monkeypatch.setitem(SHAPES, "smollm2-135m", SHAPES["smollm2-135m"] | SMALL)
    monkeypatch.setattr(bench.run, "measure_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench.decoding, "compile_config", config)
    gc.freeze()  # each run collects garbage; what was there before need not be looked at again and again
    yield
    gc.unfreeze()
    torch._dynamo.reset()


def run(folder, *words):
    """The figures, what is shown of them, and the code or message that the command ends with."""
    ended = None
    try:
        gpu_report.main([*WORDS, "-o", str(folder), *words])
    except SystemExit as error:
        ended = error.code
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text(), ended


def test_without_a_gpu_it_says_so_once_all_is_ready(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "load_random", lambda *_, **__: pytest.fail("there is no device to make it on"))
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["-o", str(tmp_path / "gpu")])
    assert ended.value.code == (
        "Error: Everything is ready, but a CUDA device is needed from here on, and there is none."
    )
    assert not list((tmp_path / "gpu").iterdir())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("make") is None or torch.cuda.is_available(), reason="needs make, and no CUDA device")
def test_make_gpu_runs_up_to_where_it_needs_the_device(tmp_path):
    command = ["make", "-s", "gpu", f"GPU_PYTHON={sys.executable}", f"GPU_OUT={tmp_path}", "PARTS=steps,tests"]
    ended = subprocess.run(command, cwd=gpu_report.HERE.parent, capture_output=True, text=True)
    assert ended.returncode and not ended.stdout
    assert ended.stderr.splitlines()[0].startswith("Error: Everything is ready, but a CUDA device is needed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parts", "steps,speed"), "no part 'speed': choose of steps, prefill"),
        (("--lengths", "long"), "A length of 'long' cannot be read"),
        (("--shape", "gpt-5"), "no model shape 'gpt-5'"),
        (("--budget", "many"), "budget of 'many'"),
        (("--step", "quick"), "no way 'quick' to run"),
    ],
)
def test_what_cannot_be_meant_is_said_before_a_device_is_looked_for(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        gpu_report.main(["-o", str(tmp_path), *words])


def test_steps_and_prefill_beside_the_full_caches(tmp_path, capsys):
    """And the largest batch, which takes a GPU, is missing alone."""
    words = ("--lengths", "64,128,192", "--longest-static", "128", "--parts", "steps,batch,prefill")
    found, shown, ended = run(tmp_path / "gpu", *words)
    steps, prefill = found["parts"]["steps"], found["parts"]["prefill"]
    both = [("full", "eager"), ("full", "compiled"), ("headkv-r2", "auto")]
    assert [(each["length"], each["method"], each["step"]) for each in steps["measurements"]] == [
        *((length, *case) for length in (64, 128) for case in both),
        *((192, *case) for case in (both[0], both[2])),
    ]
    assert all(each["times_floor"] > 0 and each["decode_ratio"] > 0 for each in steps["measurements"])
    assert [each["length"] for each in steps["forward_alone"]] == [64, 128]
    assert [(each["length"], each["method"]) for each in prefill["measurements"]] == [
        (length, method) for length in (64, 128) for method in ("full", "headkv-r2", "headkv-ems")
    ]
    assert all(0 < each["overhead_share"] < 1 for each in prefill["measurements"] if each["method"] != "full")
    assert "only be found on a CUDA device" in found["parts"]["batch"]["failed"] and "batch" in ended
    assert not steps["failed"] and not prefill["failed"]
    assert shown == capsys.readouterr().out[:-1]
    rows = [row for row in shown.splitlines() if found["environment"]["device"] in row and row.startswith("| ")]
    assert len(rows) == 8 + 1 + 2 + 6 + 1


def test_what_was_found_stays_when_time_is_over_or_something_breaks(tmp_path, monkeypatch, capsys):
    def slow(report):
        yield {"times": [{"layer": 1, "seconds": 0.25}]}
        time.sleep(30)

    def broken(report):
        yield {"batches": []}
        raise ValueError("no such\nthing")

    monkeypatch.setattr(gpu_report, "LIMITS", gpu_report.LIMITS | {"attention": 1.5})
    monkeypatch.setattr(gpu_report, "PARTS", gpu_report.PARTS | {"attention": slow, "batch": broken})
    started = time.monotonic()
    found, shown, ended = run(tmp_path, "--lengths", "64", "--parts", "attention,batch,layer")
    assert time.monotonic() - started < 20
    parts = found["parts"]
    assert parts["attention"]["failed"] == "not done after 2 s" and parts["attention"]["times"][0]["seconds"] == 0.25
    assert parts["batch"]["failed"] == "ValueError: no such thing" and parts["batch"]["batches"] == []
    assert list(parts) == ["attention", "batch", "layer"] and "attention, batch" in ended
    assert "| 1 | 0.25 |" in shown and "Not complete: ValueError: no such thing" in shown


def test_lengths_that_were_measured_stay_when_time_is_over(monkeypatch, tmp_path):
    decode = bench.run.decode_prompts

    def slow(model, case, ids, *others):
        if ids.shape[1] == 128:
            raise gpu_report.OutOfTime
        return decode(model, case, ids, *others)

    monkeypatch.setattr(bench.run, "decode_prompts", slow)
    words = ("--lengths", "64,128", "--longest-static", "64", "--parts", "steps")
    found, _, _ = run(tmp_path, *words)
    assert found["parts"]["steps"]["failed"].startswith("not done after")
    assert [each["length"] for each in found["parts"]["steps"]["measurements"]] == [64] * 3
    found, _, _ = run(tmp_path, "--lengths", "64,128", "--parts", "prefill")
    assert [each["length"] for each in found["parts"]["prefill"]["measurements"]] == [64] * 3


def test_all_parts_together_have_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "PARTS", dict.fromkeys(gpu_report.PARTS, lambda report: pytest.fail("too late")))
    found, _, ended = run(tmp_path, "--minutes", "0")
    assert {part["failed"] for part in found["parts"].values()} == {"no time was left"} and ended


def test_the_largest_batch_beside_what_its_products_take(tmp_path, monkeypatch, capsys):
    asked = []

    def found_batches(model, max_positions, profile, request, on_progress):
        asked.append((request.methods, request.full, request.lengths))
        if request.full:
            rate = 100.0 if request.full == ("eager",) else 400.0
            return [LargestBatch("full", "", "sdpa", 64, 10, rate, 7, request.full[0])]
        return [LargestBatch("headkv-r2", "16", "auto", 64, 200, 5000.0, 9)]

    monkeypatch.setattr(gpu_report, "largest_batches", found_batches)
    monkeypatch.setattr(gpu_report, "_products_seconds", lambda loaded, batch: batch / 10_000)
    found, shown, ended = run(tmp_path, "--lengths", "128,64", "--parts", "batch")
    assert not ended and {lengths for *_, lengths in asked} == {(64,)}
    batches = found["parts"]["batch"]["batches"]
    assert [(each["step"], each["ratio"]) for each in batches] == [("auto", 12.5), ("compiled", 1.0), ("eager", 0.25)]
    assert found["parts"]["batch"]["products_seconds"] == 0.02
    assert "| 200 | 5000 | 12.50 | 40.0 | 50.0% |" in shown


def test_the_products_are_those_of_all_matrices(tmp_path):
    report = gpu_report.Report(gpu_report.read([*WORDS, "--lengths", "64", "-o", str(tmp_path)]))
    matrices = [each for each in report.loaded.model.modules() if isinstance(each, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        assert gpu_report._products_seconds(report.loaded, 3) > 0
    assert counter.get_total_flops() == 8 * 2 * 3 * sum(each.weight.numel() for each in matrices)
    assert gpu_report._products_seconds(report.loaded, 0) is None


@pytest.mark.long
def test_gpu_tests_are_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_right(): pass\n"
        "@pytest.mark.gpu\ndef test_wrong(): assert 1 == 2, 'one | two'\n"
        "@pytest.mark.gpu\ndef test_not_here(): pytest.skip('no')\n"
        "def test_of_another_kind(): assert False\n"
    )
    (tmp_path / "test_unread.py").write_text("import no_such_package  # mark.gpu\n")
    (tmp_path / "test_others.py").write_text("raise RuntimeError\n")
    monkeypatch.setattr(gpu_report, "HERE", tmp_path)
    found, shown, ended = run(tmp_path / "gpu", "--parts", "tests")
    tests = found["parts"]["tests"]
    assert tests["counts"] == {"passed": 1, "failure": 1, "error": 1, "skipped": 1} and not tests["failed"]
    assert len(tests["troubles"]) == 2 and "no_such_package" in (tmp_path / "gpu" / "tests.txt").read_text()
    assert "one / two" in shown and "tests" in ended


def test_attention_and_compression_of_a_layer_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "LAYOUTS", ((1, 40), (2, 30)))
    words = ("--lengths", "64,128,192", "--longest-static", "128", "--parts", "attention,layer")
    found, shown, ended = run(tmp_path, *words)
    attention, layer = (found["parts"][name]["times"] for name in ("attention", "layer"))
    assert [(each["sequences"], each["rows"], each["even"]) for each in attention] == [
        (*layout, even) for layout in ((1, 40), (2, 30)) for even in (True, False)
    ]
    assert [(each["length"], each["method"]) for each in layer] == [
        (length, method) for length in (64, 128) for method in TIMED
    ]
    assert not ended and all(each["ratio"] > 0 for each in attention) and "| headkv-ems | 128 |" in shown
