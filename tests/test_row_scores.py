"""Rows of all layers at once against layer by layer; contexts together against one by one; how little is issued."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.host_reads import device_watched
from support.probe_builders import builder_for
from support.tiny_models import ARCHITECTURES, load_tiny
from transformers.cache_utils import DynamicCache

from headprof.errors import ModelError
from headprof.models.attention_hook import wrapped_attention
from headprof.probes.build import Probe, ProbeBuilder, ProbeSettings
from headprof.scoring import layer_blocks
from headprof.scoring.attention_rows import RowBlock, attention_rows, causal_visibility
from headprof.scoring.estimators import reasoning_score, retrieval_score
from headprof.scoring.packing import Suffix, pack
from headprof.scoring.prober import Prober
from headprof.scoring.row_scores import RowScores, answers_of
from headprof.scoring.run import StopRule, score_heads
from headprof.scoring.write import contrast_weights, written
from headprof.utils.team import Team

LAYERS, HEADS, KV_HEADS, WIDTH = 3, 4, 2, 5


def random_probe(generator, length):
    """A probe with a random span in a context of `length` tokens."""

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    start = number(0, length)
    stop = number(start + 1, length + 1)
    needle = (number(0, start + 1), number(stop, length + 1))
    kind = ("retrieval", "reasoning")[number(0, 2)]
    question, answer = (tuple(number(0, 4) for _ in range(number(1, 5))) for _ in range(2))
    return Probe("f", kind, 0.5, question, (), answer, needle, (start, stop), (), "", "")


def packed_probes(contexts):
    """Packed suffixes of probes with their contexts' tokens: `(packed, answers, tokens seen, lengths)`."""
    lengths, width = [len(ids) for ids, _ in contexts], max(len(ids) for ids, _ in contexts)
    probes = [probes for _, probes in contexts]
    said = [[probe.answer_ids for probe in each] for each in probes]
    suffixes = [
        [Suffix((*p.question_ids, *p.answer_ids[:-1]), len(p.answer_ids), int(p.kind == "reasoning")) for p in each]
        for each in probes
    ]
    packed = pack(suffixes, lengths)
    held = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in contexts])
    return packed, answers_of(packed, probes, said), torch.cat([held, packed.ids], dim=1), lengths


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 2**31), block=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_all_layers_at_once_score_as_each_by_itself(counts, seed, block):
    generator = torch.Generator().manual_seed(seed)
    contexts = []
    for count in counts:
        ids = torch.randint(0, 4, (int(torch.randint(4, 12, (), generator=generator)),), generator=generator).tolist()
        contexts.append((ids, [random_probe(generator, len(ids)) for _ in range(count)]))
    packed, answers, tokens, lengths = packed_probes(contexts)
    sizes = (LAYERS, len(counts), HEADS, len(packed.rows), tokens.shape[1])
    rows = (4 * torch.randn(sizes, generator=generator)).softmax(-1)
    found = RowScores(answers, packed, tokens, lengths, (LAYERS, HEADS), None)
    most = 1 + seed % len(packed.rows)
    for first in range(0, LAYERS, block):
        layers = range(first, min(first + block, LAYERS))
        for start in range(0, len(packed.rows), most):
            columns = slice(start, min(start + most, len(packed.rows)))
            found.take(RowBlock(layers, columns, rows[first : layers.stop, :, :, columns], torch.zeros(0)))
    logits = torch.randn(len(counts), len(packed.rows), 4, generator=generator)
    results = found.results(logits, torch.tensor(3.0))
    for number, each in enumerate(answers):
        own, in_span = rows[:, each.context, :, each.columns], torch.zeros(tokens.shape[1], dtype=torch.bool)
        in_span[slice(*each.probe.answer_span)] = True
        said = torch.tensor(each.said)
        for layer in range(LAYERS):
            if each.probe.kind == "retrieval":
                expected = retrieval_score(own[layer], in_span, tokens[each.context], said)
            else:
                expected = reasoning_score(own[layer], in_span)
            torch.testing.assert_close(results.scores[number, layer], expected)
        assert results.right[number] == (logits[each.context, each.columns].argmax(-1) == said).tolist()
    assert results.writes is None and results.peaks.tolist() == [logits.max(), 3.0]


def layer_by_layer(loaded, prober, context, probe):
    """Score and write score of one probe, alone in its pass, layer by layer: `[L, H]` each."""
    model, shape, path = loaded.model, loaded.shape, prober.write_path()
    ids = torch.tensor([[*context.context_ids, *probe.question_ids, *probe.answer_ids[:-1]]])
    count, total = len(probe.answer_ids), ids.shape[1]
    rows, said = torch.arange(total - count, total), torch.tensor(probe.answer_ids)
    in_span = torch.zeros(total, dtype=torch.bool)
    in_span[slice(*probe.answer_span)] = True
    weights = contrast_weights(probe.needle_span, len(context.context_ids), total)
    scores, writes = torch.zeros(2, shape.num_layers, shape.num_heads, count).unbind()

    def wrap(base):
        def attention(module, query, key, value, mask, **how):
            layer, window = module.layer_idx, how.get("sliding_window")
            visible = causal_visibility(rows, total, window) if mask is None else mask[0, 0, rows, :total]
            attended = attention_rows(
                query[0, :, rows], key[0], visible, scaling=how["scaling"], softcap=how.get("softcap")
            )
            whole = (
                retrieval_score(attended, in_span, ids[0], said)
                if probe.kind == "retrieval"
                else reasoning_score(attended, in_span)
            )
            scores[layer] = whole[:, None]
            directions = path.head_directions(layer, path.directions(said), shape.num_heads)
            writes[layer] = written(attended, value[0].float(), directions, weights)
            return base(module, query, key, value, mask, **how)

        return attention

    with torch.no_grad(), wrapped_attention(model, wrap), path.reading_scales(rows) as scales:
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    return scores[..., 0], (writes * scales()[:, None]).mean(dim=-1)


@pytest.mark.parametrize("most_bytes", [1, 1 << 18, 1 << 30])
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*((arch, torch.float32) for arch in ARCHITECTURES), ("llama", torch.bfloat16), ("gemma3", torch.bfloat16)],
)
def test_blocks_of_any_size_equal_layer_by_layer(arch, dtype, most_bytes, monkeypatch):
    """From one row of one layer at a time to all of them at once."""
    loaded = load_tiny(arch, layers=3, num_kv_heads=2)
    loaded.model.to(dtype)
    monkeypatch.setattr(layer_blocks, "block_bytes", lambda device: most_bytes)
    context = builder_for(loaded, pack=3, length=700).context(0)
    with Prober(loaded.model, loaded.shape) as prober:
        together = prober.run(context)
        context = dataclasses.replace(context, probes=context.probes[:2])
        alone = [layer_by_layer(loaded, prober, context, probe) for probe in context.probes]
    for result, (scores, writes) in zip(together, alone, strict=False):
        close = {"atol": 1e-5, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.1}
        torch.testing.assert_close(result.scores, scores, **close)
        torch.testing.assert_close(result.write, writes, **close)


def assert_close(ours, theirs):
    assert (ours.kind, ours.family, ours.answered) == (theirs.kind, theirs.family, theirs.answered)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ours.write, theirs.write, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_contexts_together_equal_one_by_one(arch, attn):
    """Of different lengths, with different numbers of probes of each kind, and one that is read after them."""
    loaded = load_tiny(arch, attn="eager" if arch == "gemma2" else attn, sliding_window=40)
    contexts = [
        builder_for(loaded, pack=pack, length=length).context(1) for pack, length in ((3, 700), (1, 600), (2, 640))
    ]
    assert len({len(context.context_ids) for context in contexts}) == 3
    with Prober(loaded.model, loaded.shape) as prober:
        together = prober.run_together(contexts)
        after = prober.run(contexts[1], anew=False)
    assert [len(results) for results in together] == [3, 1, 2]
    for context, results in zip(contexts, together, strict=True):
        with Prober(loaded.model, loaded.shape) as prober:
            for ours, theirs in zip(results, prober.run(context), strict=True):
                assert_close(ours, theirs)
    assert_close(after[0], together[1][0])


def test_only_contexts_that_may_share_a_pass_do():
    loaded = load_tiny()
    contexts = list(builder_for(loaded, probes=4, pack=2, length=500))
    with Prober(loaded.model, loaded.shape, "greedy", loaded.tokenizer) as prober:
        assert prober.most_together(500) == 1
        assert [len(results) for results in prober.run_together(contexts)] == [2, 2]
        assert len(prober._context._lengths) == 1
    with Prober(loaded.model, loaded.shape) as prober:
        assert prober.most_together(500) == 1  # on a CPU
        prober.run_together(contexts)
        assert len(prober._context._lengths) == 2
        prober._context.shares_passes = False
        prober.run_together(contexts)
        assert len(prober._context._lengths) == 1


@pytest.mark.parametrize("together", [2, 16])
def test_a_run_whose_contexts_share_passes_has_the_same_profile(tmp_path, together):
    loaded = load_tiny()
    builder = ProbeBuilder(loaded.tokenizer, ProbeSettings(22, (700, 500), needles_per_context=2), max_positions=4096)
    one_by_one = score_heads(loaded, builder, include_failed=True)
    done, file = [], tmp_path / "run.probes.safetensors"
    options = {"include_failed": True, "together": together, "results_path": file}
    shared = score_heads(loaded, builder, **options, on_progress=lambda now: done.append(now.done))
    assert done == ([4, 8, 8, 12, 16, 16, 20, 22, 22] if together == 2 else [12, 22, 22])
    again = score_heads(loaded, builder, **options, resume=True)
    for kind in ("retrieval", "reasoning", "write"):
        torch.testing.assert_close(shared.scores[kind], one_by_one.scores[kind], atol=1e-5, rtol=1e-3)
        assert torch.equal(shared.scores[kind], again.scores[kind])
    assert shared.probes_used == one_by_one.probes_used
    assert shared.metadata["accuracy"] == one_by_one.metadata["accuracy"]


def test_a_run_until_it_is_stable_ends_at_the_same_probe_when_contexts_share_passes():
    loaded = load_tiny()
    builder = builder_for(loaded, probes=200, pack=2, length=500)
    options = {"include_failed": True, "stop": StopRule(top=3, tolerance=0.7)}
    alone, shared = (score_heads(loaded, builder, **options, together=together) for together in (1, 3))
    assert alone.settings["asked"] == shared.settings["asked"] < 200


class OneOfThree(Team):
    """A process of a team, as far as agreeing on passes goes."""

    def __init__(self, others):
        super().__init__(0, 3)
        self.others = others

    def gather(self, mine):
        return [mine, *self.others]


def test_a_team_agrees_on_what_shares_a_pass():
    from headprof.scoring.passes import Passes

    loaded = load_tiny()
    builder = ProbeBuilder(loaded.tokenizer, ProbeSettings(40, (700, 500), needles_per_context=2), max_positions=4096)
    passes = Passes.settled(builder, Prober(loaded.model, loaded.shape), OneOfThree([5, 2]), 8)
    assert passes.most == {700: 2, 500: 2} and passes.enough == 12
    assert passes.of(builder.groups()[:14]) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12], [13]]
    assert passes.of(builder.groups()[:4]) == [[0], [1], [2], [3]]  # some for each process


def test_numbers_that_overflow_are_noticed_wherever_they_do():
    loaded = load_tiny()
    contexts = list(builder_for(loaded, probes=4, pack=2, length=500))
    loaded.model.lm_head.weight[7] = torch.inf
    with Prober(loaded.model, loaded.shape) as prober:
        prober._found = "Not looked for."
        for work in (lambda: prober.run(contexts[0]), lambda: prober.run_together(contexts)):
            with pytest.raises(ModelError, match="numbers overflow in float32"):
                work()


# How much is issued.


def bare_operators(loaded, contexts, probers_context):
    """Of the two forward passes alone: a prefill, and all suffixes under their mask."""
    with torch.inference_mode(), device_watched() as watched:
        probers_context.fill_together([context.context_ids for context in contexts])
        probes = [context.probes for context in contexts]
        suffixes = [[Suffix((*p.question_ids, *p.answer_ids[:-1]), len(p.answer_ids)) for p in each] for each in probes]
        probers_context.feed(pack(suffixes, [len(context.context_ids) for context in contexts]))
    return len(watched.operators)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(("layers", "pack"), [(2, 2), (2, 4), (8, 4)])
def test_a_pass_issues_hardly_more_than_the_model_and_is_read_once(layers, pack, together):
    """However many layers, probes and contexts there are."""
    loaded = load_tiny(layers=layers)
    contexts = list(builder_for(loaded, probes=3 * pack, pack=pack, length=900))[:together]
    with Prober(loaded.model, loaded.shape) as prober:
        prober.run_together(contexts)
        with device_watched() as watched:
            prober.run_together(contexts)
        bare = bare_operators(loaded, contexts, prober._context)
    assert len(watched.operators) - bare <= 80
    assert [each.split(" at ")[0] for each in watched.waits] == ["cpu"]
