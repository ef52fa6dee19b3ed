"""One ranking over the rows of all layers: by a slow twin that has every matrix of attention, and in two readings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.profiles import random_profile
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import load_tiny, tiny_model
from test_decoding import check_same, head_positions
from test_reconstruction import TEXT, kept_positions, repeated

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.prompt_cache import RankingCache
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.global_budget import GlobalBudget, ranked_together
from headprof.compression.methods.merging import EvictThenMerge
from headprof.compression.methods.method import Method
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.reduction import ranking
from headprof.compression.methods.table import METHODS
from headprof.compression.methods.window_attention import WindowAttention
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import UsageError

# The ranking.


def slow_counts(ranked, totals):
    """How many rows each head keeps, by sorting single rows in Python; `ranked` are `[L]` tensors `[B, K, T]`."""
    batch, heads, tokens = ranked[0].shape
    counts = torch.zeros(batch, len(ranked), heads, dtype=torch.int64)
    for entry, total in enumerate(totals):
        rows = [
            (-float(ranked[layer][entry, head, token]), token, layer, head)
            for layer in range(len(ranked))
            for head in range(heads)
            for token in range(tokens)
        ]
        for _, _, layer, head in sorted(rows)[:total]:
            counts[entry, layer, head] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(3, 20),
    levels=st.sampled_from([2, 5, 10**6]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_one_ranking_like_sorting_all_rows(layers, batch, heads, tokens, levels, share, seed):
    """Of few levels many rows are equal; padding goes last, what every head keeps first."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : tokens // 3] = False
    ranked = [
        ranking(
            torch.randint(levels, (batch, heads, tokens), generator=generator) / levels, valid, sinks=1, keep_last=1
        )
        for _ in range(layers)
    ]
    rows = valid.sum(dim=-1) * layers * heads
    totals = [max(2 * layers * heads, round(share * int(there))) for there in rows]
    totals = [min(total, int(there)) for total, there in zip(totals, rows, strict=True)]
    counts = ranked_together(ranked, totals, noise=0.0)
    assert torch.equal(counts, slow_counts(ranked, totals))
    assert counts.sum(dim=(1, 2)).tolist() == totals
    assert (counts >= 2).all() or tokens - tokens // 3 < 2
    assert (counts <= valid.sum(dim=-1)[:, None, None]).all()


# Documents.


def slow_choice(attentions, document, total, num_kv_heads, windows, always=(1, 2)):
    """What each head keeps by the matrices `[H, T, T]` of all layers, `[L][K]` sorted positions."""
    ranked = []
    for attention, window in zip(attentions, windows, strict=True):
        paid = attention[:, document:, :document].unflatten(0, (num_kv_heads, -1)).amax(dim=(1, 2))
        first = 0 if window is None else max(0, document - window)
        paid[:, first : first + always[0]] = float("inf")
        paid[:, document - always[1] :] = float("inf")
        paid[:, :first] = float("-inf")
        ranked.append(paid[None])
    rows = sum(int((each > float("-inf")).sum()) for each in ranked)
    counts = slow_counts(ranked, [min(total, rows)])[0]
    return [
        [head.topk(int(count)).indices.sort().values.tolist() for head, count in zip(layer[0], own, strict=True)]
        for layer, own in zip(ranked, counts, strict=True)
    ]


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_document_keeps_the_rows_that_its_repetition_looks_at_most(arch, prefill_chunk):
    window = 24 if arch == "gemma3" else None
    loaded = load_tiny(arch, sliding_window=window)
    twin = tiny_model(arch, sliding_window=window, attn="eager")
    document, observers = repeated(loaded, TEXT)
    plan = make_plan(loaded.model, method="kvzip", budget=16)
    cache = compress_document(loaded, TEXT, plan, prefill_chunk=prefill_chunk)
    attentions = twin(torch.tensor([document + observers]), output_attentions=True, use_cache=False).attentions
    total, heads = 16 * 2 * loaded.shape.num_kv_heads, loaded.shape.num_kv_heads
    layers = [attention[0] for attention in attentions]
    expected = slow_choice(layers, len(document), total, heads, plan.windows or (None, None))
    assert [layer[0] for layer in kept_positions(cache)] == expected
    assert int(cache.lengths.sum()) == total == int(plan.allocation(len(document)).sum())
    assert len(set(cache.lengths.flatten().tolist())) > 1 and int(cache.lengths.min()) >= 3
    assert cache.get_seq_length() == len(document) and cache.token_ids.tolist() == [document]


def test_the_rows_are_those_of_a_plain_reading():
    """What the second reading holds of each kept token is what a full cache holds of it."""
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, make_plan(loaded.model, method="kvzip", budget=16))
    full = loaded.model(torch.tensor([repeated(loaded, TEXT)[0]]), use_cache=True).past_key_values
    for layer, whole in zip(cache.head_layers, full.layers, strict=True):
        rows = layer.storage.compact()
        head = torch.arange(layer.num_kv_heads).repeat_interleave(torch.tensor(layer.lengths))
        torch.testing.assert_close(rows.keys, whole.keys[0, head, rows.positions.long()], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows.values, whole.values[0, head, rows.positions.long()], atol=1e-5, rtol=1e-5)


def test_a_budget_for_all_is_read_once_and_keeps_all():
    loaded = load_tiny()
    readings = []
    hook = loaded.model.get_decoder().register_forward_pre_hook(lambda *_: readings.append(1))
    cache = compress_document(loaded, TEXT, make_plan(loaded.model, method="kvzip", budget="100%"))
    assert len(readings) == 1 and bool((cache.lengths == cache.get_seq_length()).all())
    compress_document(loaded, TEXT, make_plan(loaded.model, method="kvzip", budget=16))
    assert len(readings) == 3
    hook.remove()


def test_never_two_whole_caches(monkeypatch):
    """After each chunk of each layer in either reading at most one layer holds the prompt's keys or queries."""
    loaded = load_tiny(layers=4)
    whole, held = len(repeated(loaded, TEXT)[0]), []
    attended = PromptLayer.attended

    def watched(layer, *args):
        attended(layer, *args)
        layers = [other for cache in caches for other in cache.layers]
        live.append(sum(bool(other._whole or other._queries) for other in layers))
        held.extend(max(other.lengths) for other in layers if getattr(other, "_held", None) is not None)

    caches, live = [], []
    for kind in (RankingCache, HeadCache, FanOutCache):
        made = kind.__init__

        def init(self, *args, made=made, **options):
            made(self, *args, **options)
            caches.append(self)

        monkeypatch.setattr(kind, "__init__", init)
    monkeypatch.setattr(PromptLayer, "attended", watched)
    tensors = []
    take = RankingCache.verdicts

    def verdicts(self, *args):
        for layer in self.layers:
            tensors.extend(each for said in layer.said.values() for each in (said.importance, layer.valid))
        return take(self, *args)

    monkeypatch.setattr(RankingCache, "verdicts", verdicts)
    compress_document(loaded, TEXT, make_plan(loaded.model, method="kvzip", budget=12), prefill_chunk=16)
    assert max(live) == 1 and {RankingCache, HeadCache, FanOutCache} == {type(cache) for cache in caches}
    assert held and max(held) < whole
    scores = 4 * loaded.shape.num_kv_heads * whole * 4  # of four layers, four bytes each
    assert sum(each.untyped_storage().nbytes() for each in tensors) == scores + 4 * whole


def test_decoding_goes_on_by_the_counts_of_the_document():
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="kvzip", budget=16, buffer=4)
    cache = compress_document(loaded, TEXT, plan)
    counts = cache.lengths[:, 0]
    assert torch.equal(cache.plan.decode_allocation(cache.get_seq_length()), counts)
    assert cache.plan.method == plan.method and plan.shares is None
    with attending_ragged(loaded.model), torch.no_grad():
        for token in range(3, 40):
            loaded.model(torch.tensor([[token]]), past_key_values=cache)
    assert bool((cache.lengths[:, 0] <= counts + 4).all()) and bool((cache.lengths[:, 0] > counts).all())
    doubled = make_plan(loaded.model, method="kvzip", budget=16, decode_budget=32)
    targets = compress_document(loaded, TEXT, doubled).plan.decode_allocation(500)
    assert int(targets.sum()) == 2 * int(counts.sum()) and bool((targets >= counts).all())


def test_a_batch_is_ranked_as_each_prompt_is_alone():
    """With padding; each sequence has its own counts and goes on by them, and beams take theirs along."""
    model = tiny_model(layers=3)
    prompts, lengths = random_ids(2, 40), [40, 29]
    ids, mask = left_padded(prompts, lengths)
    plan = make_plan(model, method="kvzip", budget=9, buffer=4)
    with attending_ragged(model), torch.no_grad():
        batch = HeadCache(plan)
        model(ids, attention_mask=mask, past_key_values=batch)
        batch.batch_select_indices(torch.tensor([1, 0, 1]))
        for entry, length in enumerate([lengths[1], lengths[0], lengths[1]]):
            alone = HeadCache(plan)
            prefill(model, prompts[1 - entry % 2, :length][None], alone)
            assert torch.equal(batch.lengths[:, entry], alone.lengths[:, 0])
            found, expected = batch.plan.decode_allocation(60)[entry], alone.plan.decode_allocation(60)
            assert torch.equal(found, expected)


def test_several_caches_from_two_readings():
    """Of a fan-out only those that rank are judged before; the first reading serves all of them."""
    loaded = load_tiny()
    plans = [
        make_plan(loaded.model, random_profile(loaded.model), method=name, budget=budget)
        for name, budget in (("kvzip", 12), ("headkv-kvzip", 12), ("kvzip", 20), ("snapkv", 9))
    ]
    ids = random_ids(1, 60)
    with attending_ragged(loaded.model), torch.no_grad():
        together = [HeadCache(plan) for plan in plans]
        prefill(loaded.model, ids, FanOutCache(together))
        for cache, plan in zip(together, plans, strict=True):
            alone = HeadCache(plan)
            prefill(loaded.model, ids, alone)
            check_same(cache, alone)
            assert cache.plan.shares is None or torch.equal(cache.plan.shares, alone.plan.shares)


def test_generate_reads_a_prompt_twice_and_by_its_last_queries():
    model = tiny_model(layers=3)
    ids = random_ids(1, 50)
    with compressed(model, method="kvzip", budget=9) as plan, torch.no_grad():
        made = model.generate(ids, **GREEDY, max_new_tokens=6)
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    twin = tiny_model(layers=3, attn="eager")
    attentions = twin(ids, output_attentions=True, use_cache=False).attentions
    ranked = []
    for attention in attentions:
        paid = attention[0, :, -16:].unflatten(0, (2, -1)).amax(dim=(1, 2))
        paid[:, :1] = paid[:, -2:] = float("inf")
        ranked.append(paid[None])
    counts = slow_counts(ranked, [9 * 6])[0]
    assert torch.equal(cache.lengths[:, 0], counts)
    assert made.shape == (1, 56)


def test_any_importance_and_reduction_may_rank_together():
    loaded = load_tiny()
    method = Method(WindowAttention(), GlobalBudget(), EvictThenMerge(threshold=-1.0, coverage=1.0))
    plan = make_plan(loaded.model, method=method, budget=12)
    cache = compress_document(loaded, TEXT, plan)
    assert int(cache.lengths.sum()) == 12 * 4
    assert any("bias" in layer.storage.rows.columns for layer in cache.head_layers)


def test_observers_by_hand_are_refused_where_all_layers_are_ranked():
    model = tiny_model()
    plan = make_plan(model, method="kvzip", budget=10).for_observers(20)
    cache = HeadCache(plan)
    cache.expect_observers(20)
    with (
        attending_ragged(model),
        pytest.raises(UsageError, match=r"'kvzip' ranks the rows of all layers together.*choose adakv-kvzip"),
    ):
        prefill(model, random_ids(1, 60), cache)


def test_a_budget_below_what_every_head_keeps_is_refused_before_any_reading():
    loaded = load_tiny()
    with pytest.raises(UsageError, match="below the 3 that every head keeps"):
        compress_document(loaded, TEXT, make_plan(loaded.model, method="kvzip", budget=2))


def test_progress_counts_both_readings():
    loaded, seen = load_tiny(layers=3), []
    plan = make_plan(loaded.model, method="kvzip", budget=12)
    compress_document(loaded, TEXT, plan, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_a_saved_document_goes_on_by_its_counts(tiny, tmp_path):
    plan = make_plan(tiny.model, method="kvzip", budget=16, buffer=6)
    cache = compress_document(tiny, TEXT, plan)
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
    again, _ = load_document(tmp_path / "doc.kv.safetensors", tiny)
    assert torch.equal(again.plan.shares, cache.plan.shares)
    assert torch.equal(again.plan.decode_allocation(300), cache.plan.decode_allocation(300))
    answers = [ask(tiny, each, "How many boats?", max_new_tokens=30).text for each in (cache, again)]
    assert answers[0] == answers[1]
    stack = stack_caches([cache, again])
    assert head_positions(stack)[0] == head_positions(cache)[0] + head_positions(again)[0]


def test_a_document_of_the_former_kvzip_is_of_adakv_kvzip(tiny, tmp_path):
    plan = make_plan(tiny.model, method="adakv-kvzip", budget=16)
    plan.name = "kvzip"
    cache = compress_document(tiny, TEXT, plan)
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
    again, _ = load_document(tmp_path / "doc.kv.safetensors", tiny)
    assert again.plan.name == "adakv-kvzip" and again.plan.method == METHODS["adakv-kvzip"]


def test_the_table():
    assert METHODS["kvzip"] == Method(Reconstruction(), GlobalBudget())
