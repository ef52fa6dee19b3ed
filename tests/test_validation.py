"""The causal check: silenced heads against hooks on the output projection, the sets of heads, curves and verdicts."""

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.profiles import random_profile
from support.tiny_models import ARCHITECTURES, load_tiny, save_tiny, tiny_model
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

from headprof.cli.tables import validate as tables
from headprof.cli.validate import validate as cli_validate
from headprof.errors import ProbeError, UsageError
from headprof.models.shape import HeadShape
from headprof.plots.validation import _draw, validation_plot
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS
from headprof.scoring.shared_context import SharedContext
from headprof.validation import causal_check as validation
from headprof.validation.asking import AskedProbe, build_probes
from headprof.validation.causal_check import Validation, validate
from headprof.validation.head_drops import HeadDrops, drops_csv, per_head_drops
from headprof.validation.head_sets import (
    NOTHING,
    CheckedScores,
    HeadSet,
    bottom_heads,
    checked_scores,
    choose_sets,
    same_layer_heads,
)
from headprof.validation.settings import FAMILIES, ValidationSettings
from headprof.validation.silence import MeanOutputs, silenced, silenced_each
from headprof.validation.verdict import Verdict, curve, own_verdicts

SMALL = ValidationSettings(top=2, counts=(1,), probes=8, length=500, pack=2, draws=2)


def make_profile(loaded, kinds=PROBE_KINDS) -> HeadProfile:
    return random_profile(loaded.model, seed=1, kinds=kinds, name=loaded.name)


@contextmanager
def hooked(model, heads, instead=None):
    """The obvious way to silence heads: zeros in their columns of what the output projection takes in, or `instead`."""
    hooks = []
    for layer, head in heads:
        attention = model.model.layers[layer].self_attn
        columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def replace_columns(module, arguments, layer=layer, columns=columns):
            states = arguments[0].clone()
            states[..., columns] = 0 if instead is None else instead[layer][columns]
            return (states,)

        hooks.append(attention.o_proj.register_forward_pre_hook(replace_columns))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def slow_means(model, ids):
    """The mean over tokens of what each layer's output projection takes in."""
    seen, hooks = {}, []
    for number, layer in enumerate(model.model.layers):

        def note(module, arguments, number=number):
            seen[number] = arguments[0][0].mean(dim=0)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(note))
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def slow_answer(model, context, probe, heads, where, ablate="zero"):
    """Whether one probe is answered right, and the answer's log-probability, with heads silent by hooks."""
    ids = torch.tensor([[*context.context_ids, *probe.question_ids, *probe.answer_ids]])
    seen = len(context.context_ids)
    instead = slow_means(model, ids[:, :seen]) if ablate == "mean" else None
    if where == "prompt":
        with hooked(model, heads, instead):
            logits = model(ids).logits
    else:
        before = model(ids[:, :seen], use_cache=True)
        with hooked(model, heads, instead):
            logits = model(ids[:, seen:], past_key_values=before.past_key_values).logits
    count = len(probe.answer_ids)
    log_probs = logits[0, -count - 1 : -1].log_softmax(dim=-1)
    right = log_probs.argmax(dim=-1).tolist() == list(probe.answer_ids)
    return right, float(sum(row[token] for row, token in zip(log_probs, probe.answer_ids, strict=True)))


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("attn", [None, "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_silenced_heads_equal_zeroed_columns(arch, attn, num_kv_heads):
    model = tiny_model(arch, attn=attn, num_kv_heads=num_kv_heads)
    ids = torch.arange(3, 43)[None]
    plain = model(ids).logits
    heads = [(0, 1), (1, 0), (1, 3)]
    with hooked(model, heads):
        expected = model(ids).logits
    with silenced(model, heads):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (plain - expected).abs().max() > 1e-2
    assert torch.equal(model(ids).logits, plain)  # as it was


@pytest.mark.parametrize("arch", ["llama", "gemma3", "phi3"])
def test_heads_may_put_out_their_mean_instead(arch):
    model = tiny_model(arch)
    text, asked, heads = torch.arange(3, 43)[None], torch.arange(50, 70)[None], [(0, 1), (1, 0), (1, 3)]
    means = MeanOutputs()
    with means.measuring(model):
        plain = model(text).logits
    assert torch.equal(plain, model(text).logits)  # measuring changes nothing
    with hooked(model, heads, slow_means(model, text)):
        expected = model(asked).logits
    with silenced(model, heads, means):
        torch.testing.assert_close(model(asked).logits, expected, atol=1e-5, rtol=1e-4)
    with silenced(model, heads):
        assert (model(asked).logits - expected).abs().max() > 1e-3


def test_means_are_over_all_tokens_that_were_read():
    model = tiny_model()
    whole, parts = MeanOutputs(), MeanOutputs()
    with whole.measuring(model):
        model(torch.arange(3, 43)[None])
    cache = DynamicCache()
    with parts.measuring(model):
        model(torch.arange(3, 33)[None], past_key_values=cache, use_cache=True)
        model(torch.arange(33, 43)[None], past_key_values=cache, use_cache=True)
    for layer in range(2):
        assert whole.of_layer(layer).shape == (4, 16)
        torch.testing.assert_close(parts.of_layer(layer), whole.of_layer(layer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_each_sequence_of_a_batch_has_its_own_silent_heads(arch):
    model = tiny_model(arch)
    ids = torch.arange(3, 43).expand(3, -1)
    each = [[(0, 0)], [], [(0, 2), (1, 1)]]
    silent = torch.zeros(3, 2, 4, dtype=torch.bool)
    for number, heads in enumerate(each):
        for layer, head in heads:
            silent[number, layer, head] = True
    with silenced_each(model, silent):
        together = model(ids).logits
    for number, heads in enumerate(each):
        with hooked(model, heads):
            torch.testing.assert_close(together[number], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-4)


def test_a_silenced_head_that_puts_out_nan_is_silent():
    model = tiny_model(num_kv_heads=4)
    model.model.layers[0].self_attn.v_proj.weight[:16] = torch.nan
    assert model(torch.tensor([[5, 6]])).logits.isnan().any()
    with silenced(model, [(0, 0)]):
        assert not model(torch.tensor([[5, 6]])).logits.isnan().any()


def test_heads_speak_again_after_an_error():
    model = tiny_model()
    before = model.config._attn_implementation
    plain = model(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(RuntimeError, match="stop"), silenced(model, [(0, 0)]):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, plain)


@given(st.data())
def test_random_heads_are_others_of_the_same_layers(data):
    num_layers, num_heads = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 6))
    everyone = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    heads = data.draw(st.permutations(everyone))[: data.draw(st.integers(1, len(everyone) // 2))]
    picked = same_layer_heads(heads, (num_layers, num_heads), random.Random(data.draw(st.integers())))
    assert len(set(picked)) == len(picked) == len(heads)
    assert set(picked).isdisjoint(heads) and set(picked) <= set(everyone)
    for layer in range(num_layers):
        wanted = sum(head[0] == layer for head in heads)
        assert sum(head[0] == layer for head in picked) >= min(wanted, num_heads - wanted)


def test_random_heads_differ_by_seed_and_reach_every_other_head():
    heads = [(0, 0), (2, 1)]
    drawn = {same_layer_heads(heads, (3, 4), random.Random(seed)) for seed in range(200)}
    assert {head for picked in drawn for head in picked} == {(0, 1), (0, 2), (0, 3), (2, 0), (2, 2), (2, 3)}
    assert same_layer_heads(heads, (3, 4), random.Random(7)) == same_layer_heads(heads, (3, 4), random.Random(7))


def test_bottom_heads_are_the_lowest_and_equal_ones_come_from_all_layers():
    scores = torch.tensor([[0.0, 0.5, 0.1, 0.9], [0.0, 0.2, 0.0, 0.8]])
    rng = random.Random(0)
    assert set(bottom_heads(scores, [(0, 3), (1, 3), (0, 1)], rng)) == {(0, 0), (1, 0), (1, 2)}
    assert bottom_heads(scores, [(0, 3), (1, 3), (0, 1), (0, 0)], rng)[2:] == ((0, 2), (1, 1))  # (0, 0) is at the top
    firsts = {bottom_heads(scores, [(0, 3)], random.Random(seed)) for seed in range(50)}
    assert firsts == {((0, 0),), ((1, 0),), ((1, 2),)}
    layers = [layer for layer, _ in bottom_heads(torch.zeros(10, 10), [(0, 0)] * 40, random.Random(1))]
    assert len(set(layers)) > 5


def test_sets_hold_the_top_of_each_kind_and_as_many_others():
    loaded = load_tiny(layers=3)
    profile = make_profile(loaded)
    scores = checked_scores(profile)
    sets = choose_sets(scores, replace(SMALL, top=3, counts=(1, 2, 6, 7), draws=2))
    assert [(s.chosen_by, s.family, s.count, s.draw) for s in sets if s.chosen_by == "reasoning"] == [
        ("reasoning", family, count, draw)
        for count in (1, 2, 3, 6)  # 7 is more than half of 12
        for family, draw in (("top", 0), ("random", 0), ("random", 1), ("bottom", 0))
    ]
    for each in sets:
        assert len(set(each.heads)) == each.count
    best = {each.count: set(each.heads) for each in sets if each.chosen_by == "retrieval" and each.family == "top"}
    ranked = profile.retrieval.flatten().argsort(descending=True).tolist()
    assert best[3] == {divmod(index, 4) for index in ranked[:3]}
    worst = {each.count: set(each.heads) for each in sets if each.chosen_by == "retrieval" and each.family == "bottom"}
    assert worst[6] == {divmod(index, 4) for index in ranked[6:]} and worst[1] < worst[2] < worst[3] < worst[6]
    assert sets == choose_sets(scores, replace(SMALL, top=3, counts=(1, 2, 6, 7), draws=2))
    assert sets != choose_sets(scores, replace(SMALL, top=3, counts=(1, 2, 6, 7), draws=2, seed=1))


@pytest.mark.parametrize("where", ["prompt", "question"])
@pytest.mark.parametrize(
    ("arch", "ablate"), [("llama", "zero"), ("gemma3", "zero"), ("phi3", "zero"), ("llama", "mean"), ("gemma3", "mean")]
)
def test_every_probe_is_asked_under_every_set_as_with_hooks(arch, ablate, where, monkeypatch):
    monkeypatch.setattr(validation, "MIN_RIGHT", 0)
    loaded = load_tiny(arch, sliding_window=40)
    profile = make_profile(loaded)
    settings = replace(SMALL, where=where, ablate=ablate)
    progress = []
    result = validate(loaded, profile, settings, lambda *now: progress.append(now))
    contexts = list(build_probes(loaded, settings))
    probes = [(context, probe) for context in contexts for probe in context.probes]
    assert [(p.kind, p.family, p.context) for p in result.probes] == [(p.kind, p.family, c.index) for c, p in probes]
    assert result.sets == (NOTHING, *choose_sets(checked_scores(profile), settings))
    for row, each in enumerate(result.sets):
        answers = [slow_answer(loaded.model, context, probe, each.heads, where, ablate) for context, probe in probes]
        assert result.right[row].tolist() == [right for right, _ in answers]
        expected = torch.tensor([log_prob for _, log_prob in answers])
        torch.testing.assert_close(result.log_probs[row], expected, atol=1e-3, rtol=1e-4)
    spread = (result.log_probs[1:] - result.log_probs[0]).abs().amax(dim=1)
    assert (spread > 0.01).all()  # silence does something
    different = len({frozenset(each.heads) for each in result.sets})
    assert progress == [(done, 4 * different) for done in range(1, 4 * different + 1)]


def test_sets_that_coincide_are_run_once(monkeypatch):
    monkeypatch.setattr(validation, "MIN_RIGHT", 0)
    loaded = load_tiny()
    scores = make_profile(loaded).retrieval
    profile = HeadProfile(loaded.name, loaded.shape, {"retrieval": scores, "reasoning": scores})
    totals = set()
    result = validate(loaded, profile, replace(SMALL, draws=1), lambda done, total: totals.add(total))
    assert len(result.sets) == 1 + 2 * 2 * 3 and max(totals) <= 4 * (1 + 2 * 2 + 2 * 2)
    for count in (1, 2):
        same = [result.rows(kind, "top", count)[0] for kind in result.names]
        assert same[0] != same[1] and torch.equal(*result.log_probs[same])


def test_questions_one_at_a_time_give_the_same(monkeypatch):
    monkeypatch.setattr(validation, "MIN_RIGHT", 0)
    loaded = load_tiny()
    profile = make_profile(loaded, ("reasoning",))
    together = validate(loaded, profile, SMALL)
    drops = per_head_drops(loaded, SMALL)
    build = SharedContext.__init__

    def alone(self, *arguments):
        build(self, *arguments)
        self.shares_passes = False

    monkeypatch.setattr(SharedContext, "__init__", alone)
    torch.testing.assert_close(validate(loaded, profile, SMALL).log_probs, together.log_probs, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(per_head_drops(loaded, SMALL).values, drops.values, atol=1e-3, rtol=1e-4)


def test_a_model_that_answers_nothing_cannot_be_checked():
    loaded = load_tiny()
    with pytest.raises(ProbeError, match=r"answers 0 of 4 retrieval probes .* try a shorter --length"):
        validate(loaded, make_profile(loaded), SMALL)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": "answer"}, "cannot be silent in the 'answer': choose prompt or question"),
        ({"ablate": "noise"}, "cannot be ablated by 'noise': choose zero or mean"),
        ({"probe_families": ("chess",)}, "no needle family 'chess'"),
        ({"top": 0}, "with 0 top heads: give at least 1"),
        ({"draws": 0}, "with 0 draws"),
        ({"counts": (0,)}, "with 0 heads"),
        ({"top": 5}, "Silencing 5 of 8 heads .* at most 4"),
        ({"probes": 6}, "6 probes in fewer than 4 contexts"),
        ({"probes": 12, "pack": None, "length": 1024}, "12 probes in fewer than 4 contexts"),
        ({"length": 5000}, "5000 tokens"),
        ({"length": 40}, "too short"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_before_the_model_runs(change, message, monkeypatch):
    loaded = load_tiny()
    monkeypatch.setattr(type(loaded.model), "forward", None)
    with pytest.raises(UsageError, match=message):
        validate(loaded, make_profile(loaded), replace(SMALL, **change))


@pytest.mark.parametrize(
    ("arch", "batch", "ablate"),
    [
        ("llama", None, "zero"),
        ("llama", 1, "zero"),
        ("qwen3", 3, "zero"),
        ("gemma2", 3, "zero"),
        ("phi3", 4, "zero"),
        ("llama", 3, "mean"),
        ("gemma2", None, "mean"),
    ],
)
def test_drops_of_single_heads_equal_hooks_one_by_one(arch, batch, ablate):
    loaded = load_tiny(arch, sliding_window=40)
    progress = []
    drops = per_head_drops(loaded, replace(SMALL, ablate=ablate), batch, lambda *now: progress.append(now))
    assert progress == [(done, 8) for done in range(1, 9)]
    slow = {"retrieval": [], "reasoning": []}
    for context in build_probes(loaded, SMALL):
        for probe in context.probes:
            whole = slow_answer(loaded.model, context, probe, [], "question")[1]
            alone = [
                slow_answer(loaded.model, context, probe, [divmod(index, 4)], "question", ablate)[1]
                for index in range(8)
            ]
            slow[probe.kind].append(whole - torch.tensor(alone).view(2, 4))
    for kind, expected in slow.items():
        values = torch.stack(expected)
        torch.testing.assert_close(drops.mean(kind), values.mean(dim=0), atol=1e-3, rtol=1e-3)
        assert values.abs().max() > 0.05 and len(drops.of_kind(kind)[0]) == 4
        # Each context holds one probe of each kind, so that this is the textbook formula.
        error = values.std(dim=0) / 2
        torch.testing.assert_close(drops.standard_error(kind), error, atol=1e-3, rtol=1e-2)


def made_up(right, contexts, top=2) -> Validation:
    """Answers to retrieval probes, from lists by family: `{"none": [...], "random": [[...], [...]]}`."""
    rows, sets = [], []
    for family, answers in right.items():
        for draw, each in enumerate(answers if isinstance(answers[0], list) else [answers]):
            sets.append(NOTHING if family == "none" else HeadSet("retrieval", family, top, draw, ((0, draw), (1, 0))))
            rows.append(each)
    probes = tuple(AskedProbe("retrieval", "code", context) for context in contexts)
    matrix = torch.tensor(rows, dtype=torch.bool)
    settings = ValidationSettings(top=top)
    scores = (CheckedScores("retrieval", "retrieval", torch.zeros(2, 2)),)
    return Validation("m", scores, settings, tuple(sets), probes, matrix, matrix.float() - 1.5)


def test_the_curve_counts_answers_and_pools_random_picks():
    contexts = [0, 0, 1, 1, 2, 2, 3, 3]
    result = made_up(
        {
            "none": [1, 1, 1, 1, 1, 1, 1, 0],
            "top": [0, 0, 0, 0, 0, 0, 1, 0],
            "random": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0]],
            "bottom": [1, 1, 1, 1, 1, 1, 1, 0],
        },
        contexts,
    )
    nothing, top = curve(result, "retrieval", "retrieval", "top")
    assert (nothing.count, nothing.right, nothing.asked, nothing.accuracy) == (0, 7, 8, 7 / 8)
    assert (top.count, top.right, top.asked, top.log_prob) == (2, 1, 8, pytest.approx(-1.375))
    assert (top.low, top.high) == (0.0, pytest.approx(0.375, abs=0.13)) and nothing.high == 1.0
    pooled = curve(result, "retrieval", "retrieval", "random")[1]
    assert (pooled.right, pooled.asked) == (12, 16) and pooled.low < 0.75 < pooled.high


def test_intervals_take_whole_contexts():
    """Probes that fall together in their contexts say less than as many that fall by themselves."""
    alike = made_up({"none": [1] * 40, "top": [1] * 20 + [0] * 20}, [n // 10 for n in range(40)])
    mixed = made_up({"none": [1] * 40, "top": [1, 0] * 20}, [n // 10 for n in range(40)])
    wide, narrow = (curve(each, "retrieval", "retrieval", "top")[1] for each in (alike, mixed))
    assert wide.accuracy == narrow.accuracy == 0.5
    assert (wide.low, wide.high) == (0, 1) and narrow.low == narrow.high == 0.5


def verdict_on(top, random_, contexts=None, bottom=None, none=None):
    count = len(top)
    right = {"none": none or [1] * count, "top": top, "random": [random_], "bottom": bottom or [1] * count}
    return own_verdicts(made_up(right, contexts or list(range(count))))[0]


def test_a_verdict_confirms_what_the_top_heads_alone_destroy():
    found = verdict_on([0] * 15 + [1] * 5, [1] * 19 + [0])
    assert found.confirmed and found.baseline == 1
    assert found.lost == pytest.approx({"top": 0.75, "random": 0.05, "bottom": 0})
    assert 0.4 < found.low < 0.7 < found.high <= 1
    assert found.sentence() == (
        "Retrieval: confirmed. Silencing the top 2 heads costs 75 points (100% to 25%); 2 random heads of the same "
        "layers cost 5."
    )


def test_a_verdict_does_not_confirm_what_random_heads_do_too():
    found = verdict_on([0] * 10 + [1] * 10, [1] * 10 + [0] * 10)
    assert not found.confirmed and found.low < 0 < found.high
    assert "Retrieval: not confirmed. Silencing the top 2 heads costs 50 points" in found.sentence()
    assert "a difference that may be chance (95 % interval -" in found.sentence()


def test_a_verdict_does_not_confirm_a_small_loss():
    found = verdict_on([0] + [1] * 19, [1] * 20)
    assert not found.confirmed and found.lost["top"] == pytest.approx(0.05)
    assert found.sentence().endswith("cost 0, where at least 10 points count as a cause.")


def test_a_verdict_pairs_probes():
    """Random heads that fail on the very same probes leave no difference to resample."""
    wrong = [0, 1] * 10
    assert (verdict_on(wrong, wrong).low, verdict_on(wrong, wrong).high) == (0, 0)
    apart = verdict_on(wrong, wrong[::-1])
    assert apart.low < 0 < apart.high


def test_one_head_is_called_so():
    right = {"none": [1] * 9, "top": [0] * 9, "random": [[1] * 9], "bottom": [1] * 9}
    sentence = own_verdicts(made_up(right, list(range(9)), top=1))[0].sentence()
    assert "Silencing the top head costs 100 points (100% to 0%); 1 random head of the same layer costs 0." in sentence


def whole_result(counts=(1, 2, 5), contexts=6, name="org/Model", kinds=("retrieval", "reasoning")) -> Validation:
    """Made-up answers to four probes a context, fewer of them right the more heads are silent."""
    loaded_shape = HeadShape("M", 4, 6, 2, 16, 100)
    generator = torch.Generator().manual_seed(3)
    scores = {kind: torch.rand(4, 6, generator=generator) for kind in kinds}
    settings = ValidationSettings(top=2, counts=counts)
    checked = checked_scores(HeadProfile(name, loaded_shape, scores))
    sets = [NOTHING, *choose_sets(checked, settings)]
    probes = tuple(
        AskedProbe(kind, "any", context) for context in range(contexts) for kind in ("reasoning", "retrieval") * 2
    )
    share = torch.tensor([1 - (each.family == "top") * each.count / 6 for each in sets])
    right = torch.rand(len(sets), len(probes), generator=generator) < share[:, None]
    return Validation(name, checked, settings, tuple(sets), probes, right, right.float() - 2)


def test_the_table_shows_each_kind_and_the_other_kinds_top():
    columns, rows = tables.validation(whole_result())
    assert all(len(row) == len(columns) for row in rows)
    own = [f"{family} {{}}" for family in ("top", "random", "bottom") for _ in range(3)]
    assert [row[:2] for row in rows] == [
        [probes, text]
        for probes, other in (("retrieval", "reasoning"), ("reasoning", "retrieval"))
        for text in ("none", *(each.format(probes) for each in own), f"top {other}")
    ]
    assert [row[2] for row in rows[:11]] == ["0", *["1", "2", "5"] * 3, "2"]
    assert [row[3].split("/")[1] for row in rows[:11]] == ["12"] * 4 + ["36"] * 3 + ["12"] * 4
    one = tables.validation(whole_result(kinds=("reasoning",)))[1]
    assert [row[:2] for row in one][:2] == [["retrieval", "none"], ["retrieval", "top reasoning"]]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_results_give_equal_pictures(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert validation_plot(whole_result(), first) == first
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        validation_plot(whole_result(), second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    other = validation_plot(whole_result(contexts=7), tmp_path / f"c{suffix}")
    assert other.read_bytes() != first.read_bytes()


def test_the_picture_holds_a_line_for_each_kind_and_family(tmp_path):
    path = validation_plot(whole_result(), tmp_path / "v.svg")
    names = {element.get("id", "") for element in ElementTree.parse(path).iter()}
    assert {f"{kind}-{family}" for kind in PROBE_KINDS for family in FAMILIES} <= names
    with pytest.raises(UsageError, match=r"written as \.png or \.svg, not as 'v\.pdf'"):
        validation_plot(whole_result(), tmp_path / "v.pdf")


def test_the_lines_are_the_curves():
    result = whole_result(kinds=("reasoning",))
    (axes,) = _draw(result).axes
    lines = {line.get_gid(): line.get_ydata().tolist() for line in axes.get_lines()}
    for family in FAMILIES:
        expected = [100 * point.accuracy for point in curve(result, "reasoning", "reasoning", family)]
        assert lines[f"reasoning-{family}"] == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "5"]


def test_a_long_name_fits_into_the_picture():
    figure = _draw(whole_result(name="organisation/" + "very-long-name-" * 12, kinds=("retrieval",)))
    width = figure.get_size_inches()[0] * figure.dpi
    assert all(text.get_window_extent().x1 <= width for text in figure.texts)


def test_drops_are_written_beside_all_scores():
    scores = torch.arange(24.0).view(4, 6)
    checked = [CheckedScores(name, name.split()[0], scores) for name in ("retrieval", "write", "write of a, b")]
    drops = HeadDrops(
        torch.stack([-scores, scores.square() - 1, scores.square() + 1]),
        (AskedProbe("reasoning", "f", 0), AskedProbe("retrieval", "f", 0), AskedProbe("retrieval", "f", 1)),
    )
    lines = drops_csv(checked, drops).splitlines()
    assert lines[0] == (
        "layer,head,retrieval_score,retrieval_drop,retrieval_drop_se,reasoning_score,reasoning_drop,reasoning_drop_se,"
        'write_score,"write of a, b_score"'
    )
    assert lines[8] == "1,1,7,49,1,,-7,0,7,7" and len(lines) == 25


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a profile of it."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny", "llama", chat=True, layers=3)
    make_profile(load_tiny(layers=3)).save(place / "profiles" / "tiny.safetensors")
    make_profile(load_tiny(layers=2)).save(place / "other.safetensors")
    return place


SHORT = ("--model", "tiny", "--probes", "8", "--length", "500", "--pack", "2", "--top", "2", "--draws", "1")


def run(place, *arguments):
    app = typer.Typer()
    app.command()(cli_validate)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return CliRunner().invoke(app, [*SHORT, *arguments])


MISTAKES = {
    "no top": (("--top", "0"), "with 0 top heads"),
    "top of too many": (("--top", "7"), "Silencing 7 of 12 heads"),
    "unknown ablation": (("--ablate", "noise"), "cannot be ablated by 'noise'"),
    "unknown families": (("--families", "state,chess"), "no needle family 'chess'"),
    "no profile beside": (("--beside", "absent.safetensors"), "absent.safetensors", 1),
    "unknown place": (("--where", "answer"), "cannot be silent in the 'answer'"),
    "unknown picture": (("-o", "v.gif"), "not as 'v.gif'"),
    "no draws": (("--draws", "0"), "with 0 draws"),
    "several lengths": (("--length", "500,600"), "several lengths where one is wanted"),
    "length that is no length": (("--length", "long"), "A length of 'long' cannot be read"),
    "csv of nothing": (("--csv", "drops.csv"), "those of --per-head: give both"),
    "too few contexts": (("--probes", "6"), "6 probes in fewer than 4 contexts"),
    "no profile": (("absent.safetensors",), "absent.safetensors", 1),
}


@pytest.mark.parametrize(("arguments", "message", "code"), [(*each, 2)[:3] for each in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(place, arguments, message, code, monkeypatch):
    monkeypatch.setattr("headprof.models.loading.load_model", None)
    made = run(place, *arguments)
    assert made.exit_code == code and message in made.stderr and made.stderr.count("\n") == 1
    assert made.stdout == ""


def test_mistakes_that_only_the_model_shows(place):
    assert "5000 tokens" in run(place, "--length", "5000").stderr
    assert "is for another model (layers 2 instead of 3)" in run(place, "other.safetensors").stderr


def test_a_random_model_answers_too_little_to_be_checked(place):
    made = run(place, "-o", "never.png")
    assert made.exit_code == 1 and "answers 0 of 4 retrieval probes" in made.stderr
    assert not (place / "never.png").exists()


def test_the_command_prints_table_verdict_and_picture(place, monkeypatch):
    monkeypatch.setattr(validation, "MIN_RIGHT", 0)
    made = run(place, "--where", "question", "--per-head", "--csv", "drops.csv", "-o", "made.svg")
    assert made.exit_code == 1  # a random model confirms nothing
    lines = made.stdout.splitlines()
    assert lines[0].split()[:2] == ["probes", "silent"]
    assert [line.split(".")[0] for line in lines[-2:]] == ["Retrieval: not confirmed", "Reasoning: not confirmed"]
    assert [line.split()[2] for line in lines[-4:-2]] == list(PROBE_KINDS) and "rank correlation" in made.stdout
    assert made.stderr == "The picture is made.svg.\n" and (place / "made.svg").exists()
    assert len((place / "drops.csv").read_text().splitlines()) == 13


def test_json_holds_every_figure_and_a_confirmed_profile_ends_well(place, monkeypatch):
    monkeypatch.setattr(validation, "MIN_RIGHT", 0)
    monkeypatch.setattr(Verdict, "confirmed", True)
    made = run(place, "--json", "--per-head", "--batch-heads", "3")
    assert made.exit_code == 0
    figures = json.loads(made.stdout)
    assert figures["model"] == "tiny" and figures["settings"]["top"] == 2
    assert [each["sentence"].split(".")[0] for each in figures["verdicts"]] == [
        "Retrieval: confirmed",
        "Reasoning: confirmed",
    ]
    assert len(figures["points"]) == 2 * 2 * 3 * 4  # with counts of 0, 1, 2 and 5
    assert len(figures["per_head"]["drops"]["reasoning"]) == 3
    pairs = [(each["yardstick"], each["scores"]) for each in figures["side_by_side"]["agreements"]]
    yardsticks = [f"{probes} drops" for probes in PROBE_KINDS] + [f"curves ({each})" for each in ("known", "unknown")]
    assert pairs == [(yardstick, kind) for yardstick in yardsticks for kind in PROBE_KINDS]
