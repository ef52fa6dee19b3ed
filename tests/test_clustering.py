"""K-means over keys, and which rows of its clusters a query calls for, beside obvious twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof.compression.methods.clustering import cluster_keys
from headprof.compression.methods.recall import Recall, attention_shares, rows_of_nearest
from headprof.errors import UsageError


def clustered_slowly(keys, rows, per_cluster, iterations, seed):
    """Of one head, key by key: labels (`None` for a row that is not clustered), and each cluster's mean and size."""
    own = [t for t in range(len(keys)) if rows[t]]
    drawn = torch.rand(len(own), generator=torch.Generator().manual_seed(seed))
    order = dict(zip(own, drawn.tolist(), strict=True))
    number = -(-len(own) // per_cluster)
    centroids = [keys[t] for t in sorted(own, key=lambda t: -order[t])[:number]]
    for step in range(iterations + 1):
        labels = [
            max(range(number), key=lambda c: float(torch.cosine_similarity(keys[t], centroids[c], dim=0)))
            if rows[t]
            else None
            for t in range(len(keys))
        ]
        members = [[keys[t] for t in own if labels[t] == c] for c in range(number)]
        if step < iterations:
            centroids = [
                torch.stack(each).mean(0) if each else old for each, old in zip(members, centroids, strict=True)
            ]
    return labels, [torch.stack(each).mean(0) if each else None for each in members], [len(each) for each in members]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_clusters_are_those_of_the_slow_way(data):
    heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    per_cluster, iterations = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, tokens, 6, generator=generator)
    rows = torch.rand(heads, tokens, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    found = cluster_keys(keys, rows, per_cluster, iterations, seed)
    for head in range(heads):
        labels, means, sizes = clustered_slowly(keys[head], rows[head], per_cluster, iterations, seed)
        none = found.sizes.shape[1]
        assert [None if each == none else each for each in found.labels[head].tolist()] == labels
        assert found.sizes[head, : len(sizes)].tolist() == sizes and not found.sizes[head, len(sizes) :].any()
        for number, mean in enumerate(means):
            expected = torch.zeros(6) if mean is None else mean
            torch.testing.assert_close(found.centroids[head, number], expected)


def test_keys_in_bundles_are_told_apart():
    """Rows along three directions, of any length, fall into three clusters or fewer, none of which mixes them."""
    directions = torch.eye(3, 8)
    which = torch.arange(60) % 3
    keys = (directions[which] * torch.linspace(0.5, 4, 60)[:, None])[None]
    found = cluster_keys(keys, torch.ones(1, 60, dtype=torch.bool), 10, 5, seed=3)
    for label in found.labels.unique():
        assert len(which[found.labels[0] == label].unique()) == 1


def test_padding_changes_nothing():
    """Wherever in a block the rows of a head stand, the same ones go together."""
    keys, place = torch.randn(1, 40, 8), torch.randperm(70)[:40].sort().values
    alone = cluster_keys(keys, torch.ones(1, 40, dtype=torch.bool), 5, 3, 0)
    padded, rows = torch.randn(1, 70, 8), torch.zeros(1, 70, dtype=torch.bool)
    padded[:, place], rows[:, place] = keys, True
    found = cluster_keys(padded, rows, 5, 3, 0)
    assert torch.equal(found.labels[:, place], alone.labels)
    assert torch.equal(found.sizes, alone.sizes)


def test_blocks_change_nothing(monkeypatch):
    keys, rows = torch.randn(2, 50, 8), torch.ones(2, 50, dtype=torch.bool)
    whole = cluster_keys(keys, rows, 4, 3, 0)
    monkeypatch.setattr("headprof.compression.methods.clustering._BLOCK", 1)
    assert torch.equal(cluster_keys(keys, rows, 4, 3, 0).labels, whole.labels)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_of_the_nearest_clusters_are_those_taken_one_by_one(data):
    heads, clusters = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    sizes = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=heads * clusters, max_size=heads * clusters)))
    sizes = sizes.view(heads, clusters)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(heads, clusters)
    scores = torch.randn(heads, clusters, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    most = torch.tensor(data.draw(st.lists(st.integers(0, 12), min_size=heads, max_size=heads)))
    rows, there = rows_of_nearest(scores, starts, sizes, most, 12)
    for head in range(heads):
        expected = []
        for cluster in scores[head].argsort(descending=True).tolist():
            expected += range(int(starts[head, cluster]), int(starts[head, cluster] + sizes[head, cluster]))
        expected = expected[: int(most[head])]
        assert rows[head][there[head]].tolist() == expected
        assert there[head].tolist() == [True] * len(expected) + [False] * (12 - len(expected))


def test_shares_of_one_query_are_in_the_order_of_inner_products():
    query, keys = torch.randn(2, 1, 8), torch.randn(2, 20, 8)
    there = torch.rand(2, 20) < 0.7
    shares = attention_shares(query, keys, there, 0.3)
    products = (keys @ query[:, 0, :, None])[..., 0].masked_fill(~there, float("-inf"))
    assert torch.equal(shares.argsort(descending=True, stable=True), products.argsort(descending=True, stable=True))


def test_shares_of_a_group_are_the_largest_softmax():
    query, keys, there = torch.randn(2, 3, 8), torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    each = [(query[:, h : h + 1] * 0.4 @ keys.transpose(1, 2)).softmax(-1)[:, 0] for h in range(3)]
    torch.testing.assert_close(attention_shares(query, keys, there, 0.4).exp(), torch.stack(each).amax(0))


@given(st.integers(0, 100), st.integers(0, 20), st.floats(0, 1))
def test_what_stays_is_what_is_always_kept_and_a_share_of_the_rest(count, always, share):
    staying = int(Recall(cluster=8, recall_share=share).staying(torch.tensor(count), torch.tensor(always)))
    assert min(always, count) <= staying <= count
    assert abs(staying - (min(always, count) + max(0, count - always) * (1 - share))) <= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("cluster", -1), ("recall_every", 0), ("recall_among", 0), ("cluster_iterations", 0), ("recall_share", 1.5)],
)
def test_parameters_that_cannot_be_are_refused(name, value):
    with pytest.raises(UsageError, match=name):
        Recall(**{name: value})
