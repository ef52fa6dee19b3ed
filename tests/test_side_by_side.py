"""All scores side by side: rank correlations and their intervals, what top heads cost, the table, the picture."""

import math
from dataclasses import replace
from statistics import fmean
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.profiles import random_curves, random_profile
from support.tiny_models import load_tiny

from headprof.cli.tables import validate as tables
from headprof.models.shape import HeadShape
from headprof.plots.rank_bars import rank_limits
from headprof.plots.validation import _draw, validation_plot
from headprof.probes.families import load_nonliteral
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import KINDS, PROBE_KINDS
from headprof.utils.ranks import average_ranks, rank_correlations, spearman
from headprof.validation import causal_check
from headprof.validation.asking import AskedProbe
from headprof.validation.causal_check import ALL, Validation
from headprof.validation.findings import Findings, check_profile
from headprof.validation.head_drops import HeadDrops
from headprof.validation.head_sets import NOTHING, CheckedScores, checked_scores, choose_sets
from headprof.validation.settings import ValidationSettings
from headprof.validation.side_by_side import (
    Yardstick,
    curve_yardsticks,
    drop_yardsticks,
    rank_agreement,
    side_by_side,
    top_loss,
)
from headprof.validation.verdict import own_verdicts

SHAPE = HeadShape("M", 4, 6, 2, 16, 100)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_ranks_of_rows_are_those_of_each_with_ties_shared(rows):
    found = average_ranks(torch.tensor(rows).float())
    for row, ranks in zip(rows, found.tolist(), strict=True):
        assert ranks == [fmean(n for n, w in enumerate(sorted(row), 1) if w == v) for v in row]


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_rank_correlations_are_those_of_each_row(count, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, rows = (torch.randint(4, size, generator=generator).float() for size in ((count,), (3, count)))
    found = rank_correlations(scores, rows).tolist()
    assert found == pytest.approx([spearman(scores, row) for row in rows], nan_ok=True)


def yardstick_of(worth, contexts=6, each=3, noise=0.5, seed=0) -> Yardstick:
    """Measurements of some worth `[L, H]` with noise that the probes of a context share in part."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(contexts, *worth.shape, generator=generator).repeat_interleave(each, dim=0)
    own = torch.randn(contexts * each, *worth.shape, generator=generator)
    return Yardstick("drops", worth + noise * (shared + own), [n // each for n in range(contexts * each)])


def scores_of(values) -> CheckedScores:
    return CheckedScores("write", "write", values)


def test_scores_that_rank_as_the_yardstick_does():
    worth = torch.arange(24.0).view(4, 6)
    found = rank_agreement(scores_of(worth.square()), yardstick_of(worth, noise=0.0), 5)
    assert (found.spearman, found.low, found.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert (found.scores, found.yardstick, found.top, found.overlap) == ("write", "drops", 5, 1)
    opposite = rank_agreement(scores_of(-worth), yardstick_of(worth, noise=0.0), 5)
    assert opposite.spearman == pytest.approx(-1) and opposite.overlap == 0
    alike = rank_agreement(scores_of(torch.ones(4, 6)), yardstick_of(worth), 5)
    assert math.isnan(alike.spearman) and alike.low is alike.high is None


def test_the_interval_lies_around_the_estimate_and_is_wider_for_noisier_drops():
    worth = torch.randn(8, 9, generator=torch.Generator().manual_seed(1))
    quiet, loud = (rank_agreement(scores_of(worth), yardstick_of(worth, noise=noise)) for noise in (0.2, 2.0))
    for found in (quiet, loud):
        assert found.low < found.spearman < found.high
    assert loud.high - loud.low > 2 * (quiet.high - quiet.low)
    few = rank_agreement(scores_of(worth), yardstick_of(worth, contexts=3, each=6, noise=2.0))
    assert few.high - few.low > loud.high - loud.low
    one = rank_agreement(scores_of(worth), yardstick_of(worth, contexts=1, each=18))
    assert (one.low, one.high) == (None, None) and one.spearman > 0.5


def test_the_interval_holds_what_other_probes_would_say():
    """Other measurements of as many probes mostly give correlations that are not far from its ends."""
    scores = torch.randn(10, 9, generator=torch.Generator().manual_seed(2))
    worth = 0.5 * scores + torch.randn(10, 9, generator=torch.Generator().manual_seed(3))
    found = [rank_agreement(scores_of(scores), yardstick_of(worth, contexts=10, seed=seed)) for seed in range(60)]
    expected = fmean(each.spearman for each in found)
    assert sum(each.low <= expected <= each.high for each in found) >= 51


def test_probes_of_a_context_are_drawn_together():
    worth = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    together = yardstick_of(worth, contexts=5, each=8)
    apart = replace(together, clusters=list(range(40)))
    wide, narrow = (rank_agreement(scores_of(worth), each) for each in (together, apart))
    assert wide.spearman == narrow.spearman and wide.high - wide.low > narrow.high - narrow.low


def test_a_yardstick_of_kv_heads_takes_the_best_score_of_each_group():
    values = torch.tensor([[1.0, 9, 2, 3], [8, 0, 5, 6]])
    per_kv_head = Yardstick("curves", torch.tensor([[[90.0, 30], [80, 60]]] * 2), [0, 1])
    found = rank_agreement(scores_of(values), per_kv_head, 10)
    assert (found.spearman, found.top, found.overlap) == (pytest.approx(1), 4, 1)


def test_curves_are_yardsticks_without_intervals():
    shape = HeadShape("M", 4, 6, 3, 8, 100)
    curves = {"known": random_curves(shape, 1), "unknown": random_curves(shape, 2)}
    first, second = curve_yardsticks(curves)
    assert (first.name, second.name) == ("curves (known)", "curves (unknown)")
    torch.testing.assert_close(second.worth, curves["unknown"].losses.mean(dim=-1))
    values = first.worth.repeat_interleave(2, dim=1)
    found = rank_agreement(scores_of(values), first)
    assert (found.spearman, found.low, found.high, found.overlap) == (pytest.approx(1), None, None, 1)


def result_of(kinds=KINDS, asked=PROBE_KINDS, contexts=6, others=None, seed=3) -> Validation:
    """Made-up answers to two probes of each kind a context, fewer of them right the more top heads are silent."""
    generator = torch.Generator().manual_seed(seed)
    profile = HeadProfile("org/Model", SHAPE, {kind: torch.rand(4, 6, generator=generator) for kind in kinds})
    settings = ValidationSettings(top=2, counts=(1, 2, 5))
    scores = checked_scores(profile, others)
    sets = [NOTHING, *choose_sets(scores, settings)]
    probes = tuple(AskedProbe(kind, "any", context) for context in range(contexts) for kind in asked * 2)
    share = torch.tensor([1 - (each.family == "top") * each.count / 6 for each in sets])
    right = torch.rand(len(sets), len(probes), generator=generator) < share[:, None]
    return Validation("org/Model", scores, settings, tuple(sets), probes, right, right.float() - 2)


def drops_of(result, seed=5) -> HeadDrops:
    values = torch.randn(len(result.probes), 4, 6, generator=torch.Generator().manual_seed(seed))
    return HeadDrops(values, result.probes)


def test_what_the_top_heads_cost_by_hand():
    result = result_of()
    found = top_loss(result, "reasoning", "write")
    row = next(n for n, s in enumerate(result.sets) if (s.chosen_by, s.family, s.count) == ("write", "top", 2))
    at = [n for n, probe in enumerate(result.probes) if probe.kind == "reasoning"]
    right = [fmean(map(float, result.right[which, at])) for which in (0, row)]
    assert found.lost == pytest.approx(right[0] - right[1]) and found.low <= found.lost <= found.high
    # Made-up log-probabilities are one nat apart.
    assert (found.top, found.lost_log_prob) == (2, pytest.approx(found.lost, abs=1e-5))


def test_everything_stands_beside_everything():
    result = result_of()
    drops = drops_of(result)
    found = Findings(result, drops).compared
    assert [(each.probes, each.scores) for each in found.losses] == [(p, k) for p in PROBE_KINDS for k in KINDS]
    pairs = [(f"{probes} drops", kind) for probes in PROBE_KINDS for kind in KINDS]
    assert [(each.yardstick, each.scores) for each in found.agreements] == pairs
    for each in found.agreements:
        scores = next(s for s in result.scores if s.name == each.scores).values
        assert each.spearman == spearman(scores, drops.mean(each.yardstick.split()[0]))
    assert Findings(result).compared.agreements == ()
    assert found.names == list(KINDS)


def test_figures_are_plain_and_hold_no_nan():
    result = result_of(("retrieval",))
    flat = replace(result, scores=(CheckedScores("retrieval", "retrieval", torch.ones(4, 6)),))
    figures = side_by_side(flat, drop_yardsticks(drops_of(result))).figures()
    assert [each["spearman"] for each in figures["agreements"]] == [None, None]
    assert [each["probes"] for each in figures["losses"]] == list(PROBE_KINDS)


def test_scores_without_probes_of_their_own_are_judged_by_all():
    result = result_of()
    assert [(each.kind, each.probes) for each in own_verdicts(result)] == [
        *((kind, kind) for kind in PROBE_KINDS),
        ("write", ALL),
        ("reconstruction", ALL),
    ]
    sentence = own_verdicts(result)[2].sentence()
    assert sentence.startswith("Write, by all probes: ")
    one_kind = result_of(("retrieval", "reasoning"), asked=("reasoning",))
    assert [each.probes for each in own_verdicts(one_kind)] == [ALL, "reasoning"]


def test_scores_of_another_profile_are_shown_and_not_judged():
    other = HeadProfile("org/Model", SHAPE, {"write": torch.rand(4, 6, generator=torch.Generator().manual_seed(9))})
    result = result_of(("retrieval",), others={"theirs": other})
    assert result.names == ["retrieval", "write of theirs"] and len(own_verdicts(result)) == 1
    assert Findings(result).compared.names == ["retrieval", "write of theirs"]


def test_the_tables_have_a_row_for_each_score():
    result = result_of()
    found = Findings(result, drops_of(result)).compared
    columns, rows, title = tables.side_by_side(found)
    assert columns == ["scores", "retrieval points", "reasoning points"] and "top 2 silent" in title
    assert [row[0] for row in rows] == list(KINDS) and all(len(row) == len(columns) for row in rows)
    columns, rows, _ = tables.agreements(found)
    assert [row[:2] for row in rows] == [[f"{probes} drops", kind] for probes in PROBE_KINDS for kind in KINDS]
    assert all(len(row) == len(columns) for row in rows) and rows[0][2].startswith(
        f"{found.agreements[0].spearman:.2f}"
    )
    assert tables.agreements(Findings(result).compared) is None


def test_the_table_of_answers_shows_the_top_of_every_score():
    rows = tables.validation(result_of())[1]
    tops = {row[1] for row in rows if row[0] == "reasoning" and row[2] == "2"}
    assert {f"top {kind}" for kind in KINDS} <= tops and "random write" not in tops


def test_the_picture_has_a_line_and_a_bar_for_every_score(tmp_path):
    other = HeadProfile("org/Model", SHAPE, {"write": torch.rand(4, 6, generator=torch.Generator().manual_seed(9))})
    result = result_of(others={"their $2 profile": other})
    compared = Findings(result, drops_of(result)).compared
    first, second = (validation_plot(result, tmp_path / f"{name}.svg", compared) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    names = {element.get("id", "") for element in ElementTree.parse(first).iter()}
    assert {f"{kind}-{family}" for kind in PROBE_KINDS for family in ("top", "random", "bottom")} <= names
    assert {"retrieval-top-write", "reasoning-top-write-of-their-$2-profile"} <= names
    assert {f"rank-{kind}-drops-{name}" for kind in PROBE_KINDS for name in KINDS} <= names


@pytest.mark.parametrize("kinds", [("retrieval",), ("write",), ("reconstruction", "write"), KINDS])
@pytest.mark.parametrize("asked", [PROBE_KINDS, ("reasoning",)])
def test_any_scores_and_probes_can_be_drawn(kinds, asked):
    result = result_of(kinds, asked)
    figure = _draw(result, Findings(result, drops_of(result)).compared)
    width, height = (size * figure.dpi for size in figure.get_size_inches())
    for axes in figure.axes:
        for text in (*axes.texts, *axes.get_yticklabels()):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()


def test_bars_are_the_correlations():
    result = result_of(("retrieval", "write"))
    compared = Findings(result, drops_of(result)).compared
    axes = _draw(result, compared).axes[-1]
    assert [bar.get_width() for bar in axes.patches] == [each.spearman for each in compared.agreements[2:]]
    low, high = axes.get_xlim()
    assert all(low <= end <= high for each in compared.agreements for end in (each.low, each.high))
    flat = replace(compared.agreements[0], spearman=math.nan, low=None, high=None)
    assert rank_limits([flat]) == (-0.05, pytest.approx(0.35))


def test_a_check_of_all_kinds_beside_another_profile(monkeypatch):
    monkeypatch.setattr(causal_check, "MIN_RIGHT", 0)
    loaded = load_tiny()
    settings = ValidationSettings(
        top=2, counts=(1,), probes=8, length=500, pack=2, draws=1, ablate="mean", probe_families=("nonliteral",)
    )
    profile, other = (random_profile(loaded.model, seed=seed, kinds=kinds) for seed, kinds in ((1, KINDS), (2, KINDS)))
    found = check_profile(loaded, profile, settings, others={"other": other}, per_head=True)
    assert {probe.kind for probe in found.result.probes} == {"retrieval"}
    assert {probe.family for probe in found.result.probes} <= {family.name for family in load_nonliteral()}
    assert found.compared.names == [*KINDS, *(f"{kind} of other" for kind in KINDS)]
    assert [*dict.fromkeys(each.yardstick for each in found.compared.agreements)] == [
        "retrieval drops",
        "curves (known)",
        "curves (unknown)",
    ]
    assert len(found.verdicts) == 4 and found.figures()["side_by_side"]["losses"]
