"""What is generated is compressed too: bounded rows and memory, the same rows however tokens come, and H2O in loops."""

import gc
from dataclasses import dataclass, field

import pytest
import torch
from support.observations import observed_prompt
from support.profiles import judging, random_profile
from support.prompts import GREEDY, distinct_ids, left_padded, padded_ids, random_ids
from support.tiny_models import ARCHITECTURES, three_layers, tiny_model
from support.unlike import UNLIKE

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.held_rows import FOLD
from headprof.compression.document import load_document, save_document
from headprof.compression.encoding import question_ids
from headprof.compression.generation import compress_document, generate_text
from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.merging import EvictThenMerge
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import Assessment, AttentionLayer
from headprof.compression.methods.received_attention import Accumulated
from headprof.compression.methods.reduction import Evict
from headprof.compression.methods.table import METHODS
from headprof.compression.plan import CompressionPlan
from headprof.compression.rows import COLUMNS
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, UsageError
from headprof.models.shape import HeadShape

SHARING = ("adakv", "adakv-kvzip", "kvzap")  # methods whose heads share a layer's rows anew each time
MERGING = {"threshold": 0.3, "candidates": 8.0, "coverage": 1.0, "redundancy": 0.0, "merge_keys": True, "mass": True}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ROUNDED = {"atol": 5e-3, "rtol": 1e-2}  # the last bit of a key may decide how it is rounded
TURNED = {"atol": 1.5e-2, "rtol": 1e-2}  # or which way a basis points, where singular values are nearly alike


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tolerance(name):
    """How far logits may be apart where rows have been packed otherwise in their last bits."""
    held = METHODS[name].representation
    return CLOSE if held.is_full else TURNED if held.needs_turning else ROUNDED


def options_of(name):
    """Parameters under which `name` merges, whatever its defaults, and keeps few rows in any case."""
    return MERGING if "ems" in name else {"sinks": 1} if METHODS[name].always_kept > 8 else {}


def plan_for(model, name, budget=12, buffer=8, **options):
    options = options_of(name) | options
    how = {"method": name, "budget": budget, "buffer": buffer} | judging(model, name) | options
    return make_plan(model, random_profile(model), **how)


def filled(model, name, ids, budget=12, buffer=8, **options):
    """A cache that has read a prompt."""
    cache = HeadCache(plan_for(model, name, budget, buffer, **options))
    prefill(model, ids, cache)
    return cache


def step(model, cache, ids, **options):
    """Feed tokens `[B, Q]`; logits `[B, Q, vocabulary]`."""
    return model(ids, past_key_values=cache, **options).logits


def head_positions(cache):
    """The places of the rows of each head, by layer."""
    held = []
    for layer in cache.head_layers:
        rows = layer.storage.compact()
        held.append([part.tolist() for part in rows.positions.split(rows.lengths)])
    return held


def check_same(one, other):
    """Two caches hold the same rows."""
    assert one.get_seq_length() == other.get_seq_length()
    assert head_positions(one) == head_positions(other)
    for layer, twin in zip(one.head_layers, other.head_layers, strict=True):
        check_same_layer(layer, twin)


def check_same_layer(layer, twin):
    rows, twins = layer.storage.compact(), twin.storage.compact()
    torch.testing.assert_close(rows.keys, twins.keys, **CLOSE)
    torch.testing.assert_close(rows.values, twins.values, **CLOSE)
    for name in COLUMNS:
        torch.testing.assert_close(rows.column(name), twins.column(name), **CLOSE)


# Bounds.


@pytest.mark.parametrize("name", [name for name in UNLIKE if not METHODS[name].recall.is_on])
def test_a_long_generation_runs_in_constant_memory(name):
    model, buffer, prompt = tiny_model(num_kv_heads=2, layers=2), 8, 30
    ids = random_ids(1, prompt + 210)
    with attending_ragged(model):
        cache = filled(model, name, ids[:, :prompt], 12, buffer)
        targets = cache.plan.decode_allocation(prompt)  # [L, K]
        keep_last, compressions, at_compression, most = cache.plan.method.keep_last, 0, [], []
        for seen in range(prompt + 1, prompt + 211):
            before = cache.lengths
            step(model, cache, ids[:, seen - 1 : seen])
            now = cache.lengths
            assert cache.get_seq_length() == seen
            assert (now[:, 0].sum(-1) <= (targets + buffer).sum(-1)).all()
            assert name in SHARING or (now[:, 0] <= targets + buffer).all()
            for layer_before, layer_now, target in zip(before, now, targets, strict=True):
                if torch.equal(layer_now, layer_before + 1):
                    continue
                assert int((layer_now - 1).sum()) == int(target.sum())
                if name not in SHARING:
                    assert torch.equal(layer_now[0] - 1, target)
            if not torch.equal(now, before + 1):
                compressions += 1
                at_compression.append(cache.nbytes)
                most.append(0)
            if most:
                most[-1] = max(most[-1], cache.nbytes)
            for layer in head_positions(cache):
                for positions in layer:
                    assert positions == sorted(set(positions))
                    assert positions[-keep_last:] == list(range(seen - keep_last, seen))
                    assert positions[: cache.plan.method.sinks] == list(range(cache.plan.method.sinks))
        assert 20 <= compressions <= 27
        assert len(set(at_compression[1:])) == 1 and max(most[1:]) == most[1]
        rows = int(cache.lengths.sum()) + buffer * cache.lengths.numel()
        assert cache.nbytes < 3 * rows * (2 * 16 * 4 + 3 * 4) + 30 * 2 * 64 * 4 * 2


def test_the_whole_cache_keeps_all_that_is_generated():
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 100)
    with attending_ragged(model):
        cache = filled(model, "full", ids[:, :30])
        step(model, cache, ids[:, 30:])
    assert (cache.lengths == 100).all()


@pytest.mark.parametrize(("name", "needed"), [("tova", 1), ("snapkv", 16)])
def test_queries_are_left_to_judge_by_where_most_of_a_pass_is_taken_out(name, needed):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 80)
    with attending_ragged(model):
        cache = filled(model, name, ids[:, :30], 24, 64)
        for i in range(30, 50):
            step(model, cache, ids[:, i : i + 1])
        step(model, cache, ids[:, 50:59])
        cache.crop(-6)
        assert remembered(cache) >= needed
        step(model, cache, ids[:, 59:60])
        assert remembered(cache) == needed


@pytest.mark.parametrize("name", ["ems", "snapkv", "adakv"])
@pytest.mark.parametrize("size", [1, 30])
def test_a_huge_buffer_costs_nothing_before_it_is_used(name, size):
    """Free space is at most what is held, or the usual buffer."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30 + 300)
    row = 2 * 16 * 4 + 3 * 4  # key and value of 16 numbers, position, bias and attention received
    with attending_ragged(model):
        cache, usual = (filled(model, name, ids[:, :30], 12, buffer) for buffer in (1_000_000, 64))
        copies, before = 0, cache.head_layers[0].storage
        for start in range(30, 330, size):
            step(model, cache, ids[:, start : start + size])
            remembered = sum(part.nbytes for layer in cache.head_layers for part in layer.held.recent.tensors)
            held = int(cache.lengths.sum())
            assert cache.nbytes - remembered <= row * max(2 * held, held + 64 * cache.lengths.numel())
            copies += cache.head_layers[0].storage is not before
            before = cache.head_layers[0].storage
        assert copies <= 5
        for start in range(30, 110, size):
            step(model, usual, ids[:, start : start + size])
        usual.continue_with(plan_for(model, name, buffer=1_000_000))
        step(model, usual, ids[:, :1])
        assert usual.nbytes < cache.nbytes


@pytest.mark.parametrize("prompt", [20, 30])
def test_a_usual_buffer_is_laid_out_at_once(prompt):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, prompt + 200)
    with attending_ragged(model):
        cache = filled(model, "snapkv", ids[:, :prompt], 12, 64)
        storages = set()
        for i in range(prompt, prompt + 200):
            step(model, cache, ids[:, i : i + 1])
            storages.add(cache.head_layers[0].storage)
            bounds = cache.head_layers[0].storage.in_place().bounds
            assert bounds[::2].diff().max() <= 12 + 64
    assert len(storages) == 2  # as it came from the prompt, and wider; compressed, rows take the place of those before


@pytest.mark.parametrize("name", ["ems", "h2o", "snapkv"])
def test_nothing_else_grows_with_what_is_generated(name):
    """Bytes of all live tensors after each dozen of compressions, found by the garbage collector."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30 + 3 * 96)

    def live_bytes():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch.strided]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    with attending_ragged(model):
        cache = filled(model, name, ids[:, :30])
        live = []
        for start in range(30, ids.shape[1], 96):
            for i in range(start, start + 96, 8):
                step(model, cache, ids[:, i : i + 8])
            live.append(live_bytes())
    assert live[2] == live[1]


@pytest.mark.parametrize("name", ["ems", "h2o"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_decodes_in_bounded_rows(arch, name):
    """Sliding windows, softcaps and all; several tokens at once and one by one."""
    model, ids = three_layers(arch, 2), distinct_ids(2, 30 + 48, seed=1)
    with attending_ragged(model):
        single, chunked = (filled(model, name, ids[:, :30]) for _ in range(2))
        for start in range(30, ids.shape[1], 4):
            one = torch.cat([step(model, single, ids[:, i : i + 1]) for i in range(start, start + 4)], dim=1)
            many = step(model, chunked, ids[:, start : start + 4])
            assert (single.lengths <= 20).all()
            torch.testing.assert_close(many, one, **CLOSE)
        check_same(single, chunked)


@pytest.mark.parametrize("name", [name for name in UNLIKE if name != "latent"])  # which the last bit may turn
def test_tokens_one_by_one_equal_chunks_of_the_buffer(name):
    model, ids = tiny_model(num_kv_heads=2, layers=3), distinct_ids(2, 30 + 8 * 7)
    with attending_ragged(model):
        single, chunked = (filled(model, name, ids[:, :30]) for _ in range(2))
        for start in range(30, ids.shape[1], 8):
            one = torch.cat([step(model, single, ids[:, i : i + 1]) for i in range(start, start + 8)], dim=1)
            many = step(model, chunked, ids[:, start : start + 8])
            torch.testing.assert_close(many, one, **tolerance(name))
            check_same(single, chunked)
    targets = single.plan.decode_allocation(86).view(-1, 3, 2)[0]  # of the first sequence
    assert name in SHARING or (single.lengths[:, 0] == targets + 8).all()


@pytest.mark.parametrize("name", UNLIKE)
def test_a_chunk_beyond_the_buffer_is_read_whole_and_compressed_before_the_next(name):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 100)
    with attending_ragged(model):
        cache = filled(model, name, ids[:, :30])
        targets = cache.lengths
        step(model, cache, ids[:, 30:60])
        assert torch.equal(cache.lengths, targets + 30)
        step(model, cache, ids[:, 60:61])
        assert torch.equal(cache.lengths.sum(-1), (targets + 1).sum(-1))
        assert min(positions[-2] for layer in head_positions(cache) for positions in layer) == 59


@pytest.mark.parametrize("name", UNLIKE)
def test_a_batch_equals_each_sequence_alone(name):
    model, ids = tiny_model(num_kv_heads=2, layers=2), distinct_ids(2, 30 + 40)
    with attending_ragged(model):
        batch = filled(model, name, ids[:, :30])
        alone = [filled(model, name, ids[entry : entry + 1, :30]) for entry in range(2)]
        for i in range(30, ids.shape[1]):
            together = step(model, batch, ids[:, i : i + 1])
            for entry in range(2):
                single = step(model, alone[entry], ids[entry : entry + 1, i : i + 1])
                close = tolerance(name) if METHODS[name].representation.needs_turning else CLOSE
                torch.testing.assert_close(together[entry], single[0], **close)
        check_same(batch, stack_caches(alone))


# Queries are forgotten before the next compression, as soon as what they paid is added up.


def folding(monkeypatch, count):
    """Fold whenever so many queries are more than need be at hand."""
    monkeypatch.setattr("headprof.compression.cache.held_rows.FOLD", count)


def remembered(cache):
    """Most queries that a layer remembers."""
    return max(len(layer.held.recent) if layer.is_initialized else 0 for layer in cache.head_layers)


COUNTING = {
    "h2o": {},
    "ems": {"window": 5},
    "headkv-ems": {"window": 3},
    "ems:combine=global": {"window": 4, "mass": False},
    "ems:combine=max:recency=1.0": {"window": 1, "threshold": 1.0},
}


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folding_changes_nothing(arch, name, monkeypatch):
    """Beside its twin, which remembers all queries up to the next compression; padding in prompt and chunks."""
    model, prompt, total = three_layers(arch, 2), 30, 30 + 96
    ids, mask = left_padded(distinct_ids(2, total, seed=2), [total, total - 9])
    mask[1, 56:58] = 0  # inside a chunk
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plan = plan_for(model, name, buffer=24, **COUNTING[name])
    early, late = HeadCache(plan), HeadCache(plan)
    window, compressions, most = COUNTING[name].get("window", 0), 0, {early: 0, late: 0}
    sizes = [1, 1, 3, 1, 4, 1, 1, 2, 6, 1, 1, 8, 1, 1]

    def feed(cache, start, stop, fold):
        folding(monkeypatch, fold)
        most[cache] = max(most[cache], remembered(cache))
        options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        return step(model, cache, ids[:, start:stop], **options)

    with attending_ragged(model):
        start, stop = 0, prompt
        while stop <= total:
            logits = [feed(early, start, stop, 2), feed(late, start, stop, 10**9)]
            seen = mask[:, start:stop].bool()
            torch.testing.assert_close(logits[0][seen], logits[1][seen], **CLOSE)
            assert torch.equal(logits[0][seen].argmax(-1), logits[1][seen].argmax(-1))
            assert head_positions(early) == head_positions(late)
            for layer, twin in zip(early.head_layers, late.head_layers, strict=True):
                if layer.storage.appended == stop - start:  # and nothing has been folded since
                    compressions += 1
                    check_same_layer(layer, twin)
            start, stop = stop, stop + sizes[(stop - prompt) % len(sizes)]
    assert compressions >= 3 * len(early.layers)
    assert most[early] <= window + 1 + max(sizes) and most[late] > 15


@pytest.mark.parametrize("name", ["h2o", "ems", "headkv-ems"])
def test_bytes_of_remembered_queries_are_bounded(name, monkeypatch):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30 + 140)
    window = 0 if name == "h2o" else 16
    row = 2 * 16 * 4 + 3 * 4  # key and value of 16 numbers, position, bias and attention received
    most = {}
    for fold in (FOLD, 10**9):
        folding(monkeypatch, fold)
        with attending_ragged(model):
            cache = filled(model, name, ids[:, :30], 12, 64)
            bound = int((cache.plan.decode_allocation(30) + 64).sum()) * row + 2 * (window + FOLD) * 4 * 16 * 4
            most[fold] = 0
            for i in range(30, ids.shape[1]):
                step(model, cache, ids[:, i : i + 1])
                most[fold] = max(most[fold], cache.nbytes)
    assert most[FOLD] <= bound < most[10**9]


@pytest.mark.parametrize("name", ["h2o", "ems"])
def test_tokens_of_the_last_pass_can_be_taken_out_without_a_trace(name, monkeypatch):
    """As when another model has guessed them, some wrongly."""
    folding(monkeypatch, 3)
    model, ids, guesses = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30 + 60), random_ids(1, 7, seed=7)
    options = {"window": 4} if name == "ems" else {}
    with attending_ragged(model):
        plain, cropped = (filled(model, name, ids[:, :30], buffer=20, **options) for _ in range(2))
        refused = 0
        for i in range(30, 90):
            step(model, plain, ids[:, i : i + 1])
            guessed = guesses if cropped.lengths.max() <= 32 - 8 else guesses[:, :0]  # else it is compressed earlier
            step(model, cropped, torch.cat([ids[:, i : i + 1], guessed], dim=1))
            cropped.crop(-guessed.shape[1])
            if plain.lengths.max() == 13:
                check_same(plain, cropped)
            for layer in cropped.head_layers:
                removable = layer.held.removable
                if removable < layer.storage.appended:
                    refused += 1
                    with pytest.raises(CacheError, match=f"Only the last {removable} tokens can be taken out"):
                        layer.crop(-removable - 1)
    assert refused > 40


@pytest.mark.parametrize("name", ["h2o", "ems"])
def test_stacked_caches_go_on_though_they_remember_unequally_many_queries(name, monkeypatch):
    folding(monkeypatch, 3)
    model, ids = tiny_model(num_kv_heads=2, layers=2), distinct_ids(3, 30 + 60)
    options = {"window": 4} if name == "ems" else {}
    plan = plan_for(model, name, buffer=20, **options)
    one, two = [0], [1, 2]
    with attending_ragged(model):
        alone = [HeadCache(plan), HeadCache(plan)]
        for cache, entries, size in zip(alone, (one, two), (1, 7), strict=True):
            prefill(model, ids[entries, :30], cache)
            for start in range(30, 44, size):
                step(model, cache, ids[entries, start : start + size])
        assert len({remembered(cache) for cache in alone}) == 2
        batch = stack_caches(alone)
        for i in range(44, 90):
            together = step(model, batch, ids[:, i : i + 1])
            for cache, entries in zip(alone, (one, two), strict=True):
                torch.testing.assert_close(together[entries], step(model, cache, ids[entries, i : i + 1]), **CLOSE)
        assert head_positions(batch) == head_positions(stack_caches(alone))


# Nothing lost.


@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "headkv-r2", "adakv"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_budget_for_all_that_is_read_and_written_gives_the_full_caches_tokens(arch, name):
    model = three_layers(arch, 2)
    ids, mask = padded_ids(2)
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 40}
    expected = model.generate(ids, **options)
    with compressed(model, random_profile(model), method=name, budget=80, buffer=8, **options_of(name)):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "snapkv", "adakv"])
def test_without_a_buffer_all_after_the_prompt_is_kept(name):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 130)
    with attending_ragged(model):
        whole = filled(model, name, ids[:, :30], buffer=None)
        roomy = filled(model, name, ids[:, :30], decode_budget=500)
        small = filled(model, name, ids[:, :30])
        kept = whole.lengths
        for start in range(30, 130, 5):
            logits = [step(model, cache, ids[:, start : start + 5]) for cache in (whole, roomy, small)]
            torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    assert torch.equal(whole.lengths, kept + 100) and torch.equal(roomy.lengths, whole.lengths)
    assert head_positions(whole) == head_positions(roomy)
    assert not torch.allclose(logits[2], logits[0], **CLOSE)
    assert all("received" not in layer.storage.rows.columns for layer in whole.head_layers)


# Budgets for generating.


@pytest.mark.parametrize(
    ("given", "per_head"),
    [
        (9, lambda seen: 9),
        (24, lambda seen: 24),
        ("50%", lambda seen: round(0.5 * seen)),
        (f"{20 * 2 * 2 * 16 * 2 * 4}B", lambda seen: 20),  # 20 tokens of 2 layers, 2 heads, keys and values, float32
    ],
)
@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "snapkv"])
def test_a_budget_of_its_own_for_generating(name, given, per_head):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 160)
    with attending_ragged(model):
        cache = filled(model, name, ids[:, :30], 14, 6, decode_budget=given)
        assert int(cache.lengths.sum()) == 14 * 4
        compressions = 0
        for seen in range(30, 160):
            before = cache.lengths
            step(model, cache, ids[:, seen : seen + 1])
            if not torch.equal(cache.lengths, before + 1):
                compressions += 1
                targets = cache.plan.decode_allocation(seen)
                for earlier, now, target in zip(before[:, 0], cache.lengths[:, 0], targets, strict=True):
                    assert torch.equal(now, earlier + 1) or torch.equal(now, earlier.minimum(target) + 1)
                assert int(targets.sum()) == 4 * per_head(seen)
    assert compressions >= 8


def test_rows_that_the_budget_for_generating_drops_at_once_are_judged_by_the_prompt():
    """The first new token finds the prompt's rows above their target, before any query came after the prompt."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 61)
    with attending_ragged(model):
        for name in ("snapkv", "tova"):
            cache = filled(model, name, ids[:, :60], 30, 4, decode_budget=10, sinks=1, keep_last=2)
            before = head_positions(cache)
            step(model, cache, ids[:, 60:])
            assert (cache.lengths == 11).all()
            first = [[positions[:8] for positions in layer] for layer in before]
            kept = [[positions[:8] for positions in layer] for layer in head_positions(cache)]
            assert kept != first, f"{name} has kept the oldest rows"


def test_a_budget_too_small_for_generating_is_refused_before_any_work(tiny, monkeypatch):
    model = tiny.model
    small = plan_for(model, "ems", budget=12, decode_budget=5, sinks=3, keep_last=3)
    with pytest.raises(UsageError, match="5 tokens is below the 6"):
        small.check(30)
    with pytest.raises(UsageError, match="less than one token"):
        plan_for(model, "ems", budget=12, decode_budget="10B").check(30)
    plan_for(model, "ems", budget=12, decode_budget=6, sinks=3, keep_last=3).check(30)
    plan_for(model, "ems", budget=12, decode_budget=5, sinks=3, keep_last=3, buffer=None).check(30)
    plan_for(model, "full", budget=12, decode_budget=2).check(30)

    def work(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "forward", work)
    with pytest.raises(UsageError, match="budget of 5 tokens"):
        compress_document(tiny, "Nine boats. " * 20, small)


@pytest.mark.parametrize("buffer", [0, -3])
def test_a_buffer_takes_at_least_one_token(buffer):
    with pytest.raises(UsageError, match=rf"A buffer of {buffer} tokens takes none: give at least 1, or None"):
        plan_for(tiny_model(), "ems", buffer=buffer)


# What else is done with a cache.


@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "tova", "snapkv"])
@pytest.mark.parametrize("later", [0, 24])
def test_cropped_tokens_leave_no_trace(name, later):
    """Also after the first compressions, as long as the queries that judge have not been forgotten."""
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30 + 24 + 30)
    other = random_ids(1, 5, seed=7)
    start = 30 + later + 2
    with attending_ragged(model):
        plain, cropped = (filled(model, name, ids[:, :30], buffer=12) for _ in range(2))
        for i in range(30, start):
            for cache in (plain, cropped):
                step(model, cache, ids[:, i : i + 1])
        step(model, cropped, other)
        cropped.crop(-5)
        check_same(plain, cropped)
        for i in range(start, start + 28):
            logits = [step(model, cache, ids[:, i : i + 1]) for cache in (plain, cropped)]
            torch.testing.assert_close(logits[1], logits[0], **CLOSE)
        check_same(plain, cropped)
        with pytest.raises(CacheError, match="can be taken out of a compressed cache, not 40"):
            cropped.crop(-40)


@pytest.mark.parametrize("fold", [2, 16])
@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "tova", "snapkv", "adakv"])
def test_reordered_sequences_go_on_as_if_they_had_always_been_there(name, fold, monkeypatch):
    folding(monkeypatch, fold)
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(3, 30 + 13)
    chosen, following = [2, 0, 0, 1], random_ids(4, 20, seed=3)
    with attending_ragged(model):
        window = 3 if "ems" in name else None
        cache, expected = (filled(model, name, each, window=window) for each in (ids[:, :30], ids[chosen, :30]))
        for i in range(30, 43):
            step(model, cache, ids[:, i : i + 1])
            step(model, expected, ids[chosen, i : i + 1])
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 1, 1, 2]))
        check_same(cache, expected)
        for i in range(20):
            a, b = (step(model, each, following[:, i : i + 1]) for each in (cache, expected))
            torch.testing.assert_close(a, b, **CLOSE)
        check_same(cache, expected)


@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o"])
def test_beams_run_in_constant_memory(name):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(2, 30)
    plan = plan_for(model, name)
    cache = HeadCache(plan)
    with attending_ragged(model):
        made = model.generate(ids, past_key_values=cache, max_new_tokens=50, num_beams=3, **GREEDY)
    assert made.shape == (2, 80) and cache.lengths.shape == (2, 6, 2)
    assert (cache.lengths <= plan.decode_allocation(80)[:, None] + 8).all()


@pytest.mark.parametrize("name", ["ems", "headkv-ems", "h2o", "tova", "snapkv", "streamingllm"])
def test_a_padded_batch_is_compressed_again_like_each_sequence_alone(name):
    model, lengths = tiny_model(num_kv_heads=2, layers=2), [30, 19]
    prompt, following = random_ids(2, 30), random_ids(2, 40, seed=5)
    ids, mask = left_padded(prompt, lengths)
    with attending_ragged(model):
        batch = HeadCache(plan_for(model, name))
        alone = [filled(model, name, prompt[entry : entry + 1, :length]) for entry, length in enumerate(lengths)]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step(model, batch, ids, attention_mask=mask, position_ids=positions)
        for i in range(40):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.cumsum(-1)[:, -1:] - 1
            new = following[:, i : i + 1]
            together = step(model, batch, new, attention_mask=mask, position_ids=positions)
            for entry in range(2):
                single = step(model, alone[entry], new[entry : entry + 1])
                torch.testing.assert_close(together[entry], single[0], **CLOSE)
        for layer, (first, second) in enumerate(zip(*map(head_positions, alone), strict=True)):
            assert head_positions(batch)[layer] == [*first, *([each + 11 for each in row] for row in second)]


@pytest.mark.parametrize("name", UNLIKE)
def test_hidden_rows_go_at_the_next_compression(name):
    """Questions of different lengths about one document, the second of which begins with padding."""
    model, document = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30)
    with attending_ragged(model):
        single = filled(model, name, document)
        batch = stack_caches([single, single])
        mask = torch.ones(2, 37, dtype=torch.int64)
        mask[1, 30:34] = 0
        positions = mask.cumsum(-1)[:, 30:] - 1
        step(model, batch, random_ids(2, 7, seed=1), attention_mask=mask, position_ids=positions)
        bias = batch.head_layers[0].storage.compact().columns.get("bias")
        assert int((bias == float("-inf")).sum()) == 2 * 4
        for i in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = mask.cumsum(-1)[:, -1:] - 1
            logits = step(model, batch, random_ids(2, 1, seed=i), attention_mask=mask, position_ids=positions)
        assert logits.isfinite().all()
        for layer, held in zip(batch.head_layers, head_positions(batch), strict=True):
            assert not any({30, 31, 32, 33} & set(positions) for positions in held[2:])
            assert {36, 40} <= set(held[2]) & set(held[3])
            assert layer.storage.compact().column("bias").isfinite().all()
        if name not in SHARING:
            assert (batch.lengths == (batch.plan.decode_allocation(38) + 3)[:, None]).all()


# A document on disk.


@pytest.mark.parametrize(("name", "decode_budget"), [("ems", None), ("headkv-ems", 20), ("h2o", "40%"), ("snapkv", 24)])
def test_a_loaded_document_goes_on_as_the_one_in_memory(tiny, tmp_path, name, decode_budget):
    plan = plan_for(tiny.model, name, 24, 6, decode_budget=decode_budget)
    cache = compress_document(tiny, "The lighthouse keeper counted nine grey boats before breakfast. " * 12, plan)
    save_document(cache, tmp_path / "doc.safetensors", tiny)
    loaded, _ = load_document(tmp_path / "doc.safetensors", tiny)
    check_same(cache, loaded)
    if "ems" in name:
        assert cache.head_layers[0].storage.rows.column("bias").max() > 0
    assert ("received" in cache.head_layers[0].storage.rows.columns) == (name != "snapkv")
    assert loaded.plan.method == plan.method and loaded.plan.buffer == 6
    for seen in (200, 500):
        assert torch.equal(loaded.plan.decode_allocation(seen), plan.decode_allocation(seen))
    ids = question_ids(tiny, cache.get_seq_length(), "How many boats were there?", 60)
    made = [generate_text(tiny, ids, cache=each, max_new_tokens=60) for each in (cache, loaded)]
    assert made[0].text == made[1].text and made[0].new_tokens == made[1].new_tokens
    check_same(cache, loaded)
    last = cache.get_seq_length()
    assert (cache.lengths[:, 0] <= plan.decode_allocation(last) + 6).all()


@pytest.mark.parametrize(
    ("name", "decode_budget", "buffer"), [("ems", 20, 40), ("h2o", None, 40), ("snapkv", 12, 10), ("tova", 20, 40)]
)
@pytest.mark.parametrize("stops", [[60], [60, 90, 93]])
def test_a_document_saved_while_text_is_generated_goes_on_as_the_one_in_memory(
    tiny, tmp_path, name, decode_budget, buffer, stops, monkeypatch
):
    """With the queries that its next compression goes by, some of them padding."""
    folding(monkeypatch, 6)
    ids, mask = random_ids(2, 60 + 33 + 40), torch.ones(2, 60 + 33 + 40, dtype=torch.int64)
    mask[1, 91:92] = 0
    with attending_ragged(tiny.model):
        cache = HeadCache(plan_for(tiny.model, name, 24, buffer, decode_budget=decode_budget))
        for start, stop in zip([0, *stops], stops, strict=False):
            step(tiny.model, cache, ids[:, start:stop], attention_mask=mask[:, :stop])
        save_document(cache, tmp_path / "doc.safetensors", tiny)
        loaded, _ = load_document(tmp_path / "doc.safetensors", tiny)
        assert remembered(loaded) == remembered(cache)
        check_same(cache, loaded)
        for i in range(stops[-1], stops[-1] + 40):
            logits = [step(tiny.model, each, ids[:, i : i + 1]) for each in (cache, loaded)]
            torch.testing.assert_close(logits[1], logits[0], **CLOSE)
        check_same(cache, loaded)


@pytest.mark.parametrize(("prompt", "budget", "buffer", "later"), [(20, 20, 8, 7), (20, 16, 12, 11), (30, 20, 12, 11)])
def test_a_document_taken_elsewhere_is_compressed_when_it_would_have_been(
    tiny, tmp_path, prompt, budget, buffer, later
):
    """Heads that hold all there is get more as there is more, and others less: their targets move with every token."""
    ids = random_ids(1, prompt + later + 40)
    with attending_ragged(tiny.model):
        cache = filled(tiny.model, "headkv-r2", ids[:, :prompt], budget, buffer)
        for i in range(prompt, prompt + later):
            step(tiny.model, cache, ids[:, i : i + 1])
        save_document(cache, tmp_path / "doc.safetensors", tiny)
        loaded, metadata = load_document(tmp_path / "doc.safetensors", tiny)
        assert "left" in metadata
        stacked = stack_caches([cache, cache])
        for i in range(prompt + later, prompt + later + 40):
            new = ids[:, i : i + 1]
            logits = [step(tiny.model, each, new) for each in (cache, loaded)]
            assert torch.equal(*logits) and torch.equal(cache.lengths, loaded.lengths)
            torch.testing.assert_close(step(tiny.model, stacked, new.expand(2, 1))[:1], logits[0], **CLOSE)
        check_same(cache, loaded)
        assert torch.equal(stacked.lengths[:, :1], cache.lengths)


# What a layer hands to an importance.


@dataclass(frozen=True)
class Watching(Importance):
    """Random importance; remembers what it was asked about."""

    asked: list = field(default_factory=list, compare=False)
    queries = None

    def assess(self, observed):
        self.asked.append(observed)
        generator = torch.Generator().manual_seed(len(self.asked))
        importance = torch.rand(observed.keys.shape[:3], generator=generator)
        return Assessment(importance, importance, {"received": observed.rows.column("received") + importance})


def layer_of(method, budget, buffer, *, heads=2, group=3, dim=8):
    shape = HeadShape("Tiny", 1, heads * group, heads, dim, 8)
    return HeadCacheLayer(
        0,
        CompressionPlan(
            method, Budget.parse(budget), shape, torch.ones(1, heads), 4, decode_budget=None, buffer=buffer
        ),
    )


def test_a_layer_hands_over_the_rows_it_holds_and_the_queries_since():
    """Merged rows with their bias, no hidden ones, heads of different lengths."""
    watching, prompt, dim = Watching(), 24, 8
    how = AttentionLayer(scaling=0.5, softcap=9.0, sliding_window=7)
    merge = EvictThenMerge(threshold=-1.0, candidates=2.0, coverage=1.0, redundancy=0.0, merge_keys=True, mass=True)
    layer = layer_of(Method(watching, UniformBudget(), merge, sinks=1, keep_last=1), 10, 6)
    generator = torch.Generator().manual_seed(0)

    def random(heads, count):
        return torch.randn(2, heads, count, dim, generator=generator)

    valid = torch.ones(2, prompt, dtype=torch.bool)
    valid[1, : prompt - 7] = False  # this sequence begins with 7 rows a head, the other with 10
    key, value = random(2, prompt), random(2, prompt)
    layer.update(key, value)
    layer.filled(observed_prompt(random(6, prompt), key, valid, value, scaling=0.5))
    assert layer.lengths == [10, 10, 7, 7]
    seen, since, own, compressions = prompt, [], [], 0
    for number, count in enumerate([1, 2, 3, 1, 4, 2, 3, 3, 1, 1, 6, 2] * 2):
        held, asked = layer.storage.compact(), len(watching.asked)
        layer.update(random(2, count), random(2, count))
        if len(watching.asked) > asked:
            compressions += 1
            observed = watching.asked[-1]
            assert torch.equal(observed.queries, torch.cat(since, dim=2)) and observed.seen == seen
            assert observed.query_positions.tolist() == list(range(seen - observed.queries.shape[2], seen))
            assert observed.layer == how and not observed.is_prompt
            own_queries = torch.cat(own, dim=1)
            if observed.query_valid is None:
                assert own_queries.all()
            else:
                assert torch.equal(observed.query_valid, own_queries)
            visible = held.columns["bias"] > -float("inf")
            for given, expected in zip(observed.rows.tensors, held.tensors, strict=True):
                assert torch.equal(given[observed.valid], expected[visible])
            per_head = [int(part.sum()) for part in visible.split(held.lengths)]
            assert observed.valid.sum(dim=-1).flatten().tolist() == per_head
            since, own = [], []
        new_queries, new = random(6, count), torch.ones(2, count, dtype=torch.bool)
        if number % 5 == 4:
            new[1, 0] = False
            layer.storage.hide_newest(new)
        layer.observe(new_queries, None if new.all() else new, how)
        since.append(new_queries)
        own.append(new)
        seen += count
    assert compressions >= 6 and layer.storage.rows.columns["bias"].max() > 1


# H2O (Zhang et al. 2023), as in the paper.


class HeavyHitters:
    """One head that sums the attention its rows receive and drops the least of the older ones, in loops."""

    def __init__(self, target, buffer):
        self.target, self.buffer = target, buffer
        self.rows = []  # [position, key, received]

    def evict(self):
        recent = self.target // 2
        older = sorted(self.rows[:-recent], key=lambda row: (-row[2], row[0]))[: self.target - recent]
        self.rows = sorted(older, key=lambda row: row[0]) + self.rows[-recent:]

    def token(self, position, key, queries, scaling):
        """Take one token; its group of query heads attends over the rows held."""
        if len(self.rows) == self.target + self.buffer:
            self.evict()
        self.rows.append([position, key.double(), 0.0])
        for query in queries.double():
            weights = torch.softmax(torch.stack([row[1] @ query * scaling for row in self.rows]), dim=0).tolist()
            for row, weight in zip(self.rows, weights, strict=True):
                row[2] += weight / len(queries)


@pytest.mark.parametrize(("buffer", "chunk"), [(1, 1), (5, 1), (5, 3), (20, 1), (20, 3)])
def test_heavy_hitters_are_those_of_the_paper(buffer, chunk, monkeypatch):
    """With a buffer of one token a row goes for each that comes, as in the paper."""
    folding(monkeypatch, 4)
    target, prompt, num_tokens, heads, group, dim = 10, 24, 24 + 90, 2, 3, 8
    generator = torch.Generator().manual_seed(buffer)
    query = 2 * torch.randn(1, heads * group, num_tokens, dim, generator=generator)
    key, value = (torch.randn(1, heads, num_tokens, dim, generator=generator) for _ in range(2))
    method = Method(Accumulated(), UniformBudget(), Evict(), sinks=0, keep_last=1, recent_share=0.5)
    layer = layer_of(method, target, buffer, heads=heads, group=group, dim=dim)
    layer.update(key[:, :, :prompt], value[:, :, :prompt])
    layer.filled(observed_prompt(query[:, :, :prompt], key[:, :, :prompt], values=value[:, :, :prompt], scaling=0.5))
    slow = [HeavyHitters(target, buffer) for _ in range(heads)]
    for k, head in enumerate(slow):
        head.buffer = num_tokens  # a prompt is read whole
        for position in range(prompt):
            head.token(position, key[0, k, position], query[0, k * group : (k + 1) * group, position], 0.5)
        head.evict()
        head.buffer = buffer
    for start in range(prompt, num_tokens, chunk):
        new = slice(start, min(start + chunk, num_tokens))
        layer.update(key[:, :, new], value[:, :, new])
        layer.observe(query[:, :, new], None, AttentionLayer(scaling=0.5))
        held = layer.storage.compact()
        for k, (head, positions) in enumerate(zip(slow, held.positions.split(held.lengths), strict=True)):
            if len(head.rows) + new.stop - new.start > target + buffer:
                head.evict()
            for position in range(new.start, new.stop):
                head.token(position, key[0, k, position], query[0, k * group : (k + 1) * group, position], 0.5)
            assert positions.tolist() == [row[0] for row in head.rows]
    assert any(row[0] < prompt for head in slow for row in head.rows)
