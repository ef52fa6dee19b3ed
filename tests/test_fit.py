"""Rows fitted to what a head's attention was: against loops in float64, what must not change, and whole generations."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.devices import interpreted
from support.observations import as_held_rows, compress, observed_prompt, with_rows
from support.profiles import random_profile
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import ARCHITECTURES, load_tiny, three_layers, tiny_model
from support.twins import slow_attention

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.kernels.backends import ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.methods.budget import AdaptiveBudget, UniformBudget
from headprof.compression.methods.fit import Fit
from headprof.compression.methods.importance import KeyNorm
from headprof.compression.methods.method import Method
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.reduction import Choice, Evict
from headprof.compression.methods.table import METHODS, find_method
from headprof.compression.rows import HeadCounts
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import UsageError

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 3
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
BACKENDS = ("torch", pytest.param("triton", marks=interpreted))


# The twin: one head after the other, in float64.


def slow_weights(paid, whole, ridge, bound):
    """Bounded least squares, one weight at a time until none moves any more."""
    rows = paid.shape[1]
    pull = ridge * mean_square(paid)
    weights = torch.ones(rows, dtype=torch.float64)
    for _ in range(5000):
        before = weights.clone()
        for j in range(rows):
            others = paid @ weights - paid[:, j] * weights[j]
            exact = (paid[:, j] @ (whole - others) + pull) / (paid[:, j] @ paid[:, j] + pull)
            weights[j] = exact.clamp(math.exp(-bound), math.exp(bound))
        if (weights - before).abs().max() < 1e-12:
            break
    slope = paid.T @ (paid @ weights - whole) + pull * (weights - 1)  # of half the error: nothing better is near
    inside = (weights > math.exp(-bound) * (1 + 1e-9)) & (weights < math.exp(bound) * (1 - 1e-9))
    assert (slope[inside].abs() < 1e-7).all()
    assert (slope[weights <= math.exp(-bound) * (1 + 1e-9)] > -1e-7).all()
    assert (slope[weights >= math.exp(bound) * (1 - 1e-9)] < 1e-7).all()
    return weights


def mean_square(paid):
    squares = paid.square().sum(dim=0)
    return squares.sum() / max(1, int((squares > 0).sum()))


def shares_of(paid):
    return torch.stack([row / row.sum() if row.sum() > 0 else row for row in paid])


def slow_fit(fit, attention, values, kept):
    """Weights, values and whether they are closer, of one head.

    Args:
        attention: of each query to each row, `[N, T]`; zeros where a query does not count.
        values: `[T, D]`.
        kept: which rows, bool `[T]`.
    """
    paid, whole, output = attention[:, kept], attention.sum(dim=-1), attention @ values
    weights = torch.ones(int(kept.sum()), dtype=torch.float64)
    if fit.bias:
        counts = [max(float(row.max()), 1e-30) ** -fit.diffuse for row in attention]
        counts = torch.tensor(counts, dtype=torch.float64)
        weights = slow_weights(paid * counts[:, None], whole * counts, fit.ridge, fit.bound)
    shares, own = shares_of(paid * weights), values[kept]
    pull = max(1e-30, fit.ridge * mean_square(shares))
    normal = shares.T @ shares + pull * torch.eye(len(own), dtype=torch.float64)
    new = torch.linalg.inv(normal) @ (shares.T @ output + pull * own)
    fitted, evicted = (shares @ new - output).square().sum(), (shares_of(paid) @ own - output).square().sum()
    return weights, new, float(fitted), float(evicted)


def queries_of(fit, held, is_prompt):
    """Which of the held queries count."""
    last = min(fit.observers, held)
    before, newest = list(range(held - last)), list(range(held - last, held))
    return [*(spaced(before, fit.own) if is_prompt else []), *spaced(newest, fit.queries)]


def spaced(numbers, most):
    count = min(len(numbers), most)
    return [numbers[(i + 1) * len(numbers) // count - 1] for i in range(count)]


@st.composite
def layers(draw, held=None):
    """A prompt's or held rows, how many each head keeps, and a fit."""
    batch, num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.integers(3, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : draw(st.integers(0, tokens - 3))] = False
    valid[:, tokens - draw(st.integers(0, min(2, int(valid[0].sum()) - 1))) :] = False
    observed = observed_prompt(
        torch.randn(batch, num_kv_heads * group, tokens, 8, generator=generator).to(dtype),
        torch.randn(batch, num_kv_heads, tokens, 8, generator=generator).to(dtype),
        valid,
        scaling=draw(st.sampled_from([0.4, 1.0])),
        softcap=draw(st.sampled_from([None, 2.0])),
        sliding_window=draw(st.sampled_from([None, 5])),
    )
    most = valid.sum(dim=-1, keepdim=True).expand(-1, num_kv_heads)
    counts = (torch.rand(most.shape, generator=generator) * most).long() + 1
    if draw(st.booleans()) if held is None else held:
        observed = as_held_rows(observed)
        if draw(st.booleans()):
            observed = with_rows(observed, bias=torch.randn(batch, num_kv_heads, tokens, generator=generator))
    fit = Fit(
        observers=draw(st.integers(1, 24)),
        own=draw(st.integers(0, 9)),
        queries=draw(st.integers(1, 24)),
        bias=draw(st.booleans()),
        bound=draw(st.sampled_from([0.3, 3.0])),
        ridge=draw(st.sampled_from([0.03, 1.0])),
        least=draw(st.sampled_from([0.0, 1.0])),
        diffuse=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    return observed, HeadCounts.of(counts, "cpu"), fit


def reduced(fit, observed, counts):
    """What a head keeps by the norm of its keys, evicted and fitted."""
    method = Method(KeyNorm(), UniformBudget(), Evict(), sinks=0, keep_last=0)
    return compress(method, observed, counts), compress(replace(method, reduction=fit), observed, counts)


def seen_by(fit, observed):
    """Attention of each query that counts to each row, float64 `[B, H, n, T]`."""
    index = queries_of(fit, observed.queries.shape[2], observed.is_prompt)
    rows = observed if not observed.is_prompt else as_held_rows(observed)
    asked = rows.query_valid
    if observed.is_prompt:  # of a prompt's padding nobody asks
        asked = observed.valid if observed.padded else None
    rows = replace(
        rows,
        queries=rows.queries[:, :, index],
        query_positions=rows.query_positions[index],
        query_valid=None if asked is None else asked[:, index],
    )
    return slow_attention(rows)


@given(layers())
@settings(max_examples=40, deadline=None)
def test_it_equals_its_slow_twin(given_layer):
    observed, counts, fit = given_layer
    evicted, fitted = reduced(fit, observed, counts)
    assert torch.equal(evicted.keys, fitted.keys) and torch.equal(evicted.positions, fitted.positions)
    attention = seen_by(fit, observed)
    tolerance, start = TOLERANCE[observed.keys.dtype], 0
    num_kv_heads, group = observed.keys.shape[1], observed.queries.shape[1] // observed.keys.shape[1]
    for head, count in enumerate(counts.lengths):
        b, k = divmod(head, num_kv_heads)
        own, start = slice(start, start + count), start + count
        values, new = evicted.values[own].double(), fitted.values[own].double()
        bias = fitted.column("bias")[own] - evicted.column("bias")[own]
        paid = attention[b, k * group : (k + 1) * group].flatten(0, 1)
        kept = torch.zeros(paid.shape[1], dtype=torch.bool)
        kept[fitted.positions[own].long()] = True
        weights, wanted, error, plain = slow_fit(fit, paid, observed.values[b, k].double(), kept)
        asked = int((paid.sum(dim=-1) > 0.5).sum())
        loses = count < int(observed.valid_rows()[b, k].sum())
        if not loses or asked < fit.least * count:
            assert torch.equal(values, new) and not bias.any()
            continue
        assume(abs(error - plain) > 1e-2 * plain + 1e-5)  # else rounding decides
        if error > plain:
            assert torch.equal(values, new) and not bias.any()
            continue
        torch.testing.assert_close(new, wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(bias.double(), weights.log(), atol=2e-3, rtol=2e-3)


@given(layers(), st.sampled_from(["importance", "omp"]))
@settings(max_examples=40, deadline=None)
def test_the_output_is_never_further_away_than_that_of_evicted_rows(given_layer, choose):
    observed, counts, fit = given_layer
    evicted, fitted = reduced(replace(fit, choose=choose), observed, counts)
    if choose == "omp":
        evicted = with_values(evicted, fitted, observed, counts)
    attention, start = seen_by(fit, observed), 0
    num_kv_heads, group = observed.keys.shape[1], observed.queries.shape[1] // observed.keys.shape[1]
    for head, count in enumerate(counts.lengths):
        b, k = divmod(head, num_kv_heads)
        own, start = slice(start, start + count), start + count
        paid = attention[b, k * group : (k + 1) * group].flatten(0, 1)
        output = paid @ observed.values[b, k].double()
        errors = []
        for rows in (evicted, fitted):
            bias = rows.column("bias")[own].double()
            if "bias" in observed.rows.columns:
                bias = bias - observed.rows.columns["bias"][b, k, rows.positions[own].long()].double()
            shares = shares_of(paid[:, rows.positions[own].long()] * bias.exp())
            errors.append(float((shares @ rows.values[own].double() - output).square().sum()))
        assert errors[1] <= errors[0] * (1 + 1e-4) + 1e-6


def with_values(evicted, fitted, observed, counts):
    """The rows that were fitted, as they were before."""
    heads = torch.arange(len(counts.lengths)).repeat_interleave(torch.tensor(counts.lengths))
    places = (heads // observed.keys.shape[1], heads % observed.keys.shape[1], fitted.positions.long())
    return replace(observed.rows.at(places, counts), lengths=evicted.lengths)


def sharp_layer(seed=0, tokens=60, dtype=torch.float32, count=20):
    """Queries that look hard at some of many keys."""
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(1, 4, tokens, 16, generator=generator)
    keys, values = (torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))
    observed = observed_prompt(*(each.to(dtype) for each in (queries, keys)), None, values.to(dtype), scaling=0.4)
    return replace(observed, padded=False), HeadCounts.of(torch.tensor([[count, count]]), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_fitted_rows_is_closer_to_the_whole_head(backend, dtype):
    """Through the attention that later tokens run: the output, and how much is left for a token that comes after."""
    observed, counts = sharp_layer(dtype=dtype)
    query = observed.queries[:, :, -1:]
    errors, whole = [], observed.last_attention(1)[..., 0, :] @ observed.values.float()[:, :, None].squeeze(2)
    for rows in reduced(Fit(observers=60), observed, counts):
        bounds = torch.tensor([0, 20, 20, 40, 40], dtype=torch.int32)
        held = RaggedRows(rows.keys, rows.values, rows.positions, bounds, 20, 20, rows.columns.get("bias"))
        output = ragged_attention(query, held, 2, scaling=0.4, backend=backend)
        errors.append(float((output[:, 0].view(1, 2, 2, 16).float() - whole).square().sum()))
    assert errors[1] < errors[0]


def test_weights_draw_the_mass_of_all_rows():
    observed, counts = sharp_layer()
    fit, attention = Fit(observers=60, ridge=1e-3, bound=3.0, diffuse=0.0), seen_by(Fit(observers=60), observed)
    _, rows = reduced(fit, observed, counts)
    for k in range(2):
        own = slice(20 * k, 20 * (k + 1))
        paid = attention[0, 2 * k : 2 * k + 2].flatten(0, 1)[:, rows.positions[own].long()]
        before, after = paid.sum(dim=-1), paid @ rows.columns["bias"][own].double().exp()
        assert (after - 1).square().mean() < 0.8 * (before - 1).square().mean()
        assert rows.columns["bias"][own].abs().max() <= 3.0 + 1e-5


def test_without_bias_rows_have_no_column():
    observed, counts = sharp_layer()
    evicted, rows = reduced(Fit(observers=60, bias=False), observed, counts)
    assert "bias" not in rows.columns and not torch.equal(rows.values, evicted.values)


# Rows chosen by what is missing.


def slow_pursuit(fit, paid, whole, always, count, pooled):
    """One row after the other: the one whose attention has most in common with what is missing."""
    counts = paid.amax(dim=-1) ** -fit.diffuse
    paid, whole, chosen = paid * counts[:, None], whole * counts, list(always)
    while len(chosen) < count:
        missing = whole
        if chosen:
            held = torch.zeros_like(paid)
            held[:, chosen] = paid[:, chosen]
            weights = slow_weights(held[:, chosen], whole, fit.ridge, fit.bound)
            missing = whole - held[:, chosen] @ weights
        worth = sorted(((float(paid[:, j] @ missing), j) for j in pooled if j not in chosen), reverse=True)
        assert len(worth) < 2 or worth[0][0] - worth[1][0] > 1e-5  # else rounding decides
        chosen.append(worth[0][1])
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(4))
def test_pursuit_equals_its_slow_twin(seed):
    observed, counts = sharp_layer(seed, tokens=24, count=9)
    fit = Fit(observers=24, choose="omp", rounds=6, breadth=100.0, ridge=0.05)
    method = Method(KeyNorm(), UniformBudget(), fit, sinks=1, keep_last=2)
    rows, attention = compress(method, observed, counts), seen_by(fit, observed)
    for k in range(2):
        paid = attention[0, 2 * k : 2 * k + 2].flatten(0, 1)
        expected = slow_pursuit(fit, paid, paid.sum(dim=-1), [0, 22, 23], 9, range(24))
        assert rows.positions[9 * k : 9 * (k + 1)].tolist() == expected


@given(layers(), st.integers(1, 5), st.sampled_from([1.0, 1.5, 4.0]), st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_pursuit_keeps_as_many_rows_and_those_that_must_stay(given_layer, rounds, breadth, sinks, keep_last):
    observed, counts, fit = given_layer
    counts = HeadCounts.of(
        counts.counts.clamp(min=sinks + keep_last).minimum(observed.valid.sum(-1)[..., None])
        if observed.valid.ndim == 2
        else counts.counts,
        "cpu",
    )
    fit = replace(fit, choose="omp", rounds=rounds, breadth=breadth)
    method = Method(KeyNorm(), UniformBudget(), Evict(), sinks=sinks, keep_last=keep_last)
    evicted, rows = compress(method, observed, counts), compress(replace(method, reduction=fit), observed, counts)
    assert rows.lengths == evicted.lengths and len(rows.keys) == len(evicted.keys)
    start, num_kv_heads = 0, observed.keys.shape[1]
    for head, count in enumerate(counts.lengths):
        b, k = divmod(head, num_kv_heads)
        held, start = rows.positions[start : start + count].tolist(), start + count
        real = observed.valid_rows()[b, k].nonzero()[:, 0].tolist()
        assert held == sorted(set(held)) and set(held) <= set(real)
        if count >= sinks + keep_last:
            assert set(real[:sinks]) | set(real[len(real) - keep_last :]) <= set(held)


# What stays as it is.


@pytest.mark.parametrize("choose", ["importance", "omp"])
def test_a_head_that_loses_nothing_is_left_as_it_is(choose):
    observed, _ = sharp_layer()
    counts = HeadCounts.of(torch.tensor([[60, 20]]), "cpu")
    evicted, rows = reduced(Fit(observers=60, choose=choose), observed, counts)
    assert torch.equal(rows.values[:60], evicted.values[:60]) and not rows.columns["bias"][:60].any()
    assert not torch.equal(rows.values[60:], evicted.values[60:])


def test_where_no_head_loses_anything_there_is_no_bias():
    observed, counts = sharp_layer(count=60)
    evicted, rows = reduced(Fit(observers=60), observed, counts)
    assert torch.equal(rows.values, evicted.values) and "bias" not in rows.columns


def test_too_few_queries_evict():
    observed, counts = sharp_layer()  # 2 queries of the group for each observer, 20 rows
    for observers, changes in ((9, False), (10, True)):
        evicted, rows = reduced(Fit(observers=observers), observed, counts)
        assert torch.equal(rows.values, evicted.values) != changes
        assert rows.column("bias").any() == changes


def test_a_head_with_too_few_queries_keeps_its_rows():
    observed, _ = sharp_layer()
    counts = HeadCounts.of(torch.tensor([[10, 20]]), "cpu")
    evicted, rows = reduced(Fit(observers=9, choose="omp"), observed, counts)  # 18 queries of the group
    assert torch.equal(rows.values[10:], evicted.values[10:])
    assert torch.equal(rows.positions[10:], evicted.positions[10:])
    assert not torch.equal(rows.positions[:10], evicted.positions[:10])


def test_without_queries_rows_are_evicted():
    observed, counts = sharp_layer()
    held = as_held_rows(observed)
    held = replace(
        held,
        queries=held.queries[:, :, :0],
        query_positions=held.query_positions[:0],
        query_valid=held.query_valid[:, :0],
    )
    evicted, rows = reduced(Fit(observers=60), held, counts)
    assert torch.equal(rows.values, evicted.values) and not rows.column("bias").any()


def test_a_choice_without_queries_is_a_mistake():
    observed, counts = sharp_layer()
    kept = torch.arange(60).expand(1, 2, 60) < 20
    ranked = torch.zeros(1, 2, 60)
    with pytest.raises(ValueError, match="only to queries"):
        Fit().reduce(observed.rows, Choice(kept, ranked, ranked, counts))


@pytest.mark.parametrize(
    "setting",
    [
        "ridge=0",
        "diffuse=-1",
        "diffuse=1.5",
        "bound=0",
        "observers=0",
        "queries=0",
        "own=-1",
        "choose=best",
        "breadth=0.5",
        "least=-1",
        "rounds=0",
        "bound=21",
    ],
)
def test_what_makes_no_fit_is_refused(setting):
    with pytest.raises(UsageError):
        find_method(f"headkv-fit:{setting}")


# Whole models.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_with_the_budget_of_the_prompt_tokens_are_those_of_the_full_cache(arch):
    model, ids = three_layers(arch, 2), random_ids(1, 40)
    full = model.generate(ids, max_new_tokens=12, **GREEDY)
    method = replace(METHODS["headkv-fit"], budget=UniformBudget(), reduction=Fit(observers=40))
    with compressed(model, method=method, budget=40, buffer=None) as plan:
        cache = HeadCache(plan)
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=12, **GREEDY), full)
    assert all("bias" not in layer.storage.rows.columns for layer in cache.head_layers)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("own", [0, 7])
@torch.no_grad()
def test_padding_changes_nothing(arch, own):
    attn = "eager" if arch == "gemma2" else None
    model = tiny_model(arch, sliding_window=12, attn=attn)
    ids, lengths = random_ids(2, 50), [50, 31]
    method = Method(Reconstruction(30), UniformBudget(), Fit(observers=30, own=own))
    held = []
    padded, mask = left_padded(ids, lengths)
    for prompt, options in [
        (padded, {"attention_mask": mask}),
        *((ids[b : b + 1, :n], {}) for b, n in enumerate(lengths)),
    ]:
        with compressed(model, method=method, budget=8) as plan:
            cache = HeadCache(plan)
            model(prompt, past_key_values=cache, **options)
        held.append([layer.storage.compact() for layer in cache.head_layers])
    for together, first, second in zip(*held, strict=True):
        assert list(together.lengths) == [*first.lengths, *second.lengths]
        torch.testing.assert_close(together.values, torch.cat([first.values, second.values]), atol=1e-3, rtol=1e-3)
        both = torch.cat([first.column("bias"), second.column("bias")])
        torch.testing.assert_close(together.column("bias"), both, atol=1e-3, rtol=1e-3)
        assert together.column("bias").any()


@torch.no_grad()
def test_chunks_change_nothing():
    model, ids = tiny_model(), random_ids(1, 50)
    method = Method(Reconstruction(30), UniformBudget(), Fit(observers=30, own=5))
    held = []
    for chunk in (None, 7):
        with compressed(model, method=method, budget=8, prefill_chunk=chunk) as plan:
            cache = HeadCache(plan)
            model(ids, past_key_values=cache)
        held.append([layer.storage.compact() for layer in cache.head_layers])
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.column("bias"), other.column("bias"), atol=1e-3, rtol=1e-3)


def test_heads_that_share_a_layers_rows_are_fitted_too():
    observed, counts = sharp_layer()
    method = Method(KeyNorm(), AdaptiveBudget(), Fit(observers=60))
    evicted, rows = compress(replace(method, reduction=Evict()), observed, counts), compress(method, observed, counts)
    assert rows.counts.tolist() == evicted.counts.tolist() and torch.equal(rows.positions, evicted.positions)
    assert rows.columns["bias"].any()


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral"])
def test_a_loaded_document_answers_alike(arch, tmp_path):
    loaded = load_tiny(arch, sliding_window=30)
    plan = make_plan(loaded.model, random_profile(loaded.model), method="headkv-fit", budget=20, observers=40)
    cache = compress_document(loaded, TEXT, plan)
    assert any(layer.storage.rows.column("bias").any() for layer in cache.head_layers)
    save_document(cache, path := tmp_path / "keeper.kv.safetensors", loaded)
    again, notes = load_document(path, loaded)
    assert notes["method"] == "headkv-fit" and again.plan.method == cache.plan.method
    for layer, other in zip(cache.head_layers, again.head_layers, strict=True):
        one, two = layer.storage.compact(), other.storage.compact()
        assert torch.equal(one.values, two.values) and torch.equal(one.columns["bias"], two.columns["bias"])
    answers = [ask(loaded, each, "How many boats?", max_new_tokens=40).text for each in (cache, again)]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_rows_are_fitted_again_while_text_is_generated():
    """Also rows that carry a bias, by the newest queries of which as many are remembered as were asked for."""
    model, ids = tiny_model(), random_ids(1, 120)
    plan = make_plan(model, random_profile(model), method="headkv-fit", budget=12, buffer=8, observers=24)
    with attending_ragged(model):
        prefill(model, ids[:, :40], cache := HeadCache(plan))
        biases = []
        for seen in range(40, 120):
            model(ids[:, seen : seen + 1], past_key_values=cache)
            layer = cache.head_layers[1]
            assert len(layer.held.recent) <= 24 and max(layer.lengths) <= int(plan.decode_allocation(seen)[1].max()) + 8
            biases.append(layer.storage.compact().column("bias"))
    assert len({tuple(bias.sort().values.tolist()) for bias in biases}) > 10
    assert biases[-1].isfinite().all() and biases[-1].any()
