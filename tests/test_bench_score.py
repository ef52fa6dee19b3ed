"""The papers' procedure against the estimators and against our own scoring; both sides in one run."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.clock import Clock
from support.probe_builders import builder_for
from support.tiny_models import ARCHITECTURES, load_tiny

from headprof.bench.score import (
    SIDES,
    ScoreBenchRequest,
    ScoreBenchResult,
    SideResult,
    limit_length,
    memory_slope,
    run_score_bench,
)
from headprof.bench.score import agreement as score_agreement
from headprof.bench.score import sides as score_sides
from headprof.bench.score.sides import attentions_bytes
from headprof.bench.score.stepwise import StepwiseProber
from headprof.cli import main
from headprof.cli.tables import bench as tables
from headprof.errors import UsageError
from headprof.models import random_weights as random_models
from headprof.models.published import SHAPES
from headprof.models.shape import HeadShape
from headprof.scoring.estimators import reasoning_score, retrieval_score
from headprof.scoring.prober import Prober, ProbeResult

REQUEST = ScoreBenchRequest(lengths=(600,), probes=8, pack=2, include_failed=True, top=3)
MANY_ENDS = list(range(1, 512, 9))
"""So many that a model with random weights may end before it has said as much as it can."""


def line_breaks(tokenizer):
    return [token for token in range(512) if "\n" in tokenizer.decode([token])]


def single_needles(loaded):
    """Two probes of each kind, each alone in a context."""
    return builder_for(loaded, probes=4, pack=4, length=900).unpacked(0)


def estimate(loaded, context, probe, said):
    """Scores `[L, H]` of what was said, by the estimators, from whole attention matrices."""
    ids = torch.tensor([[*context.context_ids, *probe.question_ids, *said[:-1]]])
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    attentions = loaded.model(ids, output_attentions=True).attentions
    loaded.model.set_attn_implementation(before)
    in_span = torch.zeros(ids.shape[1], dtype=torch.bool)
    in_span[slice(*probe.answer_span)] = True
    rows = [attention[0, :, -len(said) :] for attention in attentions]
    if probe.kind == "reasoning":
        return torch.stack([reasoning_score(each, in_span) for each in rows])
    scores = torch.stack([retrieval_score(each, in_span, ids[0], torch.tensor(said)) for each in rows])
    return scores * len(said) / int(in_span.sum())  # the papers divide by the span's length


@pytest.mark.parametrize("prefill", ["fast", "attentions"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loop_gives_the_estimators_numbers(arch, prefill):
    loaded = load_tiny(arch)
    attention = loaded.model.config._attn_implementation
    prober = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, prefill=prefill, max_new_tokens=4)
    kinds = set()
    for context in single_needles(loaded):
        (probe,) = context.probes
        said, scores = prober.decode(context.context_ids, probe)
        assert 1 <= len(said) <= 4 and scores.dtype == torch.float32
        torch.testing.assert_close(scores, estimate(loaded, context, probe, said), atol=1e-6, rtol=1e-4)
        (result,) = prober.run(context)
        assert torch.equal(result.scores, scores) and (result.kind, result.family) == (probe.kind, probe.family)
        kinds.add(probe.kind)
    assert kinds == {"retrieval", "reasoning"} and loaded.model.config._attn_implementation == attention


def test_a_head_that_copies_is_counted(monkeypatch):
    """Random weights hardly ever attend to what they say; here two heads do, in every other step."""
    loaded = load_tiny()
    context, probe = next((c, c.probes[0]) for c in single_needles(loaded) if c.probes[0].kind == "retrieval")
    ids = [*context.context_ids, *probe.question_ids]
    prober = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, max_new_tokens=4)
    steps = iter(range(4))

    def feed(token_ids, cache, output_attentions=False):
        if not output_attentions:
            return None
        step, place = next(steps), probe.answer_span[0]
        logits, rows = torch.zeros(1, 1, 512), [torch.zeros(1, 4, 1, len(ids) + step) for _ in range(2)]
        logits[..., ids[place] if step % 2 else 300] = 1
        rows[0][0, 1, 0, place] = rows[1][0, 3, 0, place] = 1
        rows[1][0, 2, 0, probe.answer_span[0] - 1] = 1
        return type("Output", (), {"logits": logits, "attentions": rows})

    monkeypatch.setattr(prober, "_feed", feed)
    said, scores = prober.decode(context.context_ids, probe)
    assert said == [300, ids[probe.answer_span[0]]] * 2
    assert scores.nonzero().tolist() == [[0, 1], [1, 3]]
    assert scores.max() == pytest.approx(2 / (probe.answer_span[1] - probe.answer_span[0]))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_both_prefills_give_the_same_results(arch):
    loaded = load_tiny(arch)
    sides = [
        StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, prefill=prefill, max_new_tokens=5)
        for prefill in ("fast", "attentions")
    ]
    for context in single_needles(loaded):
        (fast,), (slow,) = (side.run(context) for side in sides)
        torch.testing.assert_close(fast.scores, slow.scores, atol=1e-6, rtol=1e-4)
        assert (fast.kind, fast.answered) == (slow.kind, slow.answered)


@pytest.mark.parametrize("prefill", ["fast", "attentions"])
def test_attention_is_asked_for_where_it_is_needed(prefill):
    loaded, seen = load_tiny(), []

    def note(module, args, kwargs):
        attention = loaded.model.config._attn_implementation
        seen.append((args[0].shape[1], attention, kwargs.get("output_attentions", False)))

    loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    context = single_needles(loaded)[0]
    prober = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, prefill=prefill, max_new_tokens=3)
    said, _ = prober.decode(context.context_ids, context.probes[0])
    length = len(context.context_ids) + len(context.probes[0].question_ids)
    read = (length - 1, "sdpa", False) if prefill == "fast" else (length - 1, "eager", True)
    assert seen == [read] + [(1, "eager", True)] * len(said) and len(said) == 3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_whole_run_equals_our_greedy_one(arch):
    loaded = load_tiny(arch)
    loaded.model.generation_config.eos_token_id = MANY_ENDS + line_breaks(loaded.tokenizer)
    stepwise = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, max_new_tokens=6)
    for context in single_needles(loaded):
        (theirs,) = stepwise.run(context)
        with Prober(loaded.model, loaded.shape, "greedy", loaded.tokenizer) as prober:
            prober.max_extra_tokens = 6 - len(context.probes[0].answer_ids)
            (ours,) = prober.run(context)
            with torch.inference_mode():
                said = list(prober._greedy_answer(context.probes[0]))
        assert stepwise.decode(context.context_ids, context.probes[0])[0] == said
        torch.testing.assert_close(theirs.scores, ours.scores, atol=1e-6, rtol=1e-4)
        assert (theirs.kind, theirs.family, theirs.answered) == (ours.kind, ours.family, ours.answered)


def test_where_an_answer_ends():
    loaded = load_tiny()
    context = single_needles(loaded)[0]
    (probe,) = context.probes

    def said(**options):
        prober = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer, **options)
        return prober.decode(context.context_ids, probe)[0]

    whole = said(max_new_tokens=20)
    assert len(whole) == 20 and len(probe.answer_ids) < 20
    assert said(stop_after_answer=True) == whole[: len(probe.answer_ids)]
    assert said(max_new_tokens=1, stop_after_answer=True) == whole[:1]
    last = next(at for at in range(2, 20) if whole[at] not in whole[:at])
    loaded.model.generation_config.eos_token_id = whole[last]
    assert said() == whole[:last]
    loaded.model.generation_config.eos_token_id = whole[0]
    assert said()[0] == whole[0]  # at least one token
    loaded.model.generation_config.eos_token_id = None
    decode = loaded.tokenizer.decode
    loaded.tokenizer.decode = lambda ids, **options: ".\n" if ids == [whole[last]] else decode(ids, **options)
    assert said() == whole[:last]


def test_a_right_answer_counts():
    loaded = load_tiny()
    context = single_needles(loaded)[0]
    (probe,) = context.probes
    prober = StepwiseProber(loaded.model, loaded.shape, loaded.tokenizer)
    for text, right in ((f"{probe.answer}.", True), (f"It is {probe.answer}, I think.", True), ("no", False)):
        prober.decode = lambda *_, text=text: (loaded.tokenizer(text).input_ids, torch.zeros(2, 4))
        assert prober.run(context)[0].answered == right


@pytest.fixture(scope="module")
def whole_run():
    progress = []
    loaded = load_tiny()
    result = run_score_bench(
        loaded,
        dataclasses.replace(REQUEST, lengths=(700, 600), stop_after_answer=True),
        lambda *state: progress.append(state),
    )
    return result, progress


@pytest.mark.long
def test_all_sides_are_measured_in_turn(whole_run):
    result, progress = whole_run
    assert [(side.length, side.side) for side in result.sides] == [(n, side) for n in (600, 700) for side in SIDES]
    for side in result.sides:
        assert side.failed == "" and side.probes == 8 and side.answered == 0  # of a model with random weights
        assert (side.estimated_bytes is None) == (side.side != "stepwise-attentions")
    assert [done for _, done, _ in progress] == [0, 0, 0, *range(24)] and {total for *_, total in progress} == {24}
    turns = [text.split(",")[0] for text, *_ in progress[3:15]]
    assert turns == [*SIDES, *reversed(SIDES)] * 2
    assert result.environment["dtype"] == "float32"


def test_seconds_and_peaks_are_those_of_the_contexts(monkeypatch):
    """Three packed contexts take 4, 4 and 2 seconds, each context of one needle 3; the peaks are of their turns."""
    clock, peaks = Clock(), iter([100, 300, None, 700, 200, 250])

    def takes(side):
        def run(context):
            seconds = 2 * len(context.probes) if side == "packed" else 3
            clock.wait(seconds)
            return [ProbeResult(p.kind, p.family, side == "packed", torch.rand(2, 4)) for p in context.probes]

        return run

    monkeypatch.setattr(score_sides, "_scoring", lambda loaded, request, side: takes(side))
    monkeypatch.setattr(score_sides, "now", clock)
    monkeypatch.setattr(score_sides, "PeakMemory", lambda device: SimpleNamespace(used=lambda: next(peaks)))
    request = dataclasses.replace(REQUEST, probes=5, sides=SIDES[:2])
    packed, fast = run_score_bench(load_tiny(), request).sides
    assert (packed.seconds, packed.seconds_per_probe, packed.probes_per_minute) == (10, 2, 30)
    assert (fast.seconds, fast.seconds_per_probe, fast.probes_per_minute) == (15, 3, 20)
    assert (packed.packed_speedup, fast.packed_speedup) == (1, 1.5)
    assert (packed.answered, fast.answered) == (5, 0)
    # Turns: packed, fast, fast, packed, packed, fast.
    assert (packed.peak_bytes, fast.peak_bytes) == (700, 300)


def test_the_sides_of_one_run_agree_where_they_do_the_same(whole_run):
    result, _ = whole_run
    assert len(result.agreements) == 2 * 2 * 2 * 2  # lengths, other sides, both bases, kinds
    for each in result.agreements:
        assert each.length in (600, 700) and each.side in SIDES[1:]
        if each.over == "all":
            assert each.probes == (4, 4) and each.overlap is not None
        else:  # random weights answer nothing
            assert each.probes[0] == 0 and each.spearman is each.overlap is None
    fast, slow = (
        [(each.kind, each.over, each.probes, each.spearman) for each in result.agreements if each.side == side]
        for side in SIDES[1:]
    )
    assert fast == slow  # two ways to the same scores


@pytest.mark.long
def test_our_side_runs_each_packed_context_and_theirs_the_same_taken_apart(monkeypatch):
    loaded, ran = load_tiny(), []

    def note(side):
        def run(context):
            ran.append((side, context))
            return [ProbeResult(p.kind, p.family, True, torch.rand(2, 4)) for p in context.probes]

        return run

    monkeypatch.setattr(score_sides, "_scoring", lambda loaded, request, side: note(side))
    run_score_bench(loaded, dataclasses.replace(REQUEST, probes=5))
    ran = ran[3:]
    builder = builder_for(loaded, probes=5, pack=2, length=600)
    assert [context for side, context in ran if side == "packed"] == list(builder)
    for other in SIDES[1:]:
        apart = [context for side, context in ran if side == other]
        assert apart == [each for index in range(3) for each in builder.unpacked(index)]
        assert [c.probes[0].question for c in apart] == [p.question for context in builder for p in context.probes]


def fake_results(values, answered):
    """One retrieval probe for each row of scores, `[2, 2]`."""
    rows = torch.tensor(values).view(len(values), 2, 2)
    return [ProbeResult("retrieval", "code", right, scores) for right, scores in zip(answered, rows, strict=True)]


def agreements(request, **results):
    sides = [
        score_sides.Side(name.replace("_", "-"), 600, 2, torch.device("cpu"), None, results=each)
        for name, each in results.items()
    ]
    return score_agreement.agreements(sides, request)


def test_agreement_is_over_the_probes_each_side_counts():
    ours = fake_results([[4.0, 3, 2, 1], [0.0, 0, 0, 9]], [True, False])
    theirs = fake_results([[1.0, 0, 0, 0], [3.0, 4, 2, 1]], [False, True])
    request = dataclasses.replace(REQUEST, top=2)
    answered, everything = agreements(request, stepwise_fast=theirs, packed=ours)
    assert (answered.side, answered.length, answered.kind) == ("stepwise-fast", 600, "retrieval")
    assert (answered.over, answered.probes, answered.overlap) == ("answered", (1, 1), 1)
    assert answered.spearman == pytest.approx(0.8)
    # Means: 2, 1.5, 1, 5 and 2, 2, 1, 0.5.
    assert (everything.over, everything.probes, everything.overlap) == ("all", (2, 2), 0.5)
    assert everything.spearman == pytest.approx(-0.316, abs=1e-3)
    assert agreements(dataclasses.replace(request, include_failed=False), packed=ours, stepwise_fast=theirs) == [
        answered
    ]
    assert agreements(request, stepwise_fast=theirs) == []
    level = fake_results([[1.0, 1, 1, 1]] * 2, [True, True])
    assert agreements(request, packed=ours, stepwise_fast=level)[0].spearman is None


def test_a_side_without_memory_is_not_tried_again_at_longer_lengths(monkeypatch):
    scoring, tried = score_sides._scoring, []

    def scarce(loaded, request, side):
        work = scoring(loaded, request, side)

        def run(context):
            tried.append((side, len(context.context_ids) > 650))
            if side == "stepwise-fast" and len(tried) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return work(context)

        return run

    monkeypatch.setattr(score_sides, "_scoring", scarce)
    request = dataclasses.replace(REQUEST, lengths=(600, 800), sides=SIDES[:2], probes=4, stop_after_answer=True)
    result = run_score_bench(load_tiny(), request)
    assert [side.failed for side in result.sides] == ["", "out of memory", "", "out of memory at 600"]
    assert result.sides[1].seconds is result.sides[1].packed_speedup is None
    assert result.sides[0].packed_speedup == result.sides[2].packed_speedup == 1 and result.agreements == []
    assert ("stepwise-fast", True) not in tried and ("packed", True) in tried


def test_all_attention_is_not_asked_for_where_it_cannot_fit(monkeypatch):
    loaded = load_tiny()
    needed = attentions_bytes(loaded.shape, 700, 4)
    assert needed == 4 * 700**2 * (2 * 4 + 2 * 4 + 4)
    monkeypatch.setattr(score_sides, "free_bytes", lambda device: needed / 0.8 - 1)
    request = dataclasses.replace(REQUEST, lengths=(600, 700), probes=2, stop_after_answer=True)
    result = run_score_bench(loaded, request)
    assert [side.failed for side in result.sides] == [""] * 5 + ["would need 39.2 MB (estimate)"]
    assert result.sides[-1].estimated_bytes == needed
    _, rows = tables.scoring(result)
    assert rows[-1][4:8] == ["would need 39.2 MB (estimate)", "-", "-", "39.2 MB (estimate)"]


def test_the_estimate_of_a_published_model():
    llama = HeadShape("LlamaForCausalLM", 32, 32, 8, 128, 128256)
    assert attentions_bytes(llama, 8192, 2) == 32 * 8192**2 * (64 + 4 + 4)


FACTORS = st.floats(0.01, 1e4)


@given(lengths=st.sets(st.integers(100, 50000), min_size=3, max_size=6), start=st.integers(0, 10**9), slope=FACTORS)
def test_a_line_is_found_again(lengths, start, slope):
    assume(max(lengths) - min(lengths) > 500)
    points = [(length, round(start + 1000 * slope * length)) for length in lengths]
    line = memory_slope(points)
    assert line.bytes_per_token == pytest.approx(1000 * slope, rel=1e-2, abs=1)
    assert line.r_squared == pytest.approx(1, abs=1e-3) and line.lengths == len(lengths)


@given(square=st.floats(1, 2000), slope=st.floats(0, 1e5), limit=st.floats(1e10, 1e11))
def test_a_parabola_is_followed_to_the_limit(square, slope, limit):
    lengths = (1024, 2048, 3000, 4096)
    points = [(length, round(square * length**2 + slope * length)) for length in lengths]
    expected = (-slope + math.sqrt(slope**2 + 4 * square * limit)) / (2 * square)
    assert limit_length(points, limit) == pytest.approx(expected, rel=0.02)


def test_what_two_lengths_or_a_level_memory_cannot_say():
    assert memory_slope([(1, 1), (2, 2)]) is None and limit_length([(1, 1), (2, 2)], 9) is None
    level = [(1, 5), (2, 5), (3, 5)]
    assert memory_slope(level).r_squared == 1 and memory_slope(level).bytes_per_token == pytest.approx(0, abs=1e-9)
    assert limit_length([(1, 10), (2, 5), (3, 0)], 20) is None
    bent = memory_slope([(1, 0), (2, 0), (3, 3), (4, 3)])
    assert bent.bytes_per_token == pytest.approx(1.2) and bent.r_squared == pytest.approx(0.8)


def test_remarks_name_slope_and_limit():
    peaks = {"packed": lambda n: 1000 * n + n % 7, "stepwise-attentions": lambda n: 1000 * n * n}
    sides = [
        SideResult(s, n, 8, 1, 1.0, 1.0, 1.0, 1.0, peak(n)) for n in (1000, 2000, 3000) for s, peak in peaks.items()
    ]
    sides.append(SideResult("stepwise-fast", 1000, 8, failed="out of memory"))
    ours, theirs = tables.memory_remarks(ScoreBenchResult(10, sides, [], {}))
    assert ours == "packed: peak memory grows by 1 kB a token (line through 3 lengths, R2 1.000)."
    assert theirs.endswith("24 GB beside the weights at about 4898 tokens (parabola, extrapolated).")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sides": ("packed", "theirs")}, "no side 'theirs' to run: use some of packed, stepwise-fast"),
        ({"sides": ()}, "no side '' to run"),
        ({"lengths": ()}, "without lengths"),
        ({"probes": 0}, "--probes 0 is too small"),
        ({"pack": 0}, "--pack 0 is too small"),
        ({"top": 0}, "--top 0 is too small"),
        ({"lengths": (600, 5000)}, "5000 tokens is more than the 4096 positions"),
        ({"lengths": (600, 80)}, "80 tokens is too short"),
    ],
)
def test_requests_that_cannot_be_met(change, message):
    loaded, seen = load_tiny(), []
    loaded.model.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(UsageError, match=message):
        run_score_bench(loaded, dataclasses.replace(REQUEST, **change))
    assert not seen


def run_command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "score", "--lengths", "600", "--probes", "2", "--top", "3", *arguments])
    return ended.value.code


def test_the_command_prints_a_table_and_keeps_all_figures(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(tiny_folder), "--pack", "2", "--include-failed", "-o", "figures.json"]
    assert run_command(*options) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines] == ["side", *SIDES, "Mean", "side", *SIDES[1:2] * 4, *SIDES[2:] * 4]
    assert "top 3" in lines[5] and "0 and" in lines[6] and "torch" in shown.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"] == "tiny-llama" and figures["request"]["pack"] == 2
    assert len(figures["sides"]) == 3 and len(figures["agreements"]) == 8
    assert run_command(*options[:-2], "--sides", "packed", "--json") == 0
    assert [side["side"] for side in json.loads(capsys.readouterr().out)["sides"]] == ["packed"]


@pytest.fixture
def small_shape(monkeypatch):
    """A published shape made small, with few positions and room for the tokenizer of bytes."""
    small = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 500}
    numbers = SHAPES["smollm2-135m"] | small
    monkeypatch.setitem(SHAPES, "smollm2-135m", numbers)


@pytest.mark.long
def test_random_weights_of_a_shape_are_scored_too(small_shape, capsys):
    assert run_command("--shape", "smollm2-135m", "--device", "cpu", "--lengths", "1500", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["model"] == "smollm2-135m" and all(not side["failed"] for side in figures["sides"])
    assert {each["over"] for each in figures["agreements"]} == {"answered", "all"}
    assert figures["request"]["stop_after_answer"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sides", "ours"), "There is no side 'ours'"),
        (("--shape", "gpt-5"), "gpt-5"),
        (("--lengths", "9k"), "9216 tokens"),
        (("--probes", "0"), "--probes 0 is too small"),
    ],
)
def test_mistakes_get_one_sentence(tiny_folder, capsys, arguments, message):
    assert run_command("--model", str(tiny_folder), *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and message in shown.err and len(shown.err.strip().splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(small_shape):
    loaded = random_models.load_random("smollm2-135m", device="cuda", max_positions=4096)
    sides = (*SIDES, "together")
    request = dataclasses.replace(REQUEST, lengths=(1024, 2048, 4096), sides=sides, stop_after_answer=True)
    result = run_score_bench(loaded, request)
    of_side = {side.side: side for side in result.sides if side.length == 1024}
    for side in of_side.values():
        assert side.launches_per_probe > 0 and 0 < side.busy_share < 1.5
    assert of_side["packed"].reads_per_probe == 1 / 2 and of_side["together"].reads_per_probe == 1 / 8
    assert of_side["together"].launches_per_probe < of_side["packed"].launches_per_probe
    assert all(not side.failed and side.peak_bytes > 0 for side in result.sides)
    for side in result.sides:
        if side.estimated_bytes is not None:
            assert side.estimated_bytes == pytest.approx(side.peak_bytes, rel=0.6)
    assert memory_slope(result.memory("packed")).lengths == 3


def test_contexts_that_share_passes_are_a_side_of_their_own(monkeypatch):
    """Three contexts by two: their scores are those of our side, and less is issued for a probe."""
    monkeypatch.setattr(Prober, "most_together", lambda self, length: 2)
    request = dataclasses.replace(REQUEST, probes=6, sides=("packed", "together"))
    result = run_score_bench(load_tiny(), request)
    packed, together = result.sides
    assert (packed.probes, packed.answered) == (together.probes, together.answered)
    assert packed.operators_per_probe < 160 and together.operators_per_probe < 0.6 * packed.operators_per_probe
    assert packed.reads_per_probe is packed.launches_per_probe is packed.busy_share is None  # on a CPU
    (reasoning,) = (each for each in result.agreements if (each.kind, each.over) == ("reasoning", "all"))
    assert reasoning.side == "together" and reasoning.probes == (3, 3) and reasoning.spearman > 0.999


def test_what_is_issued_is_counted_in_the_first_pass_alone(whole_run):
    result, _ = whole_run
    for side in result.sides:
        assert (side.operators_per_probe is not None) == (side.length == 600)
    packed, *others = (side.operators_per_probe for side in result.sides[:3])
    assert all(packed < other / 3 for other in others)
    columns, rows = tables.scoring(result)
    assert columns[8:] == ["operators", "launches", "host reads", "busy"]
    assert rows[0][8:] == [f"{packed:.0f}", "-", "-", "-"] and rows[3][8:] == ["-"] * 4


@pytest.mark.long
def test_unpacked_shows_what_packing_changes():
    loaded = load_tiny()
    request = dataclasses.replace(REQUEST, lengths=(700,), sides=("packed", "unpacked"), include_failed=True)
    result = run_score_bench(loaded, request)
    assert {each.side for each in result.agreements} == {"unpacked"}
    alone = dataclasses.replace(request, sides=("unpacked", "stepwise-fast"), stop_after_answer=True)
    beside = run_score_bench(loaded, alone)
    assert {each.side for each in beside.agreements} == {"stepwise-fast"}
    assert [side.packed_speedup for side in beside.sides] == [None, None]
