"""Importance and selection against plain twins; what a cache keeps; what the context does to a model."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.observations import as_held_rows, observed_prompt
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import tiny_model
from support.twins import slow_score
from transformers.cache_utils import DynamicCache

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.methods.reduction import largest, ranking
from headprof.compression.methods.table import METHODS, find_method, parse_settings
from headprof.compression.methods.window_attention import WindowAttention
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, ProfileError, UsageError


@given(
    st.integers(1, 2),
    st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 2)]),
    st.integers(1, 24),
    st.integers(1, 30),
    st.sampled_from([1, 3, 7]),
    st.sampled_from(["max", "mean"]),
    st.sampled_from([None, 5]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 5),
    st.sampled_from([1, 2, 3.5]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_window_attention_equals_its_slow_twin(
    batch, heads, tokens, window, kernel, pooling, sliding, softcap, padding, power, ramp
):
    generator = torch.Generator().manual_seed(tokens * 31 + window)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : min(padding, tokens - 1)] = False
    observed = observed_prompt(
        torch.randn(batch, heads[0], tokens, 8, generator=generator),
        torch.randn(batch, heads[1], tokens, 8, generator=generator),
        valid,
        scaling=0.4,
        softcap=softcap,
        sliding_window=sliding,
    )
    fast = WindowAttention(window, kernel, pooling, power, ramp).score(observed).double()
    slow = slow_score(WindowAttention(window, kernel, pooling, power, ramp), as_held_rows(observed))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_head_keeps_exactly_the_best(data):
    batch, heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    sinks, keep_last = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=tokens, max_size=tokens)  # many ties
    importance = torch.tensor([[data.draw(values) for _ in range(heads)] for _ in range(batch)])
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    for b in range(batch):
        valid[b, : data.draw(st.integers(0, tokens - 1))] = False
    counts = torch.tensor(
        [[data.draw(st.integers(0, int(valid[b].sum()))) for _ in range(heads)] for b in range(batch)]
    )
    kept = largest(ranking(importance, valid, sinks=sinks, keep_last=keep_last), counts)
    for b in range(batch):
        real = [j for j in range(tokens) if valid[b, j]]
        protected = {*real[:sinks], *(real[-keep_last:] if keep_last else [])}
        for k in range(heads):
            order = sorted(
                real, key=lambda j: (j not in protected, 0 if j in protected else -importance[b, k, j].item(), j)
            )
            assert set(kept[b, k].nonzero().flatten().tolist()) == set(order[: int(counts[b, k])])


@pytest.mark.parametrize("budget", [4, 9, 17])
@pytest.mark.parametrize("method", ["snapkv", "headkv", "headkv-r2"])
def test_cache_holds_what_the_allocation_says(method, budget):
    model = tiny_model(num_kv_heads=2, layers=3)
    options = {"method": method, "budget": budget, "keep_last": 2, "sinks": 1, "buffer": None}
    with compressed(model, random_profile(model), **options) as plan:
        cache = HeadCache(plan, slack=5)
        prefill(model, random_ids(1, 50), cache)
        assert torch.equal(cache.lengths[:, 0], plan.allocation(50))
        rows = int(plan.allocation(50).sum()) + 5 * 6
        assert cache.nbytes == rows * (2 * 16 * 4 + 4)  # keys and values of 16 floats, a position
        assert cache.get_seq_length() == 50
        model(random_ids(1, 3), past_key_values=cache)
        assert torch.equal(cache.lengths[:, 0], plan.allocation(50) + 3)
        assert cache.nbytes == rows * (2 * 16 * 4 + 4)  # three tokens fit into the free space
        assert cache.get_seq_length() == 53


def test_kept_rows_are_the_prompts_rows():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(1, 30)
    full = DynamicCache()
    model(ids, past_key_values=full)
    with compressed(model, method="snapkv", budget=7) as plan:
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        rows = layer.storage.compact()
        starts = [0, *accumulate(rows.lengths)]
        for head, (start, stop) in enumerate(pairwise(starts)):
            chosen = slice(start, stop)
            places = rows.positions[chosen].long()
            assert places.tolist() == sorted(set(places.tolist()))
            assert {0, 28, 29} <= set(places.tolist())  # the sink and the last two
            torch.testing.assert_close(rows.keys[chosen], whole.keys[0, head, places])
            torch.testing.assert_close(rows.values[chosen], whole.values[0, head, places])


def test_fan_out_equals_separate_prefills():
    model = tiny_model(num_kv_heads=2, layers=3)
    profile, ids = random_profile(model), random_ids(1, 40)
    plans = [
        make_plan(model, profile, method=method, budget=budget)
        for method in ("snapkv", "headkv", "headkv-r2", "full")
        for budget in (6, 12)
    ]
    with attending_ragged(model):
        together = [HeadCache(plan) for plan in plans]
        prefill(model, ids, FanOutCache(together))
        for plan, cache in zip(plans, together, strict=True):
            alone = HeadCache(plan)
            prefill(model, ids, alone)
            assert torch.equal(alone.lengths, cache.lengths)
            for a, b in zip(alone.layers, cache.layers, strict=True):
                assert torch.equal(a.storage.rows.keys, b.storage.rows.keys)
                assert torch.equal(a.storage.rows.positions, b.storage.rows.positions)
        with pytest.raises(CacheError, match="takes one prompt"):
            prefill(model, ids, FanOutCache(together))


def test_leaving_the_context_restores_the_model_also_after_an_exception():
    model = tiny_model()
    ids = random_ids(1, 20)
    before = model(ids).logits
    with pytest.raises(RuntimeError), compressed(model, method="snapkv", budget=8):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    after = model(ids, use_cache=True)
    assert torch.equal(after.logits, before)
    assert isinstance(after.past_key_values, DynamicCache)


def test_a_users_own_dynamic_cache_still_works_inside():
    model, ids = tiny_model(), random_ids(1, 20)
    cache = DynamicCache()
    model(ids[:, :10], past_key_values=cache)
    expected = model(ids).logits[:, 10:]
    with compressed(model, method="snapkv", budget=8):
        torch.testing.assert_close(model(ids[:, 10:], past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-4)


def test_plans_refuse_what_cannot_work():
    model = tiny_model()
    with pytest.raises(UsageError, match="no method 'magic'"):
        make_plan(model, method="magic")
    with pytest.raises(ProfileError, match="needs a head profile"):
        make_plan(model, method="headkv-r2")
    with pytest.raises(ProfileError, match="layers 3 instead of 2"):
        make_plan(model, random_profile(tiny_model(layers=3)), method="headkv")
    with pytest.raises(UsageError, match="no parameter 'pool_factor'"):
        make_plan(model, method="snapkv", pool_factor=2.0)
    with pytest.raises(UsageError, match="kernel of 4"):
        make_plan(model, method="snapkv", kernel=4)
    with pytest.raises(UsageError, match="no pooling 'median'"):
        make_plan(model, method="snapkv", pooling="median")
    with pytest.raises(UsageError, match="power of 0 does not exist"):
        make_plan(model, method="snapkv", power=0)
    with pytest.raises(UsageError, match="less than one token"):
        make_plan(model, method="snapkv", budget="10B").allocation(100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power", "setting of 'power'"),
        ("=2", "cannot be read"),
        ("magic=2", "no parameter 'magic'"),
        ("importance=2", "no parameter 'importance'"),
        ("window=many", r"'window' cannot be 'many': give a whole number"),
        ("window=2.5", r"'window' cannot be 2\.5: give a whole number"),
        ("ramp=1", r"'ramp' cannot be 1: give true or false"),
        ("temperature=hot", r"'temperature' cannot be 'hot': give a number"),
        ("temperature=-1", "cannot be below 0"),
        ("pool_factor=0.5", "give 1 or more"),
        ("aggregate=sum", "choose max or mean"),
        ("sinks=-1", "A head cannot keep -1 tokens: give sinks at least 0"),
        ("recent_share=2", "is no share"),
    ],
)
def test_settings_that_cannot_be_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        find_method("headkv-r2").with_options(**parse_settings([text]))


@pytest.mark.parametrize("name", ["clusterkv:cluster=5:cluster=9", "ems:mass=true:window=8:mass=true"])
def test_a_parameter_that_a_name_gives_twice_is_refused(name):
    with pytest.raises(UsageError, match=r"is given twice, as '\w+=\w+' too: leave one of them away\.$"):
        find_method(name)


def test_settings_are_read_by_kind():
    settings = parse_settings(["power=3", "ramp=False", "temperature=1", "aggregate=mean"])
    assert settings == {"power": 3, "ramp": False, "temperature": 1, "aggregate": "mean"}
    method = find_method("headkv-r2").with_options(**settings)
    assert (method.importance.power, method.importance.ramp, method.budget.aggregate) == (3, False, "mean")


def test_observers_become_the_window():
    method = find_method("headkv-r2").for_observers(29)
    assert (method.importance.window, method.importance.ramp) == (29, False)
    assert find_method("knorm").for_observers(29) == find_method("knorm")


def test_options_reach_the_part_that_has_them():
    method = find_method("headkv-r2").with_options(window=5, keep_last=3, pool_factor=2.0, kernel=None)
    assert (method.importance.window, method.keep_last, method.budget.pool_factor) == (5, 3, 2.0)
    assert method.importance.kernel == METHODS["headkv-r2"].importance.kernel
    assert METHODS["headkv-r2"].importance.window != 5 or METHODS["headkv-r2"].keep_last != 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_on_cuda_the_budget_decides_the_rows_and_a_full_one_changes_nothing(arch):
    model = tiny_model(arch, num_kv_heads=2, layers=3).cuda()
    ids = random_ids(2, 40).cuda()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(ids, **options)
    with compressed(model, random_profile(model), method="headkv-r2", budget=40):
        assert torch.equal(model.generate(ids, **options), expected)
    with compressed(model, random_profile(model), method="headkv-r2", budget=7) as plan:
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    assert cache.head_layers[0].storage.rows.keys.is_cuda
    if arch == "llama":
        assert torch.equal(cache.lengths[:, 1], plan.allocation(40))
