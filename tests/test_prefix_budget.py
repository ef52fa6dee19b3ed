"""One share of the attention for all layers: by bisection over single rows in Python, and in whole caches."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import load_tiny, tiny_model
from test_decoding import check_same
from test_reconstruction import TEXT, kept_positions

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.importance import KeyNorm
from headprof.compression.methods.method import Method
from headprof.compression.methods.prefix_budget import PrefixBudget, prefix_counts
from headprof.compression.methods.reduction import ranking
from headprof.compression.methods.table import METHODS
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import UsageError

PER_LAYER, PER_HEAD = "prefixkv", "prefixkv-heads"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# How many rows.


def units_of(importance, ranked, per):
    """The units of one sequence: of each its rows in order, `(head, weight, whether it is always kept)`."""
    units = []
    for own, order in zip(importance, ranked, strict=True):
        rows = [
            (-float(order[head, token]), token, head, Fraction(float(own[head, token])))
            for token in range(order.shape[1])
            for head in range(order.shape[0])
            if float(order[head, token]) > float("-inf")
        ]
        for group in [range(order.shape[0])] if per == "layer" else [[head] for head in range(order.shape[0])]:
            units.append([(row[2], row[3], row[0] == float("-inf")) for row in sorted(rows) if row[2] in group])
    return units


def prefix_length(rows, share):
    """The fewest rows whose importance makes up more than this share of all, of those in order; forced ones at least.

    Of a share that some rows make up exactly, the next row comes only when the share is beyond it; where nothing is
    important, none comes.
    """
    whole = sum(weight for _, weight, _ in rows)
    summed, length = Fraction(0), 0
    while length < len(rows) and (rows[length][2] or (whole and summed / whole < share)):
        summed += rows[length][1]
        length += 1
    return length


def bisected(units, total):
    """Lengths of all units at the largest share whose rows are not too many, and the rest by the order of rows."""
    low, high = Fraction(0), Fraction(1)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(prefix_length(rows, middle) for rows in units) <= total:
            low = middle
        else:
            high = middle
    lengths = [prefix_length(rows, low) for rows in units]
    for place in range(max(map(len, units))):  # what all these reach at once
        for number, rows in enumerate(units):
            at = lengths[number]
            if sum(lengths) < total and at == place < len(rows) and prefix_length(rows, high) > at:
                lengths[number] += 1
    for place in range(max(map(len, units))):  # rows that no attention lies on
        for number, rows in enumerate(units):
            if sum(lengths) < total and lengths[number] == place < len(rows):
                lengths[number] += 1
    return lengths


def slow_counts(importance, ranked, totals, per):
    batch, heads, _ = ranked[0].shape
    counts = torch.zeros(batch, len(ranked), heads, dtype=torch.int64)
    for entry, total in enumerate(totals):
        units = units_of([each[entry] for each in importance], [each[entry] for each in ranked], per)
        for number, length in enumerate(bisected(units, total)):
            for head, _, _ in units[number][:length]:
                counts[entry, number if per == "layer" else number // heads, head] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 4),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(3, 12),
    levels=st.sampled_from([2, 5, 10**4]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    per=st.sampled_from(["layer", "head"]),
)
@example(layers=1, batch=1, heads=2, tokens=7, levels=2, share=0.5, seed=174, per="head")  # nothing important in one
def test_rows_are_those_that_bisection_finds(layers, batch, heads, tokens, levels, share, seed, per):
    """Of few levels many rows are equal, and some zero; padding goes last, what every head keeps first."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : tokens // 3] = False
    importance = [
        torch.randint(levels, (batch, heads, tokens), generator=generator).float() ** (layer + 1)
        for layer in range(layers)
    ]
    ranked = [ranking(each, valid, sinks=1, keep_last=1) for each in importance]
    rows = valid.sum(dim=-1) * layers * heads
    totals = [max(2 * layers * heads, round(share * int(there))) for there in rows]
    totals = [min(total, int(there)) for total, there in zip(totals, rows, strict=True)]
    counts = prefix_counts(importance, ranked, totals, 0.0, per)
    assert torch.equal(counts, slow_counts(importance, ranked, totals, per))
    assert counts.sum(dim=(1, 2)).tolist() == totals
    assert (counts <= valid.sum(dim=-1)[:, None, None]).all()


def test_a_sharp_layer_keeps_few_rows():
    flat, sharp = torch.ones(1, 2, 100), 0.5 ** torch.arange(100.0).expand(1, 2, 100)
    ranked = [ranking(each, None, sinks=0, keep_last=0) for each in (flat, sharp)]
    counts = prefix_counts([flat, sharp], ranked, [100], 0.0)
    assert counts.sum() == 100 and int(counts[0, 1].max()) <= 3 and (counts[0, 0] > 40).all()


def test_what_is_kept_anyway_counts_as_attention():
    """A layer whose sink has most of the attention needs little more."""
    sinks = torch.ones(1, 1, 50)
    sinks[..., 0] = 1000.0
    plain = torch.ones(1, 1, 50)
    counts = prefix_counts(
        [sinks, plain], [ranking(each, None, sinks=1, keep_last=0) for each in (sinks, plain)], [40], 0
    )
    assert counts.tolist() == [[[1], [39]]]


# Caches.


def slow_choice(attentions, total, per, heads, always=(1, 2)):
    """What each head keeps by the matrices `[H, T, T]` of all layers, `[L][K]` sorted positions."""
    importance, ranked = [], []
    for attention in attentions:
        received = attention.sum(dim=1).unflatten(0, (heads, -1)).mean(dim=1)  # [K, T]
        received = received.mean(dim=0, keepdim=True).expand(heads, -1) if per == "layer" else received
        importance.append(received[None])
        ranked.append(ranking(received[None], None, sinks=always[0], keep_last=always[1]))
    counts = slow_counts(importance, ranked, [total], per)[0]
    return [
        [
            head.argsort(descending=True, stable=True)[: int(count)].sort().values.tolist()
            for head, count in zip(layer[0], own, strict=True)
        ]
        for layer, own in zip(ranked, counts, strict=True)
    ]


@pytest.mark.parametrize(("name", "per"), [(PER_LAYER, "layer"), (PER_HEAD, "head")])
def test_a_prompt_keeps_what_whole_matrices_say(name, per):
    model, ids = tiny_model(layers=3), random_ids(1, 50)
    with compressed(model, method=name, budget=12) as plan:
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    attentions = tiny_model(layers=3, attn="eager")(ids, output_attentions=True, use_cache=False).attentions
    expected = slow_choice([attention[0] for attention in attentions], 12 * 6, per, 2)
    assert [layer[0] for layer in kept_positions(cache)] == expected
    assert int(cache.lengths.sum()) == 12 * 6 and len(set(cache.lengths.flatten().tolist())) > 1
    if per == "layer":  # but for what is left over, the heads of a layer keep the same
        assert int((cache.lengths.amax(dim=2) - cache.lengths.amin(dim=2)).max()) <= 1


@pytest.mark.parametrize("name", [PER_LAYER, PER_HEAD])
def test_the_whole_context_is_the_full_cache(name):
    model, ids = tiny_model(layers=3), random_ids(1, 40)
    full = model.generate(ids, **GREEDY, max_new_tokens=8)
    for budget in (40, 60, "100%"):
        with compressed(model, method=name, budget=budget):
            assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=8), full)


@pytest.mark.parametrize("name", [PER_LAYER, PER_HEAD])
def test_a_batch_is_as_each_prompt_alone_and_so_is_a_fan_out(name):
    model = tiny_model(layers=3)
    prompts, lengths = random_ids(2, 40), [40, 29]
    ids, mask = left_padded(prompts, lengths)
    plan = make_plan(model, method=name, budget=9, buffer=4)
    with attending_ragged(model):
        batch = HeadCache(plan)
        model(ids, attention_mask=mask, past_key_values=batch)
        for entry, length in enumerate(lengths):
            alone, other = HeadCache(plan), HeadCache(make_plan(model, method="h2o", budget=9))
            prefill(model, prompts[entry, :length][None], FanOutCache([alone, other]))
            assert torch.equal(batch.lengths[:, entry], alone.lengths[:, 0])
            assert int(alone.lengths.sum()) == 9 * 6
            single = HeadCache(plan)
            prefill(model, prompts[entry, :length][None], single)
            check_same(alone, single)


@pytest.mark.parametrize("name", [PER_LAYER, PER_HEAD])
def test_generation_goes_on_by_the_counts_of_the_prompt(name):
    model = tiny_model(layers=3)
    with attending_ragged(model):
        cache = HeadCache(make_plan(model, method=name, budget=12, buffer=4))
        prefill(model, random_ids(1, 50), cache)
        counts = cache.lengths[:, 0]
        stack = stack_caches([cache, cache])
        for token in range(3, 40):
            ids = torch.tensor([[token]])
            model(ids, past_key_values=cache)
            model(ids.expand(2, 1), past_key_values=stack)
    assert bool((cache.lengths[:, 0] <= counts + 4).all()) and bool((cache.lengths[:, 0] > counts).all())
    assert torch.equal(stack.lengths[:, 1], cache.lengths[:, 0])
    if name == PER_LAYER:  # the heads of a layer still hold the same tokens, but for what is left over
        for layer in kept_positions(cache):
            first, second = (set(head) for head in layer[0])
            assert len(first ^ second) <= 2


def test_a_saved_document_goes_on_alike(tmp_path):
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, make_plan(loaded.model, method=PER_LAYER, budget=16, buffer=6))
    assert int(cache.lengths.sum()) == 16 * 4
    save_document(cache, tmp_path / "doc.kv.safetensors", loaded)
    again, _ = load_document(tmp_path / "doc.kv.safetensors", loaded)
    assert again.plan.method == METHODS[PER_LAYER]
    assert torch.equal(again.plan.shares, cache.plan.shares)
    answers = [ask(loaded, each, "How many boats?", max_new_tokens=30).text for each in (cache, again)]
    assert answers[0] == answers[1]


def test_what_cannot_be_added_up_is_refused():
    with pytest.raises(UsageError, match="KeyNorm is no attention"):
        Method(KeyNorm(), PrefixBudget())
    with pytest.raises(UsageError, match="per 'token': choose layer or head"):
        make_plan(tiny_model(), method="prefixkv", per="token")
