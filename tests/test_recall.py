"""Recall: what heads evict waits on the host, and comes back when a query calls for it."""

import json

import pytest
import torch
from support.commands import headprof
from support.profiles import random_profile
from support.tiny_models import load_tiny, three_layers, tiny_model

from headprof.compression.batches import answer_each
from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.together import TogetherCache
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.table import find_method
from headprof.compression.promise import compress_to_promise
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, UsageError

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
WAYS = {
    "clusterkv": {},
    "clusterkv in small clusters": {"method": "clusterkv", "cluster": 4},
    "headkv-cluster": {"cluster": 8},
    "headkv-r2 half": {"method": "headkv-r2", "cluster": 8, "recall_share": 0.5, "recall_among": 2},
    "every third": {"method": "clusterkv", "cluster": 8, "recall_every": 3},
}


def plan_of(model, way="headkv-cluster", **options):
    given = {"method": way, **WAYS.get(way, {}), **options}
    return make_plan(model, random_profile(model), **given)


def prompts(*lengths, width=70, seed=0):
    """Left-padded prompts of these lengths, and their mask."""
    ids = torch.randint(3, 512, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def positions_of(cache, head=0):
    """Of each layer, positions of one head's rows: those brought back, those that stay, those of its second tier."""
    found = []
    for layer in cache.head_layers:
        slots, rows = layer.held.slots[head], layer.storage.compact().of_heads([head]).positions.tolist()
        tiers = [tier for tier in layer.tiers if 0 <= head - tier.first_head < tier.num_heads]
        evicted = tiers[0].of_heads([head - tiers[0].first_head], 0).in_order().positions.tolist() if tiers else []
        found.append((rows[:slots], rows[slots:], evicted))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("buffer", [5, None])
def test_all_brought_back_says_what_the_full_cache_says(arch, way, buffer):
    """A budget that covers everything: the heads bring back all that they have evicted, and say just the same."""
    model = three_layers(arch, 2)
    if arch == "mistral":
        model = tiny_model(arch, layers=3, sliding_window=24)
    ids, mask = prompts(70, 51)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options)
    cache = HeadCache(plan_of(model, way, budget=200, buffer=buffer))
    with attending_ragged(model):
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.recalls and cache.second_tier_bytes
    if arch == "llama":
        for tier in (tier for layer in cache.head_layers for tier in layer.tiers):
            assert tier.slots == tier.counts and min(tier.slots) > 0


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_say_what_they_say_over_the_full_cache(beams):
    model = three_layers("llama", 2)
    ids, mask = prompts(60, 41, width=60)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "num_beams": beams}
    with compressed(model, random_profile(model), method="headkv-cluster", cluster=8, budget=200, buffer=5):
        assert torch.equal(model.generate(ids, **options), made := model.generate(ids, **options))
    assert torch.equal(made, model.generate(ids, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_pass_of_many_tokens_is_as_many_passes(arch, way):
    """Each token brings back what it calls for, however many come in one forward pass."""
    model = tiny_model(arch, layers=3, sliding_window=40)
    ids, _ = prompts(90, 90, width=90)
    plan = plan_of(model, way, budget=26, buffer=None)
    one, other = HeadCache(plan), HeadCache(plan)
    with attending_ragged(model), torch.no_grad():
        for cache in (one, other):
            prefill(model, ids[:, :70], cache)
        together = model(ids[:, 70:], past_key_values=one).logits
        apart = [model(ids[:, at : at + 1], past_key_values=other).logits for at in range(70, 90)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), **CLOSE)


@pytest.mark.parametrize("way", ["clusterkv", "headkv-cluster"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_nothing_is_lost_and_the_device_holds_no_more(way, share):
    """While 50 tokens are generated, every row is on the device or in the second tier, once, and heads hold no more
    than their budget and the buffer."""
    model = three_layers("llama", 2)
    cache = HeadCache(plan_of(model, way, budget=30, buffer=8, recall_share=share))
    ids, _ = prompts(60, width=60)
    with attending_ragged(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=50, min_new_tokens=50, do_sample=False)
    seen, held = cache.get_seq_length(), cache.plan.decode_allocation(cache.get_seq_length())
    assert bool((cache.lengths[:, 0] <= held + 8).all())
    for head in range(2):
        for back, staying, evicted in positions_of(cache, head):
            assert sorted(staying + evicted) == list(range(seen))
            assert set(back) <= set(evicted) and len(set(back)) == len(back) > 0


def query_of_last(model, ids, cache):
    """Read all tokens but the last, then that one; its queries in the first layer, `[N, g, D]`."""
    asked = []
    with attending_ragged(model), torch.no_grad():
        prefill(model, ids[:, :-1], cache)
        held = cache.head_layers[0].held
        bring = held._bring_back
        held._bring_back = lambda query, *how: (asked.append(query), bring(query, *how))
        prefill(model, ids[:, -1:], cache)
    (query,) = asked
    return query


def test_what_is_brought_back_is_what_the_query_calls_for():
    """Beside the obvious way: clusters by their inner product with the query, row by row until the slots are full."""
    model = tiny_model("llama", layers=1, num_heads=2, num_kv_heads=2)
    ids, _ = prompts(81, width=81)
    cache = HeadCache(plan_of(model, "clusterkv", budget=30, cluster=6, buffer=None))
    query = query_of_last(model, ids, cache)
    layer, tier = cache.head_layers[0], cache.head_layers[0].tiers[0]
    rows = tier.parts[0]
    for head in range(2):
        clusters = list(zip(*(each[head] for each in tier.clusters.tensors), strict=True))
        clusters = [(float(query[head, 0] @ mean), int(start), int(size)) for mean, start, size in clusters if size]
        expected = [row for _, start, size in sorted(clusters, reverse=True) for row in range(start, start + size)][
            : tier.slots[head]
        ]
        back, _, _ = positions_of(cache, head)[0]
        assert back == rows.positions[expected].tolist()
        start = int(layer.storage.starts[head])
        for name in ("keys", "values"):
            held = getattr(layer.storage.rows, name)[start : start + len(expected)]
            assert torch.equal(held, getattr(rows, name)[expected])


def test_looking_at_rows_one_by_one_brings_back_the_best():
    """With all rows looked at, those with the largest inner product come back, whatever their clusters."""
    model = tiny_model("llama", layers=1, num_heads=2, num_kv_heads=2)
    ids, _ = prompts(81, width=81)
    cache = HeadCache(plan_of(model, "clusterkv", budget=30, cluster=20, recall_among=100, buffer=None))
    query = query_of_last(model, ids, cache)
    layer = cache.head_layers[0]
    for head in range(2):
        back, staying, _ = positions_of(cache, head)[0]
        rows = layer.tiers[0].of_heads([head], 0).in_order()
        best = (rows.keys @ query[head, 0]).topk(len(back)).indices
        assert sorted(back) == sorted(rows.positions[best].tolist())
        assert staying == [*range(16), 78, 79, 80]


def test_both_tiers_count_their_bytes():
    model = three_layers("llama", 2)
    cache = HeadCache(plan_of(model, "clusterkv", budget=30, cluster=10, buffer=None))
    ids, _ = prompts(70)
    with attending_ragged(model), torch.no_grad():
        prefill(model, ids, cache)
    device = host = 0
    for layer in cache.head_layers:
        (tier,) = layer.tiers
        device += sum(each.nbytes for each in (*layer.storage.rows.tensors, *tier.clusters.tensors))
        host += sum(each.nbytes for part in tier.parts for each in part.tensors)
    assert (cache.nbytes, cache.second_tier_bytes) == (device, host)
    assert host == 3 * 2 * (70 - 18) * (2 * 16 * 4 + 4)


def test_stacked_caches_go_on_as_they_would_alone():
    """Of several methods, some of which bring back rows, each in its own way."""
    model = three_layers("llama", 2)
    plans = [plan_of(model, way, budget=26, buffer=None) for way in ("snapkv", *WAYS)]
    ids, _ = prompts(82, width=82)
    with attending_ragged(model), torch.no_grad():
        caches = [HeadCache(plan) for plan in plans]
        prefill(model, ids[:, :70], FanOutCache(caches))
        stack = stack_caches(caches)
        logits = [model(ids[:, 70:76].expand(len(caches), -1), past_key_values=stack).logits]
        chosen = torch.tensor([4, 0, 2, 2])
        stack.batch_select_indices(chosen)
        logits.append(model(ids[:, 76:].expand(4, -1), past_key_values=stack).logits)
        for number, cache in enumerate(caches):
            expected = model(ids[:, 70:], past_key_values=cache).logits[0]
            torch.testing.assert_close(logits[0][number], expected[:6], **CLOSE)
            for entry in (chosen == number).nonzero().flatten():
                torch.testing.assert_close(logits[1][entry], expected[6:], **CLOSE)


def test_a_padded_batch_says_what_each_says_alone():
    model = three_layers("llama", 2)
    ids, mask = prompts(70, 33)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with compressed(model, random_profile(model), method="clusterkv", cluster=4, budget=24, buffer=6):
        made = model.generate(ids, attention_mask=mask, **options)
        for each, length in zip(made, (70, 33), strict=True):
            alone = model.generate(each[None, 70 - length : 70], **options)
            assert torch.equal(alone[0], each[70 - length :])


def test_copies_of_one_cache_are_compressed_again_as_it_is():
    model = three_layers("llama", 2)
    ids, _ = prompts(100, width=100)
    with attending_ragged(model), torch.no_grad():
        cache = HeadCache(plan_of(model, "headkv-cluster", budget=30, buffer=6))
        prefill(model, ids[:, :70], cache)
        stack = stack_caches([cache, cache])
        for at in range(70, 100):
            fed = ids[:, at : at + 1]
            expected = model(fed, past_key_values=cache).logits
            found = model(fed.expand(2, -1), past_key_values=stack).logits
            torch.testing.assert_close(found, expected.expand(2, -1, -1), **CLOSE)


@pytest.mark.parametrize("count", [1, 7])
def test_tokens_that_are_taken_out_leave_no_trace(count):
    model = three_layers("llama", 2)
    ids, _ = prompts(90, width=90)
    plan = plan_of(model, "headkv-cluster", budget=26, buffer=None)
    one, other = HeadCache(plan), HeadCache(plan)
    with attending_ragged(model), torch.no_grad():
        for cache in (one, other):
            prefill(model, ids[:, :70], cache)
        model(ids[:, 70 : 70 + count], past_key_values=other)
        other.crop(-count)
        expected = model(ids[:, 80:], past_key_values=one).logits
        torch.testing.assert_close(model(ids[:, 80:], past_key_values=other).logits, expected, **CLOSE)


def test_every_few_tokens_none_is_taken_out():
    model = three_layers("llama", 2)
    ids, _ = prompts(75, width=75)
    cache = HeadCache(plan_of(model, "every third", budget=26, buffer=None))
    with attending_ragged(model), torch.no_grad():
        prefill(model, ids[:, :70], cache)
        model(ids[:, 70:], past_key_values=cache)
        with pytest.raises(CacheError, match=r"every 3 tokens, .* give recall_every=1\.$"):
            cache.crop(-2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("headkv-r2-int8:cluster=80", "held in full, not as 'int8'"),
        ("headkv-cluster:representation=thin", "held in full, not as 'thin'"),
        ("headkv-ems:cluster=80", "merged or fitted"),
        ("learned-fit:cluster=80", "merged or fitted"),
        ("adakv:cluster=80", "share by the rows they hold"),
        ("full:cluster=80", "no parameter 'cluster'"),
    ],
)
def test_what_does_not_go_together_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        find_method(name)


def test_no_step_is_compiled_over_it_and_none_is_captured():
    model = three_layers("llama", 2)
    ids, _ = prompts(40, width=40)
    plan = plan_of(model, "headkv-cluster", budget=26)
    with attending_ragged(model, step="compiled"), torch.no_grad():
        cache = HeadCache(plan)
        with pytest.raises(UsageError, match=r"runs no step='compiled', .* leave it, or --compile, away\.$"):
            model.generate(ids, past_key_values=cache, max_new_tokens=4)
    assert not cache.runs_steps


def test_caches_together_are_refused():
    model = three_layers("llama", 2)
    ids, _ = prompts(40, width=40)
    cache = HeadCache(plan_of(model, "headkv-cluster", budget=26))
    with attending_ragged(model), torch.no_grad():
        prefill(model, ids, cache)
    with pytest.raises(CacheError, match=r"not continued together: continue one after the other\.$"):
        TogetherCache([cache])


TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 6


def test_questions_are_answered_as_one_by_one():
    tiny = load_tiny(layers=1)
    cache = compress_document(tiny, TEXT, plan_of(tiny.model, budget=30, buffer=6))
    asked = ["Who counted?", "How many boats were there?", "Who counted?"]
    made = list(answer_each(tiny, cache, asked, max_new_tokens=8, batch=3))
    assert [each.text for each in made] == [ask(tiny, cache, each, max_new_tokens=8).text for each in asked]
    assert all(each.second_tier_bytes > cache.second_tier_bytes for each in made)


def test_a_promise_is_measured_with_what_comes_back():
    tiny = load_tiny(layers=1)
    cache, promise = compress_to_promise(tiny, TEXT, plan_of(tiny.model, budget=30), 0.05, questions=1)
    assert promise.kept.at_most <= 0.05
    assert cache.recalls != promise.keeps_everything


def test_the_command_line_tells_both_tiers(tmp_path, tiny_folder):
    (tmp_path / "keeper.txt").write_text(TEXT)
    model, told = ("--model", str(tiny_folder)), ("--json",)
    how = ("--method", "clusterkv:cluster=16", "--budget", "30")
    made = json.loads(headprof(tmp_path, "compress", *model, "--file", "keeper.txt", *how, *told).stdout)
    assert made["second_tier_bytes"] > made["cache_bytes"] > 0
    asked = ("--cache", made["file"], "--prompt", "Who counted?", "--max-new-tokens", "3")
    (run,) = json.loads(headprof(tmp_path, "generate", *model, *asked, *told).stdout)["runs"].values()
    assert run["second_tier_bytes"] >= made["second_tier_bytes"]
    shown = headprof(tmp_path, "generate", *model, *asked).stderr
    assert "second tier" in shown
    refused = headprof(tmp_path, "generate", *model, *asked, "--compile")
    assert refused.returncode and "runs no step='compiled'" in refused.stderr and "Traceback" not in refused.stderr
