"""Standard errors, bootstrap intervals and the stability of a ranking, against plain loops and known answers."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof.utils.bootstrap import (
    bootstrap_interval,
    cluster_sums,
    expected_change,
    resampled_weights,
    standard_error,
)


@st.composite
def samples(draw):
    count, heads = draw(st.integers(1, 30)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    clusters = [draw(st.integers(0, 9)) * 7 for _ in range(count)]
    return torch.rand(count, heads, generator=generator), clusters


def slow_means(values, clusters, drawn):
    """Mean over the probes of the drawn clusters, by lists."""
    rows = [row for cluster in drawn for row, own in zip(values.tolist(), clusters, strict=True) if own == cluster]
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


@given(samples())
@settings(max_examples=60, deadline=None)
def test_every_resample_is_the_mean_over_the_drawn_clusters(sample):
    values, clusters = sample
    names = sorted(set(clusters))
    weights = resampled_weights(len(names), seed=3, resamples=20)
    assert (weights.sum(dim=1) == len(names)).all()
    means = [
        slow_means(values, clusters, [name for name, times in zip(names, row, strict=True) for _ in range(int(times))])
        for row in weights.tolist()
    ]
    ordered = torch.tensor(means, dtype=torch.float64).sort(dim=0).values
    low, high = bootstrap_interval(values, clusters, seed=3, resamples=20)
    for end, share in ((low, 0.025), (high, 0.975)):
        place = share * 19
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        expected = below + (above - below) * (place - math.floor(place))
        torch.testing.assert_close(end.double(), expected, atol=1e-6, rtol=1e-6)
    best = slow_best(slow_means(values, clusters, names), 2)
    changed = [1 - len(best & slow_best(row, 2)) / len(best) for row in means]
    assert expected_change(values, clusters, 2, seed=3, resamples=20) == pytest.approx(sum(changed) / 20, abs=1e-9)


def slow_best(scores, top):
    return set(sorted(range(len(scores)), key=lambda head: -scores[head])[:top])


@given(samples())
@settings(max_examples=60, deadline=None)
def test_standard_error_is_that_of_cluster_totals(sample):
    values, clusters = sample
    sums, counts = cluster_sums(values, clusters)
    assert counts.sum() == len(values)
    torch.testing.assert_close(sums.sum(dim=0), values.double().sum(dim=0))
    mean = values.double().mean(dim=0)
    total = torch.zeros_like(mean)
    for name in set(clusters):
        rows = values[[own == name for own in clusters]].double()
        total += (rows - mean).sum(dim=0) ** 2
    number = len(set(clusters))
    expected = (total * number / max(1, number - 1)).sqrt() / len(values)
    torch.testing.assert_close(standard_error(values, clusters).double(), expected, atol=1e-6, rtol=1e-4)


def test_probes_on_their_own_have_the_textbook_error():
    values = torch.rand(40, 5)
    torch.testing.assert_close(standard_error(values, range(40)), values.std(dim=0) / 40**0.5)


def test_copies_in_a_context_add_no_certainty():
    values = torch.rand(12, 3)
    copied, clusters = values.repeat_interleave(5, dim=0), [number for number in range(12) for _ in range(5)]
    torch.testing.assert_close(standard_error(copied, clusters), standard_error(values, range(12)))
    for one, other in zip(bootstrap_interval(copied, clusters), bootstrap_interval(values, range(12)), strict=True):
        torch.testing.assert_close(one, other)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        shift = [rng.gauss(0, 1) for _ in range(30)]
        values = torch.tensor([[shift[context] + rng.gauss(0, 1)] for context in range(30) for _ in range(4)])
        low, high = bootstrap_interval(values, [c for c in range(30) for _ in range(4)], seed=trial, resamples=400)
        covered += bool(low <= 0 <= high)
    assert 178 <= covered <= 199


def test_a_clear_ranking_is_stable_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(60, 100, generator=generator)
    clear = 0.01 * noise
    clear[:, :10] += torch.linspace(1, 2, 10)
    assert expected_change(clear, range(60), 10) == 0
    assert 0.3 < expected_change(noise, range(60), 10) < 0.9
    assert expected_change(noise, range(60), 10) == expected_change(noise, range(60), 10)
