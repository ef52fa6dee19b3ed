"""Decode steps that run by themselves: recorded once and replayed, or compiled, they are the plain ones."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from weakref import WeakSet, ref

import pytest
import torch
import torch._dynamo.testing
from support.devices import on_cuda
from support.host_reads import device_watched
from support.profiles import random_profile
from support.prompts import random_ids
from support.recording import record
from support.tiny_models import tiny_model

from headprof import compressed
from headprof.compression import cuda_graphs, decode_steps, step_cache
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.storage import RowStorage
from headprof.compression.session import make_plan, prefill
from headprof.errors import ModelError

ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma2", "phi3"]
LOW = "lowrank:key_rank=0.1:value_rank=0.1:heads=1"
LATENT = "latent:rank=0.1:heads=1:group_size=4"
METHODS = ["headkv-r2", "snapkv", "headkv-ems", "h2o", "adakv", "tova", "knorm", "headkv-r2-int4", LOW, LATENT]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Recordings:
    """Counts what is recorded, in the place of CUDA graphs."""

    def __init__(self):
        self.count = 0

    def __call__(self, function):
        self.count += 1
        return record(function)


@pytest.fixture
def recordings(monkeypatch):
    made = Recordings()
    monkeypatch.setattr(decode_steps, "recording_for", lambda model: made)
    monkeypatch.setattr(decode_steps, "_trusted", {})
    # As on a GPU, where attention goes by what the device knows.
    monkeypatch.setattr(RowStorage, "in_use", property(lambda self: None))
    return made


def decoded(model, ids, count, cache):
    """Greedy tokens and their logits, step by step, and where the cache's buffers were in each."""
    logits, addresses = [prefill(model, ids, cache)], []
    for _ in range(count):
        token = logits[-1].argmax(dim=-1, keepdim=True)
        logits.append(model(token, past_key_values=cache).logits[:, -1])
        addresses.append([each.data_ptr() for layer in cache.head_layers for each in addressed(layer)])
    return torch.stack(logits), addresses


def addressed(layer):
    rows = layer.storage.in_place()
    return [*layer.storage.rows.tensors, rows.bounds, rows.next_positions, *layer.held.recent.tensors]


def layouts_of(method):
    """On a CPU, rows of which none has merged yet have no column for what merged rows stand for."""
    return 2 if "ems" in method else 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_are_the_plain_ones(arch, method, recordings):
    """Over several compressions, in which nothing moves."""
    model, ids = tiny_model(arch, num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, random_profile(model), method=method, budget=12, buffer=16, step=step) as plan:
            made[step], addresses = decoded(model, ids, 70, HeadCache(plan))
    assert torch.equal(made["auto"], made["eager"])
    assert recordings.count <= layouts_of(method)
    assert len({tuple(each) for each in addresses[5:]}) <= layouts_of(method)


def test_all_of_a_method_may_move_and_is_recorded_anew(recordings):
    """A share of what has been read needs more room as that grows."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 60)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, method="snapkv", budget="40%", buffer=8, step=step) as plan:
            made[step], _ = decoded(model, ids, 80, HeadCache(plan))
    assert torch.equal(made["auto"], made["eager"])
    assert 2 <= recordings.count < 10


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_replays_steps_and_says_the_same(batch, recordings):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(batch, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    said = {}
    for step in ("eager", "auto"):
        with compressed(model, method="snapkv", budget=12, buffer=16, step=step):
            said[step] = model.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert torch.equal(said["auto"], said["eager"])
    assert recordings.count == 1


def test_a_prompt_of_one_token_is_no_decode_step(recordings):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, method="snapkv", budget=12, buffer=16, step=step) as plan:
            decoded(model, ids, 20, HeadCache(plan))
            made[step], _ = decoded(model, ids[:, :1], 40, HeadCache(plan))
    torch.testing.assert_close(made["auto"], made["eager"])


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"method": "knorm"}, {"method": "snapkv"}),
        ({"method": "knorm"}, {"method": "h2o"}),
        ({"method": "snapkv", "buffer": None}, {"method": "snapkv", "buffer": 8}),
        ({"method": "snapkv", "window": 4, "keep_last": 4}, {"method": "snapkv", "window": 16, "keep_last": 4}),
    ],
)
def test_a_cache_that_goes_on_by_another_plan_is_recorded_anew(first, then, recordings):
    """Another plan may remember queries that the one before had no use for."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, budget=24, step=step, **first) as plan:
            cache = HeadCache(plan)
            logits, _ = decoded(model, ids, 10, cache)
            cache.continue_with(make_plan(model, budget=24, **then))
            token, made[step] = logits[-1].argmax(dim=-1, keepdim=True), [logits[-1]]
            for _ in range(90):
                made[step].append(model(token, past_key_values=cache).logits[:, -1])
                token = made[step][-1].argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.stack(made["auto"]), torch.stack(made["eager"]))
    assert recordings.count >= 2


def test_rings_of_unequal_rooms_are_each_gone_round(recordings):
    """A window makes the first layer's budget smaller, so its queries are forgotten sooner than the other layer's."""
    model, ids = tiny_model("gemma2", layers=2, sliding_window=8), random_ids(1, 20)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, method="expected-attention", budget=100, buffer=40, step=step) as plan:
            cache, made[step] = HeadCache(plan), []
            prefill(model, ids, cache)
            for i in range(150):
                model(ids[:, i % 20, None], past_key_values=cache)
                made[step].append([layer.held.recent.joined()[0] for layer in cache.head_layers])
                made[step][-1] = [None if each is None else each.clone() for each in made[step][-1]]
    rooms = [layer.held.recent.room for layer in cache.head_layers]
    assert rooms[0] != rooms[1]
    for one, other in zip(made["auto"], made["eager"], strict=True):
        torch.testing.assert_close(one, other)


def test_a_cache_that_is_gone_is_not_kept_for_its_recording(recordings):
    """From the next pass on, so that a prompt is not read beside the last one's cache."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    with compressed(model, method="snapkv", budget=12, buffer=16) as plan:
        cache = HeadCache(plan)
        decoded(model, ids, 20, cache)
        cache_there, rows_there = ref(cache), ref(cache.head_layers[0].storage.rows.keys)
        del cache
        gc.collect()
        assert cache_there() is None
        model(ids, past_key_values=HeadCache(plan))
        gc.collect()
        assert rows_there() is None
    assert recordings.count == 1


def test_too_few_ids_are_refused_as_in_a_plain_step(recordings):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(3, 40)
    with compressed(model, method="snapkv", budget=12, buffer=16) as plan:
        cache = HeadCache(plan)
        decoded(model, ids, 20, cache)
        with pytest.raises(RuntimeError):
            model(ids[:1, :1], past_key_values=cache)
    assert recordings.count == 1


def test_hooks_inside_the_model_run_in_every_step(recordings):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    ran = 0

    def count(*_):
        nonlocal ran
        ran += 1

    with compressed(model, method="snapkv", budget=12, buffer=16) as plan:
        cache = HeadCache(plan)
        decoded(model, ids, 10, cache)
        hook = model.model.layers[0].mlp.register_forward_hook(count)
        for i in range(7):
            model(ids[:, i, None], past_key_values=cache)
        hook.remove()
        model(ids[:, :1], past_key_values=cache)
    assert ran == 7 and recordings.count == 1


def test_a_model_that_takes_numbers_from_the_host_is_found_out(recordings, monkeypatch, caplog):
    """A number that the host put into the recording is right in the recorded step alone."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    plain = type(model.model).forward

    def counting(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1 + 0.01 * kwargs["past_key_values"].told)
        return output

    monkeypatch.setattr(HeadCache, "told", property(lambda self: self.get_seq_length()), raising=False)
    monkeypatch.setattr(step_cache.StepCache, "told", property(lambda self: int(self.get_seq_length())), raising=False)
    monkeypatch.setattr(type(model.model), "forward", counting)

    def made(step, count):
        with compressed(model, method="snapkv", budget=12, buffer=16, step=step) as plan:
            return decoded(model, ids, count, HeadCache(plan))[0]

    for count in (4, 4, 20, 20, 20):  # a step that is run once tells nothing, nor is a model ever trusted that was not
        assert torch.equal(made("auto", count), made("eager", count))
    assert recordings.count == 5
    assert caplog.text.count("they answer otherwise") == 3
    with pytest.raises(ModelError, match=r"cannot be run as step='compiled' asks \(captured, they answer otherwise\)"):
        monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
        made("compiled", 20)


def test_what_cannot_be_captured_runs_plainly(monkeypatch, caplog):
    def refusing(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_steps, "recording_for", lambda model: refusing)
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "auto"):
        with compressed(model, method="snapkv", budget=12, buffer=16, step=step) as plan:
            made[step], _ = decoded(model, ids, 20, HeadCache(plan))
    assert torch.equal(made["auto"], made["eager"])
    assert caplog.text.count("cannot be captured") == 1


def test_the_model_is_as_it_was(recordings):
    model = tiny_model(num_kv_heads=2, layers=2)
    before = dict(vars(model))
    with compressed(model, method="snapkv", budget=12):
        assert "forward" in vars(model)
    assert vars(model) == before


def waits_of_ours(watched):
    """Where code of this package waited; Transformers looks once whether a mask hides anything."""
    return [place for place in watched.waits if "/headprof/" in place]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("method", ["headkv-r2", "headkv-ems", "h2o", "adakv", "tova"])
def test_a_prompt_is_compressed_with_one_look_and_steps_without(arch, method, masked, monkeypatch):
    """Fifty steps, with several compressions."""
    monkeypatch.setattr(RowStorage, "in_use", property(lambda self: None))
    model, ids = tiny_model(arch, num_kv_heads=2, layers=2), random_ids(1, 60)
    mask = torch.ones_like(ids) if masked else None
    with compressed(model, random_profile(model), method=method, budget=12, buffer=16, step="eager") as plan:
        decoded(model, ids, 50, HeadCache(plan))  # the first passes are looked at, and plans are made
        cache, hosts = HeadCache(plan), [plan.scores, *(each.tokens for each in plan._known)]
        with device_watched(hosts) as watched:
            model(ids, past_key_values=cache, attention_mask=mask, logits_to_keep=1)
        assert len(waits_of_ours(watched)) <= masked
        with device_watched(hosts) as watched:
            for i in range(50):
                model(ids[:, i : i + 1], past_key_values=cache)
        assert watched.waits == []


def test_a_step_that_waits_is_seen(monkeypatch):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 60)
    plain = RowStorage.append

    def waiting(self, key_states, value_states):
        plain(self, key_states, value_states)
        self.in_place().next_positions[0].item()

    monkeypatch.setattr(RowStorage, "append", waiting)
    with compressed(model, method="snapkv", budget=12, step="eager") as plan:
        decoded(model, ids, 2, cache := HeadCache(plan))
        with device_watched([plan.scores]) as watched:
            model(ids[:, :1], past_key_values=cache)
    assert len(watched.waits) == 2


COMPILED = {
    "llama": "headkv-ems",
    "qwen3": "headkv-r2",
    "mistral": "h2o",
    "gemma2": "snapkv",
    "phi3": "headkv-r2-int4",
    "gemma3": LATENT,
}


@pytest.mark.parametrize(("arch", "method"), COMPILED.items())
def test_compiled_steps_are_the_plain_ones(arch, method, monkeypatch):
    """300 steps with several compressions: the whole step is one graph, compiled once or twice."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiling = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compiling(model, backend=counter, fullgraph=fullgraph)
    )
    monkeypatch.setattr(decode_steps, "_trusted", {})
    model, ids = tiny_model(arch, num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "compiled"):
        torch._dynamo.reset()
        with compressed(model, random_profile(model), method=method, budget=12, buffer=64, step=step) as plan:
            made[step], addresses = decoded(model, ids, 300, HeadCache(plan))
    assert torch.equal(made["compiled"].argmax(-1), made["eager"].argmax(-1))
    torch.testing.assert_close(made["compiled"], made["eager"])
    assert 1 <= counter.frame_count <= 2
    assert len({tuple(each) for each in addresses[5:]}) <= layouts_of(method)


def test_compiled_steps_are_captured_too(recordings, monkeypatch):
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: compiling(model, backend="eager"))
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    made = {}
    for step in ("eager", "compiled"):
        torch._dynamo.reset()
        with compressed(model, random_profile(model), method="headkv-r2", budget=12, buffer=16, step=step) as plan:
            made[step], _ = decoded(model, ids, 60, HeadCache(plan))
    torch.testing.assert_close(made["compiled"], made["eager"])
    assert recordings.count == 1


@pytest.mark.long
@pytest.mark.parametrize("limit", [8, 1])
def test_what_was_compiled_serves_caches_of_all_sizes(limit, monkeypatch):
    """Beyond as many kinds of them as PyTorch compiles a function for, it begins anew."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiling = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compiling(model, backend=counter, fullgraph=fullgraph)
    )
    monkeypatch.setattr(decode_steps, "_trusted", {})
    torch._dynamo.reset()
    model, counts = tiny_model(num_kv_heads=2, layers=2), {}
    with torch._dynamo.config.patch(recompile_limit=limit):
        for method in ("headkv-r2", "headkv-ems"):
            with compressed(
                model, random_profile(model), method=method, budget="20%", buffer=16, step="compiled"
            ) as plan:
                for tokens in (40, 57, 121, 333):
                    ids = random_ids(1, tokens)
                    made, _ = decoded(model, ids, 8, HeadCache(plan))
                    with compressed(model, random_profile(model), method=method, budget="20%", buffer=16, step="eager"):
                        plain, _ = decoded(model, ids, 8, HeadCache(plan))
                    torch.testing.assert_close(made, plain)
                    counts[method, tokens] = counter.frame_count
    if limit == 8:
        assert counts["headkv-r2", 333] <= 2 and counts["headkv-ems", 333] <= 4


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arch", "method"), [*((arch, "headkv-r2") for arch in ARCHITECTURES), *(("llama", name) for name in METHODS[1:])]
)
def test_graphs_are_the_plain_steps(arch, method, dtype, caplog):
    model = tiny_model(arch, num_kv_heads=2, layers=2).to("cuda", dtype)
    ids, made = random_ids(2, 40).cuda(), {}
    for step in ("eager", "graph"):
        with compressed(model, random_profile(model), method=method, budget=12, buffer=16, step=step) as plan:
            for prompt in range(3):  # one after the other, as in an evaluation
                made[step, prompt], addresses = decoded(model, ids.roll(prompt), 70, HeadCache(plan))
                assert len({tuple(each) for each in addresses[5:]}) == 1
    assert all(torch.equal(made["graph", prompt], made["eager", prompt]) for prompt in range(3))
    assert not caplog.text


class Pools:
    """The rule of PyTorch's allocator for memory that graphs share: once all of a pool are gone, none may join it."""

    def __init__(self):
        self.graphs, self.streams = {}, set()

    def new_graph(self):
        return Graph(self)

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        if pool is None:
            pool = len(self.graphs)
        elif not self.graphs[pool]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs.setdefault(pool, WeakSet()).add(graph)
        self.streams.add(stream)
        graph.number = pool
        yield


class Graph:
    def __init__(self, pools):
        self.pools, self.number = pools, None

    def pool(self):
        return self.number

    def replay(self):
        pass


def test_graphs_follow_one_another_in_one_pool_and_stream(monkeypatch):
    pools = Pools()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", pools.new_graph)
    monkeypatch.setattr(torch.cuda, "graph", pools.graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    graphs = cuda_graphs.CudaGraphs(torch.device("cpu"))
    for number in range(3):
        replay, output = graphs(lambda number=number: torch.tensor(number))
        assert output == number
        del replay
        gc.collect()
    assert len(pools.graphs) == len(pools.streams) == 1


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method, caplog):
    """Neither fifty steps, nor the compressions between them, nor reading a prompt."""
    model = tiny_model(num_kv_heads=2, layers=2).to("cuda", torch.bfloat16)
    ids = random_ids(1, 40).cuda()
    with compressed(model, random_profile(model), method=method, budget=12, buffer=16) as plan:
        for mode in ("default", "error"):  # the first run prepares kernels, and compares
            cache = HeadCache(plan)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                prefill(model, ids, cache)
                for i in range(60):
                    model(ids[:, i % 40, None], past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert not caplog.text  # steps were not run plainly


@on_cuda
@pytest.mark.gpu
def test_compiled_steps_are_the_plain_ones_on_a_gpu():
    model = tiny_model(num_kv_heads=2, layers=2).to("cuda")
    ids, made = random_ids(1, 40).cuda(), {}
    for step in ("eager", "compiled"):
        with compressed(model, random_profile(model), method="headkv-r2", budget=12, buffer=16, step=step) as plan:
            made[step], _ = decoded(model, ids, 60, HeadCache(plan))
    torch.testing.assert_close(made["compiled"], made["eager"], atol=2e-3, rtol=2e-3)


@pytest.mark.model
@pytest.mark.slow
def test_a_real_models_steps_compile_and_replay(smollm2, recordings, monkeypatch):
    """300 steps of SmolLM2 with several compressions."""
    counter, compiling = torch._dynamo.testing.CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph: compiling(model, backend=counter, fullgraph=fullgraph)
    )
    model, made = smollm2.model, {}
    ids = torch.randint(0, 40_000, (1, 200), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    for step in ("eager", "auto", "compiled"):
        if step == "compiled":  # which a CPU does not capture
            monkeypatch.setattr(decode_steps, "recording_for", lambda model: None)
        with compressed(model, random_profile(model), method="headkv-r2", budget=64, buffer=64, step=step) as plan:
            made[step], addresses = decoded(model, ids, 300, HeadCache(plan))
        assert step == "eager" or len({tuple(each) for each in addresses[5:]}) == 1
    for step in ("auto", "compiled"):  # rounding differs with the free space behind the rows, which is padding here
        assert torch.equal(made[step].argmax(-1), made["eager"].argmax(-1))
        torch.testing.assert_close(made[step], made["eager"], atol=1e-4, rtol=1e-4)
    assert 1 <= counter.frame_count <= 2
