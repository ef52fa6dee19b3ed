"""Evict-then-merge against loops in float64, and what merged rows mean to attention."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.observations import observed_prompt

from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.kernels import looking
from headprof.compression.kernels.backends import ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.importance import KeyNorm
from headprof.compression.methods.merging import EvictThenMerge, nearest, redundancy, sparsity
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import Assessment
from headprof.compression.methods.reduction import Choice, Evict, largest
from headprof.compression.plan import CompressionPlan
from headprof.compression.rows import Rows
from headprof.models.shape import HeadShape

INF = float("inf")
LEAST = torch.finfo(torch.float32).tiny
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@dataclass
class Block:
    """Rows `[B, K, T, ...]` and what is known of each, some of it before they are reduced, some after."""

    keys: torch.Tensor
    values: torch.Tensor
    ranked: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    received: torch.Tensor | None = None


def reduce(reduction, block, kept):
    """What a reduction makes of a block, flat."""
    columns = {name: getattr(block, name) for name in ("bias", "received") if getattr(block, name) is not None}
    rows = Rows.of_prompt(block.keys, block.values).with_columns(columns)
    reduced = reduction.reduce(rows, Choice(kept, block.ranked, block.weights))
    assert reduced.lengths == kept.sum(dim=-1).flatten().tolist()
    assert torch.equal(reduced.positions, rows.positions[kept]) and reduced.positions.dtype == torch.int32
    return Block(reduced.keys, reduced.values, **reduced.columns)


# The twin: one head after the other, one row after the other.


def cosine(one, other):
    """Of two rows; a row of zeros is similar to nothing."""
    norms = math.sqrt(float(one @ one)) * math.sqrt(float(other @ other))
    return float(one @ other) / norms if norms else 0.0


def slow_sparsity(weights, coverage):
    """How many of the largest weights sum to a share of all."""
    total, held, count = sum(weights), 0.0, 0
    for weight in sorted(weights, reverse=True):
        held, count = held + weight, count + 1
        if held >= coverage * total:
            break
    return count


def slow_redundancy(keys):
    """Mean cosine similarity over all pairs, a key with itself included."""
    return sum(cosine(one, other) for one in keys for other in keys) / len(keys) ** 2


class Head:
    """One head's rows, in float64."""

    def __init__(self, rows, b, k):
        self.keys, self.values = rows.keys[b, k].double(), rows.values[b, k].double()
        self.ranked = rows.ranked[b, k].tolist()
        self.attention = rows.weights[b, k].tolist()
        least = max(1e-6 * max(self.attention), LEAST)
        self.weights = [max(weight, least) for weight in self.attention]
        self.bias = None if rows.bias is None else rows.bias[b, k].tolist()
        self.received = None if rows.received is None else rows.received[b, k].tolist()
        self.valid = [t for t, rank in enumerate(self.ranked) if rank > -INF]


def slow_candidates(merge, head, kept):
    """Rows that may join a centre, best first; no example where rounding decides how many."""
    centres = [t for t in kept if head.ranked[t] < INF]
    if not centres:
        return []
    count = math.floor(len(centres) * merge.candidates)
    if merge.coverage < 1:
        count = min(count, max(0, slow_sparsity([head.attention[t] for t in head.valid], merge.coverage) - len(kept)))
    free = sorted((t for t in head.valid if t not in kept), key=lambda t: (-head.ranked[t], t))
    count = min(count, len(free))
    if merge.redundancy:
        share = max(0.0, slow_redundancy(head.keys[head.valid])) ** merge.redundancy
        assume(share == 1 or abs(count * share - round(count * share)) > 1e-4 or count == 0)
        count = math.floor(count * share)
    return free[:count]


def slow_clusters(merge, head, kept):
    """Which rows each centre takes in; no example where rounding decides between two classes."""
    members = {t: [] for t in kept if head.ranked[t] < INF}
    for candidate in slow_candidates(merge, head, kept):
        best, similarity, all_similarities = None, merge.threshold, [merge.threshold]
        for centre in members:
            all_similarities.append(cosine(head.keys[candidate], head.keys[centre]))
            if all_similarities[-1] > similarity:
                best, similarity = centre, all_similarities[-1]
        assume(all(each == similarity or similarity - each > 1e-5 for each in all_similarities))
        if best is not None:
            members[best].append(candidate)
    return members


def slow_reduced(merge, head, kept):
    """What one head holds: lists of keys, values, biases and received attention."""
    clusters = slow_clusters(merge, head, kept)
    keys, values, biases, received = [], [], [], []
    for t in kept:
        cluster = [t, *clusters.get(t, [])]
        weights = [head.weights[j] for j in cluster]
        key, value, norm = torch.zeros_like(head.keys[t]), torch.zeros_like(head.values[t]), 0.0
        for j, weight in zip(cluster, weights, strict=True):
            key += weight / sum(weights) * head.keys[j]
            value += weight / sum(weights) * head.values[j]
            norm += weight / sum(weights) * float(head.keys[j].norm())
        if len(cluster) == 1 or not merge.merge_keys:
            key = head.keys[t]
        else:
            assume(norm == 0 or float(key.norm()) > 1e-2 * norm)  # else nobody knows its direction
            key = key * (norm / float(key.norm())) if norm else key
        keys.append(key)
        values.append(value)
        mass = math.log(sum(weights) / weights[0]) if merge.mass else 0.0
        biases.append((0.0 if head.bias is None else head.bias[t]) + mass)
        received.append(0.0 if head.received is None else sum(head.received[j] for j in cluster))
    return keys, values, biases, received


def of_head(kept, b, k):
    return kept[b, k].nonzero().flatten().tolist()


def heads_of(kept):
    return [(b, k) for b in range(kept.shape[0]) for k in range(kept.shape[1])]


# What is merged.


def random_keys(kind, shape, generator):
    """Keys whose cosines are exact in float32, with many equal ones, or Gaussian ones, some of them twice."""
    scale = 2.0 ** torch.randint(-2, 3, (*shape[:3], 1), generator=generator)
    if kind == "signs":
        return (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1) * scale
    if kind == "axes":
        return torch.eye(shape[3])[torch.randint(0, shape[3], shape[:3], generator=generator)] * scale
    if kind == "equal":
        return torch.ones(shape) * scale
    keys = torch.randn(shape, generator=generator)
    keys[:, :, : shape[2] // 2] += 3  # so that some are alike
    return keys


@st.composite
def cases(draw, *, ties):
    """Rows, which of them are kept, and how to merge; with `ties`, many rows are equally important."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([24, 17, 9, 2, 1]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    size = (batch, heads, tokens)
    kind = draw(st.sampled_from(["signs", "axes", "equal", "gauss"]))
    keys = random_keys(kind, (*size, draw(st.sampled_from([4, 16]))), generator)

    valid = torch.rand(size, generator=generator) < draw(st.sampled_from([1.0, 0.5]))
    valid[..., -1] = True
    ranked = torch.rand(size, generator=generator)
    if ties:
        ranked = (ranked * 3).floor()
    protected = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.2, 0.2, 1.0]))
    ranked = ranked.masked_fill(protected, INF).masked_fill(~valid, -INF)
    counts = (torch.rand(batch, heads, generator=generator) ** 2 * (valid.sum(-1) + 1)).long()
    if draw(st.integers(0, 3)) == 0:  # protected rows and one centre
        counts = ((ranked == INF).sum(-1) + 1).minimum(valid.sum(-1))

    keys[torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.1]))] = 0
    weights = torch.randint(0, 64, size, generator=generator) / 64 if ties else torch.rand(size, generator=generator)
    weights /= 16  # they are shares of attention
    weights[torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.3]))] = 0
    rows = Block(
        keys.to(dtype),
        torch.randn(*size, 8, generator=generator).to(dtype),
        ranked,
        weights,
        torch.randn(size, generator=generator) if draw(st.booleans()) else None,
        weights * torch.randint(1, 30, size, generator=generator) if draw(st.booleans()) else None,
    )
    merge = EvictThenMerge(
        threshold=draw(st.sampled_from([0.0, -1.0, -0.5, 0.25, 0.5, 0.6, 0.99])),
        candidates=draw(st.sampled_from([100.0, 2.0, 1.0, 0.5])),
        coverage=draw(st.sampled_from([1.0, 0.9, 0.9, 0.6])),
        redundancy=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        merge_keys=draw(st.booleans()),
        mass=draw(st.booleans()),
    )
    return rows, largest(ranked, counts), merge


def check_against_the_twin(rows, kept, merge):
    keys, values, biases, received = [], [], [], []
    for b, k in heads_of(kept):
        parts = slow_reduced(merge, Head(rows, b, k), of_head(kept, b, k))
        for all_heads, part in zip((keys, values, biases, received), parts, strict=True):
            all_heads.extend(part)
    reduced = reduce(merge, rows, kept)
    assert len(reduced.keys) == len(reduced.values) == len(keys)
    assert reduced.keys.dtype == reduced.values.dtype == rows.keys.dtype
    close = {"atol": TOLERANCE[rows.keys.dtype], "rtol": TOLERANCE[rows.keys.dtype]}
    if keys:
        torch.testing.assert_close(reduced.keys.double(), torch.stack(keys), **close)
        torch.testing.assert_close(reduced.values.double(), torch.stack(values), **close)
    if reduced.bias is None:
        assert rows.bias is None and not any(biases)
    else:
        torch.testing.assert_close(reduced.bias.tolist(), biases, atol=1e-4, rtol=1e-4)
    assert (reduced.received is None) == (rows.received is None)
    if reduced.received is not None:
        torch.testing.assert_close(reduced.received.tolist(), received, atol=1e-4, rtol=1e-4)


@given(cases(ties=False))
@settings(max_examples=300, deadline=None)
def test_merging_equals_its_slow_twin(case):
    check_against_the_twin(*case)


@given(cases(ties=True))
@settings(max_examples=300, deadline=None)
def test_of_equally_important_rows_the_earlier_is_the_better_candidate(case):
    check_against_the_twin(*case)


def simple_rows(keys, ranked, weights=None, values=None):
    """One head's rows `[T, D]`, as a block."""
    ranked = torch.as_tensor(ranked, dtype=torch.float32)
    weights = torch.ones_like(ranked) if weights is None else torch.as_tensor(weights)
    values = torch.arange(2.0 * len(ranked)).reshape(-1, 2) if values is None else values
    return Block(*(each[None, None] for each in (torch.as_tensor(keys), values, ranked, weights)))


EVERY = EvictThenMerge(threshold=0.5, candidates=100, coverage=1.0, redundancy=0.0, merge_keys=True, mass=True)


def test_of_equal_centres_the_earlier_takes_the_candidate():
    rows = simple_rows([[1.0, 0], [2, 0], [4, 0], [0, 1]], [3, 2, 1, 4])
    reduced = reduce(EVERY, rows, torch.tensor([[[True, True, False, True]]]))
    torch.testing.assert_close(reduced.bias, torch.tensor([math.log(2), 0, 0]))
    torch.testing.assert_close(reduced.keys, torch.tensor([[2.5, 0], [2, 0], [0, 1]]))


def test_a_candidate_no_more_similar_than_the_threshold_is_dropped():
    rows = simple_rows([[1.0, 1, 1, 1], [1, 1, 1, -1]], [2, 1])  # a cosine of exactly a half
    kept = torch.tensor([[[True, False]]])
    assert reduce(EVERY, rows, kept).bias.tolist() == [0]
    assert reduce(replace(EVERY, threshold=0.499), rows, kept).bias.tolist() == [pytest.approx(math.log(2))]


def test_of_equally_important_rows_the_earlier_is_the_only_candidate():
    values = torch.zeros(40, 2)
    values[1, 0] = 1
    rows = simple_rows(torch.ones(40, 4), [9.0] + [1.0] * 39, values=values)
    kept = torch.arange(40)[None, None] < 1
    assert reduce(replace(EVERY, candidates=1), rows, kept).values.tolist() == [[0.5, 0]]


def test_keys_that_cancel_out_stay_finite():
    """Four keys of length 2 ** 10 in one cluster that sum to nothing."""
    keys = 2.0**9 * torch.tensor([[1.0, 1, 1, 1], [-1, -1, 1, -1], [-1, 1, -1, -1], [1, -1, -1, 1]])
    assert not keys.sum(dim=0).any()
    rows = simple_rows(keys, [4, 3, 2, 1])
    reduced = reduce(replace(EVERY, threshold=-0.9), rows, torch.tensor([[[True, False, False, False]]]))
    assert reduced.bias.tolist() == [pytest.approx(math.log(4))] and reduced.keys.isfinite().all()


def test_a_centre_without_attention_that_takes_in_much_stays_finite():
    rows = simple_rows(torch.ones(9, 4), range(9, 0, -1), weights=[0.0] + [1.0] * 8)
    reduced = reduce(EVERY, rows, torch.arange(9)[None, None] < 1)
    assert reduced.bias.isfinite().all() and reduced.keys.isfinite().all() and reduced.values.isfinite().all()


def test_heads_whose_keys_are_all_alike_lose_no_candidate_to_rounding():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = simple_rows(torch.randn(64, generator=generator).expand(20, 64), torch.arange(20, 0, -1))
        kept = torch.arange(20)[None, None] < 2
        assert (
            int(
                replace(EVERY, redundancy=1.0).count_candidates(
                    rows.keys, Choice(kept, rows.ranked, rows.weights), kept
                )
            )
            == 18
        )


@given(cases(ties=True), st.booleans())
@settings(max_examples=50, deadline=None)
def test_merging_nothing_is_evicting(case, by_threshold):
    rows, kept, merge = case
    merge = replace(merge, threshold=1.0) if by_threshold else replace(merge, candidates=0.0)
    rows = replace(rows, bias=None)
    reduced, evicted = reduce(merge, rows, kept), reduce(Evict(), rows, kept)
    assert torch.equal(reduced.keys, evicted.keys) and torch.equal(reduced.values, evicted.values)
    assert reduced.bias is None
    assert reduced.received is None if rows.received is None else torch.equal(reduced.received, evicted.received)


@given(cases(ties=False))
@settings(max_examples=100, deadline=None)
def test_rows_that_take_nothing_in_stay_as_they_were_and_weight_is_conserved(case):
    rows, kept, merge = case
    reduced, before = reduce(merge, rows, kept), reduce(Evict(), rows, kept)
    row = 0
    for b, k in heads_of(kept):
        head, of_this = Head(rows, b, k), of_head(kept, b, k)
        clusters = slow_clusters(merge, head, of_this)
        held = 0.0
        for t in of_this:
            if not clusters.get(t):
                assert torch.equal(reduced.keys[row], before.keys[row])
                assert torch.equal(reduced.values[row], before.values[row])
                biases = [0 if each.bias is None else float(each.bias[row]) for each in (reduced, before)]
                assert biases[0] == biases[1]
                received = [None if each.received is None else float(each.received[row]) for each in (reduced, before)]
                assert received[0] == received[1]
            if merge.mass and t in clusters:
                added = 0 if reduced.bias is None else float(reduced.bias[row])
                added -= 0 if before.bias is None else float(before.bias[row])
                held += math.exp(added) * head.weights[t]
            row += 1
        if merge.mass:
            weight = sum(head.weights[j] for t, members in clusters.items() for j in [t, *members])
            assert held == pytest.approx(weight, rel=1e-4, abs=1e-6)


@given(cases(ties=False))
@settings(max_examples=100, deadline=None)
def test_each_head_alone_is_reduced_as_among_others(case):
    rows, kept, merge = case
    for b, k in heads_of(kept):  # where rounding decides, it may decide otherwise
        slow_reduced(merge, Head(rows, b, k), of_head(kept, b, k))
    together, start = reduce(merge, rows, kept), 0
    for b, k in heads_of(kept):
        of_this = {name: None if each is None else each[b : b + 1, k : k + 1] for name, each in vars(rows).items()}
        alone = reduce(merge, Block(**of_this), kept[b : b + 1, k : k + 1])
        part = slice(start, start + len(alone.keys))
        start = part.stop
        close = {"atol": 1e-5, "rtol": 1e-5 if rows.keys.dtype == torch.float32 else 0.01}
        torch.testing.assert_close(together.keys[part], alone.keys, **close)
        torch.testing.assert_close(together.values[part], alone.values, **close)
        bias = together.keys.new_zeros(len(alone.keys), dtype=torch.float32) if alone.bias is None else alone.bias
        assert together.bias is not None or not bias.any()
        torch.testing.assert_close(bias if together.bias is None else together.bias[part], bias)
        assert (alone.received is None) == (together.received is None)
        if alone.received is not None:
            torch.testing.assert_close(together.received[part], alone.received)
    assert start == len(together.keys)


@given(cases(ties=True), st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999]))
@settings(max_examples=60, deadline=None)
def test_sparsity_and_redundancy_equal_their_slow_twins(case, coverage):
    rows, kept, _ = case
    counts, similar = sparsity(rows.weights, rows.ranked, coverage), redundancy(rows.keys, rows.ranked > -INF)
    for b, k in heads_of(kept):
        head = Head(rows, b, k)
        assert int(counts[b, k]) == slow_sparsity([head.attention[t] for t in head.valid], coverage)
        assert float(similar[b, k]) == pytest.approx(slow_redundancy(head.keys[head.valid]), abs=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bounds_serve_where_nobody_may_look(data):
    rows, kept, merge = data.draw(cases(ties=data.draw(st.booleans())))
    known = reduce(merge, rows, kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "is_free", lambda device: False)
        bounded = reduce(merge, rows, kept)
    if known.bias is None and bounded.bias is not None:  # nothing has been merged
        assert not bounded.bias.any()
        bounded.bias = None
    for name in ("keys", "values", "bias", "received"):
        torch.testing.assert_close(getattr(bounded, name), getattr(known, name))


def test_classes_are_the_same_however_many_similarities_are_held_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    candidates, centres = torch.randn(3, 50, 8, generator=generator), torch.randn(3, 7, 8, generator=generator)
    is_centre = torch.arange(7) < torch.tensor([[7], [2], [0]])
    whole = nearest(candidates, centres, ~is_centre, 0.2)
    assert len(whole[0].unique()) == 8 and whole[1].max() == 2 and not whole[2].any()
    monkeypatch.setattr("headprof.compression.methods.merging._SIMILARITIES", 100)
    assert torch.equal(nearest(candidates, centres, ~is_centre, 0.2), whole)


# Mass: one row that stands for several draws their attention.

HEADS, DIM = 2, 16


def prompt_with_copies(copies, seed=0):
    """Keys and values `[1, HEADS, T, DIM]` of rows of which the fourth comes `copies` times, with other values."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, HEADS, 10, DIM, generator=generator)
    keys = torch.cat([keys, keys[:, :, 3:4].expand(-1, -1, copies - 1, -1)], dim=2)
    return keys, torch.randn(keys.shape, generator=generator)


def importance_of_first_copies(num_tokens):
    """The ten different rows before the copies."""
    importance = torch.where(torch.arange(num_tokens) < 10, 1.0, 0.5) + torch.linspace(0.1, 0, num_tokens)
    return importance.expand(1, HEADS, num_tokens)


def ragged(keys, values, bias=None):
    """`[HEADS, rows, DIM]` as the rows of so many heads without free space."""
    count = keys.shape[1]
    bounds = torch.tensor([[head * count, (head + 1) * count] for head in range(HEADS)]).flatten()
    bounds = torch.cat([bounds, bounds[-1:]]).int()
    positions = torch.arange(count, dtype=torch.int32).repeat(HEADS)
    return RaggedRows(keys.flatten(0, 1), values.flatten(0, 1), positions, bounds, count, count, bias)


def with_newest(each):
    """The last row of a head is the new token's: `[HEADS, rows, DIM]` with one more, alike in all."""
    return torch.cat([each, torch.full((HEADS, 1, DIM), 0.1)], dim=1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("copies", range(2, 9))
def test_a_merged_row_draws_the_attention_of_all_that_it_stands_for(copies, backend):
    keys, values = prompt_with_copies(copies)
    importance = importance_of_first_copies(keys.shape[2])
    rows = Block(keys, values, importance, torch.full_like(importance, 0.25))
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(copies))
    attend = {"num_kv_heads": HEADS, "scaling": 0.3, "backend": backend}
    expected = ragged_attention(query, ragged(with_newest(keys[0]), with_newest(values[0])), **attend)
    for mass in (True, False):
        merge = replace(EVERY, threshold=0.99, mass=mass)
        reduced = reduce(merge, rows, torch.arange(keys.shape[2]).expand(importance.shape) < 10)
        merged = [with_newest(each.view(HEADS, 10, DIM)) for each in (reduced.keys, reduced.values)]
        bias = None if reduced.bias is None else torch.nn.functional.pad(reduced.bias.view(HEADS, 10), (0, 1)).flatten()
        output = ragged_attention(query, ragged(*merged, bias), **attend)
        assert (bias is not None) == mass
        assert torch.allclose(output, expected, atol=1e-6, rtol=1e-6) == mass


def layer_plan(budget, **options):
    shape = HeadShape(
        architecture="Tiny", num_layers=1, num_heads=2 * HEADS, num_kv_heads=HEADS, head_dim=DIM, vocab_size=8
    )
    merge = replace(EVERY, threshold=0.99, **options)
    method = Method(KeyNorm(), UniformBudget(), merge, sinks=0, keep_last=0)
    return CompressionPlan(method, Budget.parse(budget), shape, torch.ones(1, HEADS), 4, buffer=100)


def compressed_layer(plan, keys, values):
    """A layer that was given a prompt of equally attended tokens, then one more."""
    layer, count = HeadCacheLayer(0, plan), keys.shape[2]
    layer.lazy_initialization(keys, values)
    layer.seen = count
    importance = importance_of_first_copies(count)
    ones = torch.ones_like(importance)
    observed = observed_prompt(keys[:, :, :0], keys, values=values, scaling=0.3)
    layer.compress(observed, Assessment(importance, ones, {"received": ones}))
    assert "received" in layer.storage.rows.columns
    layer.update(torch.full((1, HEADS, 1, DIM), 0.1), torch.full((1, HEADS, 1, DIM), 0.1))
    return layer


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("copies", range(2, 9))
def test_a_layer_of_merged_rows_attends_as_the_whole_one(copies, backend):
    keys, values = prompt_with_copies(copies, seed=copies)
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(copies))

    def attended(layer):
        return ragged_attention(query, layer.storage.in_place(), HEADS, scaling=0.3, backend=backend)

    expected = attended(compressed_layer(layer_plan(100), keys, values))
    merged = compressed_layer(layer_plan(10, mass=True), keys, values)
    assert merged.lengths == [11] * HEADS
    assert merged.storage.compact().columns["received"].view(HEADS, 11)[0].tolist() == [1, 1, 1, copies, *[1] * 6, 0]
    torch.testing.assert_close(attended(merged), expected, atol=1e-6, rtol=1e-6)
    light = compressed_layer(layer_plan(10, mass=False), keys, values)
    assert not torch.allclose(attended(light), expected, atol=1e-4)
