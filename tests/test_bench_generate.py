"""The benchmark: the same work on both sides, exact bytes, and failures that stay where they are."""

import dataclasses
import gc
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.clock import Clock
from support.profiles import random_profile
from support.tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig

from headprof.bench import generate as bench
from headprof.bench import measure
from headprof.bench.generate import BenchRequest, BenchResult, Measurement
from headprof.cli import main
from headprof.cli.tables.bench import decoding, decoding_remarks
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.cache.storage import SLACK
from headprof.compression.decode_steps import DecodeSteps
from headprof.compression.session import compressed
from headprof.errors import ModelError, ProfileError, UsageError
from headprof.models import random_weights as random_models
from headprof.models.published import SHAPES
from headprof.models.shape import HeadShape
from headprof.profile import random_scores

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
ROW_BYTES = 2 * HEAD_DIM * 4
REQUEST = BenchRequest(methods=("snapkv", "headkv"), budgets=("12",), lengths=(24, 40), new_tokens=4, repeats=2)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    """A bandwidth without copying 256 MB in every test."""
    monkeypatch.setattr(bench.run, "measure_bandwidth", lambda device: 1e9)


@pytest.fixture(autouse=True)
def small_heap():
    """Each run collects garbage; what was there before the test need not be looked at again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model():
    return tiny_model("llama", layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_positions=64)


PROMPT_SECONDS, TOKEN_SECONDS, KEEPING_SECONDS = 8.0, 0.5, 0.25  # in binary without rounding


@pytest.fixture
def clock(model, monkeypatch):
    """A time that passes only while the model reads a prompt or a token, and while a layer keeps some of its rows."""
    clock, keep = Clock(), HeadCacheLayer.filled

    def reads(_module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        clock.wait(PROMPT_SECONDS if ids.shape[1] > 1 else TOKEN_SECONDS)

    def filled(layer, *args):
        clock.wait(KEEPING_SECONDS)
        return keep(layer, *args)

    model.register_forward_pre_hook(reads, with_kwargs=True)
    monkeypatch.setattr(HeadCacheLayer, "filled", filled)
    for module in (bench.decoding, bench.largest_batch):
        monkeypatch.setattr(module, "now", clock)
    return clock


def run(model, request=REQUEST, **others):
    return bench.run_bench(model, 64, random_profile(model), request, **others)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_case_is_measured_and_its_bytes_are_exact(model, clock, batch):
    request = dataclasses.replace(REQUEST, methods=("full", "snapkv", "headkv"), batch=batch, backends=("torch",))
    result = run(model, request)
    assert [(each.method, each.budget, each.backend, each.length) for each in result.measurements] == [
        (*case, length)
        for length in (24, 40)
        for case in [("full", "", "sdpa"), ("snapkv", "12", "torch"), ("headkv", "12", "torch")]
    ]
    weights = bench.run.weight_bytes_per_step(model)
    for each in result.measurements:
        assert each.failed == "" and each.batch == batch
        assert each.decode_rate == batch / TOKEN_SECONDS and each.steadiness is None
        heads = batch * LAYERS * KV_HEADS
        if each.method == "full":
            assert each.cache_bytes == heads * each.length * ROW_BYTES
            assert (each.prefill_seconds, each.overhead_seconds, each.overhead_share) == (PROMPT_SECONDS, 0, 0)
        else:
            assert each.cache_bytes == heads * (12 + SLACK) * (ROW_BYTES + 4)  # and the row's position
            overhead = LAYERS * KEEPING_SECONDS
            assert (each.prefill_seconds, each.overhead_seconds) == (PROMPT_SECONDS + overhead, overhead)
            assert each.overhead_share == overhead / (PROMPT_SECONDS + overhead)
        assert each.step_bytes == weights + each.cache_bytes
        assert each.floor_rate == pytest.approx(batch * 1e9 / each.step_bytes)
    assert result.bandwidth == 1e9
    assert json.loads(json.dumps(dataclasses.asdict(result)))["environment"]["dtype"] == "float32"


def test_the_median_run_counts_and_the_highest_peak(model, clock, monkeypatch):
    """Of three runs, the second at half the speed of the third; warming up, which is slowest, counts nowhere."""
    paces = iter([100, 100, 1, 1, 4, 4, 2, 2])
    peaks = {100: 9000, 1: 700, 4: None, 2: 800}
    monkeypatch.setattr(bench.decoding, "PeakMemory", lambda device: SimpleNamespace(used=lambda: peaks[clock.pace]))
    request = dataclasses.replace(REQUEST, methods=("snapkv",), lengths=(24,), repeats=3)
    full, snapkv = run(model, request, on_progress=lambda *_: setattr(clock, "pace", next(paces))).measurements
    assert (full.prefill_seconds, full.decode_rate) == (2 * PROMPT_SECONDS, 1 / (2 * TOKEN_SECONDS))
    overhead = 2 * LAYERS * KEEPING_SECONDS
    assert (snapkv.prefill_seconds, snapkv.overhead_seconds) == (2 * PROMPT_SECONDS + overhead, overhead)
    assert full.peak_bytes == snapkv.peak_bytes == 800


def test_a_peak_that_the_system_does_not_tell_is_none(model, monkeypatch):
    monkeypatch.setattr(bench.decoding, "PeakMemory", lambda device: SimpleNamespace(used=lambda: None))
    request = dataclasses.replace(REQUEST, methods=("snapkv",), lengths=(24,))
    assert [each.peak_bytes for each in run(model, request).measurements] == [None, None]


def test_all_cases_do_the_same_work_in_turn(model):
    """Caches, prompts and numbers of forward passes, as the model sees them."""
    seen = []

    def note(_module, _args, kwargs):
        attention = model.config._attn_implementation
        seen.append((type(kwargs["past_key_values"]), kwargs["input_ids"].tolist(), attention))

    model.register_forward_pre_hook(note, with_kwargs=True)
    request = dataclasses.replace(REQUEST, methods=("snapkv",), batch=2, lengths=(24,))
    progress = []
    run(model, request, on_progress=lambda text, done, total: progress.append((text, done, total)))
    warm_up, repeats = seen[: 2 * 2], seen[2 * 2 :]
    assert [kind for kind, *_ in warm_up] == [DynamicCache] * 2 + [HeadCache] * 2
    assert [kind for kind, *_ in repeats] == ([DynamicCache] * 4 + [HeadCache] * 4) * 2
    prompts = [ids for _, ids, _ in seen if len(ids[0]) > 1]
    assert len(prompts) == 6 and all(prompt == prompts[0] for prompt in prompts)
    assert (len(prompts[0]), len(prompts[0][0])) == (2, 24)
    assert {attention for kind, _, attention in seen if kind is DynamicCache} == {"sdpa"}
    assert [(done, total) for _, done, total in progress] == [(done, 6) for done in range(6)]
    assert progress[-1][0] == "snapkv, budget 12, auto, 24 tokens"
    assert PromptLayer.attended.__qualname__ == "PromptLayer.attended"


def test_steps_that_cannot_be_run_as_asked_cost_their_row_alone(model, monkeypatch):
    def refuse(steps, run):
        raise ModelError("A decode step of this LlamaForCausalLM cannot be compiled as a whole: leave it away.")

    monkeypatch.setattr(DecodeSteps, "_compiled", refuse)
    asked = {"methods": ("snapkv",), "lengths": (24,), "steps": ("eager", "compiled"), "new_tokens": 8}
    result = run(model, dataclasses.replace(REQUEST, **asked))
    assert [(each.method, each.step, bool(each.failed)) for each in result.measurements] == [
        ("full", "eager", False),
        ("snapkv", "eager", False),
        ("snapkv", "compiled", True),
    ]
    cells = decoding(result)[1]
    assert [row[4] == "refused" for row in cells] == [False, False, True]
    assert decoding_remarks(result) == [result.measurements[2].failed]


@pytest.fixture
def compilations(monkeypatch):
    """Steps over the static cache are compiled, but not into machine code; yields the batch of each compilation."""
    seen = []

    def backend(graph, inputs, **_options):
        seen.append(next(each.shape[0] for each in inputs if each.dtype == torch.int64 and each.ndim == 2))
        return graph.forward

    def config(device):
        config = CompileConfig(backend=backend)
        config._compile_all_devices = True
        return config

    monkeypatch.setattr(bench.full_cache, "compile_config", config)
    monkeypatch.setattr(bench.decoding, "compile_config", config)
    yield seen
    torch._dynamo.reset()


def test_the_static_cache_is_compiled_while_it_warms_up(model, compilations):
    said, compiled_at, caches = [], [], []

    def note(text, done, total):
        compiled_at.append(len(compilations))
        said.append(text)

    def look(_module, _args, kwargs):
        if not torch.compiler.is_compiling() and kwargs["input_ids"].shape[1] > 1:
            caches.append(type(kwargs["past_key_values"]))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    request = dataclasses.replace(REQUEST, methods=("snapkv",), full=("eager", "compiled"), new_tokens=8)
    result = run(model, request, on_progress=note)
    hook.remove()
    cases = [(each.method, each.step, each.length) for each in result.measurements]
    assert cases == [
        (*case, length) for length in (24, 40) for case in [("full", "eager"), ("full", "compiled"), ("snapkv", "auto")]
    ]
    per_round = ["full cache, eager", "full cache, compiled", "snapkv, budget 12, auto"]
    warm = {24: per_round, 40: ["full cache, compiled"]}
    assert said == [
        f"{text}, {length} tokens"
        for length in (24, 40)
        for text in [f"Warming up: {each}" for each in warm[length]] + 2 * per_round
    ]
    assert len(compilations) == 2  # once for each length
    assert compiled_at[said.index("Warming up: full cache, compiled, 40 tokens") + 1 :] == [2] * 6
    assert caches.count(StaticCache) == 6 and caches.count(DynamicCache) == 5
    heads = LAYERS * KV_HEADS
    for each in result.measurements[1::3]:
        assert each.cache_bytes == each.largest_cache_bytes == heads * (each.length + 8) * ROW_BYTES
        assert each.overhead_seconds == 0 and not each.failed
    assert not hasattr(model, "_compiled_call")


def test_the_static_cache_says_what_the_growing_one_says(model, compilations):
    ids = bench.cases.random_ids(model, 2, 24, seed=1)
    eager, static = (bench.cases.Case("full", "", "sdpa", 24, step=step) for step in ("eager", "compiled"))
    said = []
    generate = model.generate
    model.generate = lambda *args, **options: said.append(generate(*args, **options))
    for case in (eager, static):
        bench.decoding.decode_prompts(model, case, ids, 9, None)
    assert torch.equal(*said) and compilations == [2]


def test_on_a_cpu_only_the_growing_cache_is_run_unless_asked_for(model):
    assert bench.full_cache.default_full_steps(torch.device("cpu")) == ("eager",)
    assert bench.full_cache.default_full_steps(torch.device("cuda")) == ("eager", "compiled")
    assert bench.full_cache.compile_config(torch.device("cpu"))._compile_all_devices
    assert bench.full_cache.compile_config(torch.device("cuda")) == CompileConfig()
    cases = bench.cases.all_cases(model, 64, random_profile(model), REQUEST)
    assert {case.step for case in cases if case.method == "full"} == {"eager"}


def test_a_steps_way_is_passed_on(model, monkeypatch):
    given = []
    request = dataclasses.replace(REQUEST, methods=("snapkv",), lengths=(24,), steps=("eager", "auto"), full=())
    cases = bench.cases.all_cases(model, 64, None, request)
    monkeypatch.setattr(bench.cases, "attending_ragged", lambda model, *, step, **_: given.append(step))
    for case in cases:
        case.attending(model, None)
    assert given == [case.step for case in cases] == ["eager", "auto"]


def test_a_device_is_not_waited_for_between_layers(monkeypatch):
    """Its own clock says what compression takes: here a second more with each event."""
    events, waits = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = float(len(events))
            events.append(self)

        def synchronize(self):
            waits.append(self)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = bench.decoding._DeviceWatch()
    assert watch.seconds() == 0
    done = []
    for number in range(3):
        watch.timed(done.append)(number)
    assert done == [0, 1, 2] and not waits
    assert watch.seconds() == 3.0 and waits == [events[-1]]


def test_decoding_goes_on_past_an_end_token(model):
    model.generation_config.eos_token_id = list(range(512))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    run(model, dataclasses.replace(REQUEST, lengths=(24,)))
    assert len(passes) == 3 * 2 + 2 * 3 * 4  # three cases: two tokens to warm up, then four in each of two runs


def more_than_there_is():
    torch.empty(1 << 60, dtype=torch.uint8)


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [more_than_there_is, cuda_is_full])
def test_a_case_without_memory_fails_alone(model, monkeypatch, fail):
    before = HeadCacheLayer.filled

    def filled(layer, observed):
        if layer.plan.name == "snapkv" and observed.keys.shape[2] == 40:
            fail()
        before(layer, observed)

    monkeypatch.setattr(HeadCacheLayer, "filled", filled)
    measurements = run(model).measurements
    failed = [each for each in measurements if each.failed]
    assert failed == [Measurement("snapkv", "12", "auto", 40, 1, failed="out of memory")]
    assert all(each.decode_rate is not None for each in measurements if not each.failed)
    assert PromptLayer.attended.__qualname__ == "PromptLayer.attended"


def test_another_error_is_not_taken_for_a_lack_of_memory(model, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HeadCacheLayer, "filled", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("snapvk",)}, "no method 'snapvk'"),
        ({"budgets": ("many",)}, "budget of 'many'"),
        ({"budgets": ()}, "without budgets.*--budgets"),
        ({"lengths": ()}, "without lengths.*--lengths"),
        ({"backends": ("fast",)}, "no attention backend 'fast'"),
        ({"steps": ("auto", "quick")}, "no way 'quick' to run a decode step"),
        ({"steps": ("eager", "graph")}, "Only a CUDA device replays captured steps"),
        ({"steps": ()}, "without steps.*--steps"),
        ({"full": ("static",)}, "no 'static' for --full: choose one of eager, compiled"),
        ({"new_tokens": 1}, "--new-tokens 1 is too small: give at least 2"),
        ({"repeats": 0}, "--repeats 0 is too small: give at least 1"),
        ({"batch": 0}, "--batch 0 is too small"),
        ({"lengths": (24, 0)}, "--lengths 0 is too small"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0 is too small"),
        ({"lengths": (24, 61)}, "61 tokens and 4 new ones exceed the 64 that the model can read"),
        ({"budgets": ("2",)}, "budget of 2 tokens"),
    ],
)
def test_requests_that_cannot_be_met(model, change, message):
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(UsageError, match=message):
        run(model, dataclasses.replace(REQUEST, **change))
    assert not seen


def test_a_request_knows_whether_it_needs_a_profile(model):
    assert REQUEST.needs_profile and not dataclasses.replace(REQUEST, methods=("snapkv", "full")).needs_profile
    with pytest.raises(ProfileError, match="needs a head profile"):
        bench.run_bench(model, 64, None, REQUEST)


def test_options_reach_the_methods_that_have_them(model):
    request = dataclasses.replace(REQUEST, methods=("snapkv", "knorm"), options={"window": 5, "keep_last": 0})
    cases = bench.cases.all_cases(model, 64, None, request)
    assert cases[1].plan.method.importance.window == 5 and cases[2].plan.method.keep_last == 0


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_prefill_may_be_chunked(model, chunk):
    result = run(model, dataclasses.replace(REQUEST, prefill_chunk=chunk, lengths=(24,)))
    assert [each.cache_bytes for each in result.measurements[1:]] == [
        LAYERS * KV_HEADS * (12 + SLACK) * (ROW_BYTES + 4)
    ] * 2


def test_a_step_reads_an_untied_models_weights_without_its_input_embedding(model):
    hidden, mlp, heads, vocab = 64, 128, 4, 512
    attention = 2 * hidden * heads * HEAD_DIM + 2 * hidden * KV_HEADS * HEAD_DIM
    layer = attention + 3 * hidden * mlp + 2 * hidden
    expected = 4 * (LAYERS * layer + hidden + vocab * hidden)
    assert bench.run.weight_bytes_per_step(model) == expected
    assert bench.run.weight_bytes_per_step(model.to(torch.bfloat16)) == expected / 2
    model.lm_head.weight = model.model.embed_tokens.weight
    assert bench.run.weight_bytes_per_step(model) == expected / 2


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_step_reads_a_tied_models_weights_once(arch):
    model = tiny_model(arch)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bench.run.weight_bytes_per_step(model) == sum(weight.nbytes for weight in model.state_dict().values()) - (
        model.lm_head.weight.nbytes  # listed twice
    )


def measurement(method, length=1000, batch=1, **numbers):
    return Measurement(method, "" if method == "full" else "64", "x", length, batch, **numbers)


def test_comparison_is_with_the_full_caches_of_the_same_length_and_batch():
    full = measurement("full", prefill_seconds=2.0, decode_rate=10.0, cache_bytes=4000, peak_bytes=8000)
    longer = measurement("full", 2000, failed="out of memory")
    other = measurement("full", batch=4, prefill_seconds=5.0, decode_rate=5.0, cache_bytes=10, peak_bytes=0)
    fast = measurement("snapkv", prefill_seconds=3.0, decode_rate=25.0, cache_bytes=100, peak_bytes=None)
    alone = measurement("snapkv", 2000, prefill_seconds=3.0, decode_rate=25.0, cache_bytes=100, peak_bytes=9)
    four = measurement("snapkv", batch=4, prefill_seconds=5.0, decode_rate=20.0, cache_bytes=1, peak_bytes=5)
    stray = measurement("snapkv", 3000, prefill_seconds=5.0, decode_rate=20.0, cache_bytes=1, peak_bytes=5)
    measurements = [full, longer, other, fast, alone, four, stray]
    rows = bench.comparison(BenchResult(1e9, measurements, {}))
    assert [row.measurement for row in rows] == measurements
    assert [(row.decode_ratio, row.prefill_ratio, row.cache_ratio, row.peak_ratio) for row in rows] == [
        (1.0, 1.0, 1.0, 1.0),
        (None, None, None, None),
        (1.0, 1.0, 1.0, None),
        (2.5, 1.5, 0.025, None),
        (None, None, None, None),
        (4.0, 1.0, 0.1, None),
        (None, None, None, None),
    ]


def test_comparison_is_with_the_better_of_two_full_caches_in_each_figure():
    growing = measurement("full", step="eager", prefill_seconds=2.0, decode_rate=10.0, cache_bytes=400, peak_bytes=800)
    static = measurement(
        "full", step="compiled", prefill_seconds=4.0, decode_rate=50.0, cache_bytes=500, peak_bytes=700
    )
    ours = measurement("snapkv", prefill_seconds=3.0, decode_rate=100.0, cache_bytes=100, peak_bytes=350)
    for beside in ([growing, static], [static, growing]):
        *_, row = bench.comparison(BenchResult(1e9, [*beside, ours], {}))
        assert (row.decode_ratio, row.prefill_ratio, row.cache_ratio, row.peak_ratio) == (2.0, 1.5, 0.25, 0.5)
    lost = dataclasses.replace(measurement("full", step="compiled", failed="out of memory"))
    *_, row = bench.comparison(BenchResult(1e9, [growing, lost, ours], {}))
    assert row.decode_ratio == 10.0


def test_a_step_is_compared_with_its_floor():
    four = measurement("snapkv", batch=4, decode_rate=20.0, floor_rate=80.0, prefill_seconds=1.0, overhead_seconds=0.5)
    assert (four.step_seconds, four.floor_seconds, four.times_floor) == (0.2, 0.05, 4.0)
    lost = measurement("snapkv", failed="out of memory")
    assert lost.step_seconds is lost.floor_seconds is lost.times_floor is None
    kept = json.loads(json.dumps(bench.figures(BenchResult(1e9, [four, lost], {"device": "a card"}))))
    assert kept["bandwidth"] == 1e9 and kept["environment"] == {"device": "a card"}
    assert kept["measurements"][0]["times_floor"] == 4.0 and kept["measurements"][0]["decode_ratio"] is None
    assert kept["measurements"][0]["overhead_share"] == 0.5 and kept["measurements"][1]["failed"] == "out of memory"


def test_steadiness_compares_what_comes_after_the_cache_is_full_with_the_end():
    gaps = [9.0] * 6 + [1.0] * 12 + [2.0] * 6
    run = bench.decoding.Run(0.0, 0.0, gaps, 0, [1, 2, 3, 4, 5] + [6] * 19, None)
    assert run.steadiness == 0.5  # two gaps of 1 after the six of the filling, two of 2 at the end
    growing = bench.decoding.Run(0.0, 0.0, gaps, 0, list(range(24)), None)
    assert growing.steadiness == 4.5
    assert bench.decoding.Run(0.0, 0.0, [1.0] * 5, 0, [1] * 5, None).steadiness is None


def test_a_long_decoding_holds_what_it_held_when_full(model, clock):
    request = BenchRequest(("ems",), ("12",), (40,), new_tokens=60, repeats=1, decoding={"buffer": 8})
    alone = dataclasses.replace(request, full=(), new_tokens=3)
    (only,) = bench.run_bench(model, 4096, None, alone).measurements
    assert only.method == "ems" and bench.comparison(BenchResult(1.0, [only], {}))[0].decode_ratio is None
    full, ems = bench.run_bench(model, 4096, None, request).measurements
    assert full.largest_cache_bytes > full.cache_bytes and ems.largest_cache_bytes < full.largest_cache_bytes
    heads = LAYERS * KV_HEADS
    assert ems.largest_cache_bytes < heads * (12 + 2 * SLACK) * (ROW_BYTES + 12) + LAYERS * 9 * 4 * KV_HEADS * 4 * 64
    assert full.steadiness == ems.steadiness == 1


def test_overhead_share():
    assert measurement("snapkv", prefill_seconds=2.0, overhead_seconds=0.5).overhead_share == 0.25
    assert measurement("snapkv", failed="out of memory").overhead_share is None


@given(limit=st.integers(0, 300), at_most=st.integers(1, 300), precision=st.sampled_from([0.0, 0.02, 0.3]))
def test_the_largest_that_works_is_found(limit, at_most, precision):
    tried = []

    def work(number):
        assert 1 <= number <= at_most and number not in tried
        tried.append(number)
        return f"result of {number}" if number <= limit else None

    best, result = bench.largest_batch.largest_that_works(work, at_most, precision)
    largest = min(limit, at_most)
    assert best <= largest and largest - best < max(1, precision * best)
    assert result == (f"result of {best}" if best else None)


@pytest.mark.parametrize("method", ["full", "headkv"])
def test_copies_of_a_prompt_decode_as_the_prompt_does(model, clock, method):
    profile, inputs = random_profile(model), []
    request = dataclasses.replace(REQUEST, methods=("headkv",))
    case = next(each for each in bench.cases.all_cases(model, 64, profile, request) if each.method == method)
    ids = bench.cases.random_ids(model, 1, 24, seed=3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if method == "full":
        expected = model.generate(ids, **options)
    else:
        with compressed(model, profile, method=method, budget=12):
            expected = model.generate(ids, **options)
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]) if args[0].shape[0] == 3 else None)
    decoded = bench.largest_batch.decode_copies(model, case, ids, 3, 6, None)
    assert decoded.rate == 3 / TOKEN_SECONDS
    rows = 24 * ROW_BYTES if method == "full" else (12 + SLACK) * (ROW_BYTES + 4)
    assert decoded.cache_bytes == 3 * LAYERS * KV_HEADS * rows
    assert torch.equal(torch.cat(inputs, dim=1), expected[:, 24:-1].expand(3, -1))


def test_the_largest_batch_needs_cuda(model):
    with pytest.raises(UsageError, match="only be found on a CUDA device"):
        bench.largest_batches(model, 64, random_profile(model), REQUEST)


def test_the_largest_batch_is_where_memory_ends(model, clock, monkeypatch):
    decode = bench.largest_batch.decode_copies

    def scarce(model, case, ids, batch, *others):
        if batch > (13 if case.method == "headkv" else 0):
            cuda_is_full()
        return decode(model, case, ids, batch, *others)

    monkeypatch.setattr(bench.largest_batch, "decode_copies", scarce)
    case = bench.cases.all_cases(model, 64, random_profile(model), REQUEST)[2]
    found = bench.largest_batch._largest_batch(model, case, REQUEST, at_most=100)
    assert (found.method, found.budget, found.length, found.batch) == ("headkv", "12", 24, 13)
    assert found.decode_rate == 13 / TOKEN_SECONDS
    assert found.cache_bytes == 13 * LAYERS * KV_HEADS * (12 + SLACK) * (ROW_BYTES + 4)
    none = bench.largest_batch._largest_batch(model, dataclasses.replace(case, method="other"), REQUEST, at_most=100)
    assert none.batch == 0 and none.decode_rate is none.cache_bytes is None


def test_the_static_caches_largest_batch_is_compiled_once(model, compilations, monkeypatch):
    """Uncompiled 11 fit here, compiled 10: one step for all the batches that are tried, then two that are compiled."""
    tried, decode = [], bench.largest_batch.decode_copies

    def scarce(model, case, ids, batch, new_tokens, chunk, compiling):
        tried.append((batch, compiling))
        if batch > (10 if compiling else 11):
            cuda_is_full()
        return decode(model, case, ids, batch, new_tokens, chunk, compiling)

    monkeypatch.setattr(bench.largest_batch, "decode_copies", scarce)
    case = bench.cases.Case("full", "", "sdpa", 24, step="compiled")
    found = bench.largest_batch._largest_batch(model, case, REQUEST, at_most=100)
    assert (found.batch, found.step) == (10, "compiled") and compilations == [10]
    assert tried[-2:] == [(11, True), (10, True)] and not any(compiling for _, compiling in tried[:-2])
    room = 24 + REQUEST.new_tokens + bench.full_cache.COMPILED_WARM_UP
    assert found.cache_bytes == 10 * LAYERS * KV_HEADS * room * ROW_BYTES


@pytest.mark.parametrize("compiling", [True, False])
def test_copies_in_a_static_cache_decode_as_the_prompt_does(model, compilations, compiling):
    ids, seen = bench.cases.random_ids(model, 1, 24, seed=3), []
    case = bench.cases.Case("full", "", "sdpa", 24, step="compiled")
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    argmax = torch.Tensor.argmax

    def watched(logits, *args, **options):
        chosen = argmax(logits, *args, **options)
        seen.append(chosen)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "argmax", watched)
        bench.largest_batch.decode_copies(model, case, ids, 3, 2, None, compiling)
    steps = bench.full_cache.COMPILED_WARM_UP + 1 if compiling else 1
    assert len(seen) == 1 + steps and len(compilations) == compiling
    copies = torch.cat(seen[1:], dim=1)
    assert torch.equal(copies, expected[:, 25 : 25 + steps].expand(3, -1))


def test_largest_batches_beside_the_better_full_cache():
    sizes = [
        ("full", 8, 100.0),
        ("full", 8, 250.0),
        ("full", 9, None),
        ("ems", 8, 1000.0),
        ("ems", 9, 5.0),
        ("ems", 8, None),
    ]
    found = [bench.LargestBatch(method, "", "x", length, 1, rate) for method, length, rate in sizes]
    assert bench.beside_full(found) == [0.4, 1.0, None, 4.0, None, None]


def test_bandwidth_is_that_of_the_fastest_way_through_memory(monkeypatch):
    """Three ways: 6 bytes in a second, 30 in 3 and 12 in 2; the first time of each and one of the others are slow."""
    clock, paces = Clock(), iter([100] * 3 + [1] * 3 + [9] * 3 + [1] * 3)

    def going(seconds):
        def go():
            clock.pace = next(paces)
            clock.wait(seconds)

        return go

    monkeypatch.setattr(measure, "now", clock)
    monkeypatch.setattr(measure, "_ways_through_memory", lambda device: [(6, going(1)), (30, going(3)), (12, going(2))])
    assert measure.measure_bandwidth("cpu", repeats=3) == 10


def test_the_ways_through_memory_move_what_they_say(monkeypatch):
    """By the operators that run, and the bytes that these are given and make."""
    moved = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            given = [each for each in args if isinstance(each, torch.Tensor)]
            moved.append(sum(each.nbytes for each in given))
            return operator(*args, **(kwargs or {}))

    for count, go in measure._ways_through_memory(torch.device("cpu")):
        assert count >= 2 * 128 * 10**6
        moved.clear()
        with Watched():
            go()
        assert count <= sum(moved) <= 1.001 * count


def test_peak_memory_counts_what_was_freed_again():
    memory = measure.PeakMemory(torch.device("cpu"))
    if memory.used() is None:
        pytest.skip("this system keeps no record of the peak")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    used = memory.used()
    assert 60 << 20 < used < 200 << 20
    assert measure.PeakMemory(torch.device("cpu")).used() < 60 << 20


@pytest.mark.parametrize(("peak", "used"), [(9000, 5000), (4000, 0), (3000, 0), (None, None)])
def test_peak_memory_is_what_the_system_notes_beyond_what_was_there(monkeypatch, peak, used):
    monkeypatch.setattr(measure, "_restarted_resident_peak", lambda: 4000)
    memory = measure.PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(measure, "_process_bytes", {"VmHWM": peak, "VmRSS": 7}.get)
    assert memory.used() == used


@pytest.mark.parametrize("figures", [{}, {"VmRSS": 1 << 30}, {"VmRSS": 1 << 30, "VmHWM": 2 << 30}])
def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, figures):
    monkeypatch.setattr(measure, "_process_bytes", figures.get)
    assert measure.PeakMemory(torch.device("cpu")).used() is None


SMALL = {"num_hidden_layers": 2, "hidden_size": 288, "intermediate_size": 96, "vocab_size": 128}


@pytest.fixture(params=SHAPES)
def small_shape(request, monkeypatch):
    monkeypatch.setitem(SHAPES, request.param, SHAPES[request.param] | SMALL | {"initializer_range": 0.2})
    return request.param


def test_a_random_model_decodes_as_one_made_the_usual_way(small_shape):
    state = torch.random.get_rng_state()
    made = random_models.random_model(small_shape, torch.float32, "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    usual = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[small_shape])).eval()
    usual.load_state_dict(made.state_dict())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = bench.cases.random_ids(made, 2, 20, seed=0)
    assert torch.equal(made.generate(ids, **options), usual.generate(ids, **options))
    tied = SHAPES[small_shape]["tie_word_embeddings"]
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    weights = dict(made.named_parameters())
    assert all(weight.std() > 0 for name, weight in weights.items() if "norm" not in name)


def test_a_random_model_in_16_bits_has_exact_rotary_frequencies(small_shape):
    made = random_models.random_model(small_shape, torch.bfloat16, "cpu")
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16}
    shape = SHAPES[small_shape]
    half = torch.arange(0, shape["head_dim"], 2, dtype=torch.float64) / shape["head_dim"]
    expected = shape["rope_parameters"]["rope_theta"] ** -half
    torch.testing.assert_close(made.model.rotary_emb.inv_freq.double(), expected, rtol=1e-5, atol=0.0)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-8b", 8_190_735_360),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_shapes_have_as_many_parameters_as_the_published_models(name, parameters):
    model = random_models.random_model(name, torch.bfloat16, "meta")
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_a_random_model_runs_with_a_random_profile(small_shape):
    model = random_models.random_model(small_shape, torch.float32, "cpu")
    request = dataclasses.replace(REQUEST, methods=("headkv-r2",), lengths=(24,))
    result = bench.run_bench(model, 64, random_scores.random_profile(HeadShape.from_config(model.config)), request)
    assert not any(each.failed for each in result.measurements)


def test_an_unknown_shape():
    with pytest.raises(UsageError, match="no model shape 'gpt-5': choose one of llama-3-8b, mistral-7b"):
        random_models.random_model("gpt-5", torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(monkeypatch):
    monkeypatch.setitem(
        SHAPES,
        "smollm2-135m",
        SHAPES["smollm2-135m"] | {"num_hidden_layers": 2, "vocab_size": 512},
    )
    model = random_models.random_model("smollm2-135m", torch.bfloat16, "cuda")
    request = BenchRequest(("headkv-r2",), ("64",), lengths=(256, 1024), new_tokens=20, batch=2)
    result = bench.run_bench(model, 8192, random_scores.random_profile(HeadShape.from_config(model.config)), request)
    for each in result.measurements:
        assert each.failed == "" and each.peak_bytes >= each.cache_bytes > 0 and each.decode_rate > 0
        assert 0 < each.overhead_share < 1 or each.method == "full"
    assert [each.step for each in result.measurements] == ["eager", "compiled", "auto"] * 2
    assert result.environment["device"] == torch.cuda.get_device_name()
    for each in bench.largest_batches(
        model, 8192, random_scores.random_profile(HeadShape.from_config(model.config)), request, at_most=4
    ):
        assert each.batch == 4 and each.decode_rate > 0 and each.cache_bytes > 0


def test_the_command_prints_a_table_and_keeps_all_figures(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["bench", "generate", "--model", str(tiny_folder), "--methods", "snapkv,knorm", "--budgets", "8"]
    options += ["--lengths", "40", "--new-tokens", "3", "--repeats", "1", "--set", "sinks=2"]
    with pytest.raises(SystemExit) as ended:
        main([*options, "-o", "figures.json"])
    shown = capsys.readouterr()
    assert ended.value.code == 0 and "GB/s" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()] == ["cache", "full", "snapkv", "knorm"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"] == "tiny-llama" and len(figures["measurements"]) == 3
    with pytest.raises(SystemExit):
        main([*options, "--json"])
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "gpt-5"), "gpt-5"),
        (("--shape", "smollm2-135m", "--dtype", "int4"), "There is no dtype 'int4': choose one of auto, float32"),
        (("--methods", "magic"), "There is no method 'magic'"),
        (("--profile", "absent.safetensors"), "There is no profile file at absent.safetensors"),
        (("--shape", "smollm2-135m", "--profile", "absent.safetensors"), "leave --profile or --shape away"),
        (("--largest-batch", "--lengths", "40", "--repeats", "1", "--new-tokens", "2"), "CUDA"),
    ],
)
def test_mistakes_get_one_sentence(tiny_folder, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "generate", "--model", str(tiny_folder), "--methods", "snapkv", "--budgets", "8", *arguments])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert message in shown.err and len(shown.err.strip().splitlines()) == 1


def test_a_random_model_is_loaded_by_its_shape(small_shape):
    loaded = random_models.load_random(small_shape, device="cpu")
    profile = random_scores.random_profile(loaded.shape)
    assert loaded.name == small_shape and loaded.dtype == torch.float32 and profile.shape == loaded.shape
    published = SHAPES[small_shape]["max_position_embeddings"]
    assert loaded.max_positions == published
    longer = random_models.load_random(small_shape, device="cpu", max_positions=published + 5)
    assert longer.max_positions == longer.model.config.max_position_embeddings == published + 5
    shorter = random_models.load_random(small_shape, device="cpu", max_positions=7)
    assert shorter.max_positions == published


@given(st.text())
def test_the_tokenizer_of_bytes_has_exact_offsets(text):
    tokenizer = random_models.byte_tokenizer()
    assume(not any(token in text for token in tokenizer.all_special_tokens))  # each of which is one token
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.offset_mapping == [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]
    assert tokenizer.decode(encoded.input_ids) == text


def test_the_tokenizer_of_bytes_is_small_and_plain():
    tokenizer = random_models.byte_tokenizer()
    assert len(tokenizer) == 259 and tokenizer.chat_template is None
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a</s>b", add_special_tokens=False).input_ids[1] == 2


@given(st.lists(st.integers(-3, 9), max_size=4), st.integers(-1, 5))
def test_numbers_that_are_too_small_are_named(values, lowest):
    if values and min(values) >= lowest:
        measure.require_at_least(lowest, new_lengths=values)
        return
    named = f"--new-lengths {min(values)} is too small: give at least {lowest}" if values else "nothing to run without"
    with pytest.raises(UsageError, match=named):
        measure.require_at_least(lowest, repeats=9, new_lengths=values)


def test_the_first_time_does_not_count(monkeypatch):
    clock = iter([0, 100, 100, 300, 300, 301, 301, 303, 303, 308, 308, 312, 312, 313, 313, 316])
    monkeypatch.setattr(measure, "now", lambda device: next(clock))
    done = []
    works = [lambda: done.append("a"), lambda: done.append("b")]
    assert measure.median_seconds(works, 3, torch.device("cpu")) == [1, 3]
    assert done == ["a", "b"] * 4
