"""Documents that are repeated in segments, and attention that is weighed by norms: each by its slow twin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.causal_classes import CLASSES, silence, tiny_causal
from support.observations import as_held_rows, observed_prompt
from support.profiles import random_profile
from support.prompts import left_padded, random_ids
from support.tiny_models import load_tiny, save_tiny, tiny_model, tiny_tokenizer
from support.twins import slow_attention
from test_evaluation import candidates_for, invented_question
from test_reconstruction import SCRIPT, kept_positions
from transformers import GPT2Config, GPT2LMHeadModel

from headprof.cli import main
from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.method import Method
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.table import find_method
from headprof.compression.observers import repeating_observers
from headprof.compression.segments import parts_of, segment_positions
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, HeadprofError, ModelError, UsageError
from headprof.evaluation.asker import Asker
from headprof.models.output_projection import output_weights, projected_norms, projecting_modules
from headprof.models.prompt_encoder import REPETITION, RESUMPTION, PromptEncoder
from headprof.models.shape import HeadShape

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 12
SEGMENTS = (20, 33, 7)
DOCUMENT = 50
ROOM = 140  # less than the repetition takes, more than two demands
WINDOWS = {"mistral": 24, "gemma2": 24, "gemma3": 24}


def observed_by(model, ids, segments, *, prefill_chunk=None, norms=False, fan_out=False):
    """What each layer's importance is given for a prompt that ends with segments, or one, and what it says."""
    method = Method(Reconstruction(norms=norms), UniformBudget())
    plan = make_plan(model, method=method, budget=12).for_observers(sum(segments))
    cache = FanOutCache([HeadCache(plan)]) if fan_out else HeadCache(plan)
    cache.expect_observers(sum(segments), segments if len(segments) > 1 else ())
    found = []
    for layer in cache.layers:

        def filled(observed, layer=layer, own=layer.filled):
            found.append((observed, plan.method.importance.score(observed)))
            own(observed)

        layer.filled = filled
    with attending_ragged(model, prefill_chunk=prefill_chunk), torch.no_grad():
        prefill(model, ids, cache)
    return found


def drawn_prompt(segments=SEGMENTS, document=DOCUMENT, seed=3):
    return torch.randint(3, 500, (1, document + sum(segments)), generator=torch.Generator().manual_seed(seed))


def of_each_segment(ids, segments):
    """The document and one segment, for each: what an ordinary model reads."""
    document, *own = ids.split([ids.shape[1] - sum(segments), *segments], dim=1)
    return [torch.cat([document, each], dim=1) for each in own]


def whole_matrix(model, ids, segments):
    """The largest attention to each of the document's tokens by the model's matrices, `[K, document]` of each layer."""
    document = ids.shape[1] - sum(segments)
    passes = [
        model(each, output_attentions=True, use_cache=False).attentions for each in of_each_segment(ids, segments)
    ]
    heads = model.config.num_key_value_heads
    return [
        torch.stack([each[0, :, document:, :document].float().amax(dim=1) for each in layer])
        .amax(dim=0)
        .unflatten(0, (heads, -1))
        .amax(dim=1)
        for layer in zip(*passes, strict=True)
    ]


@pytest.mark.parametrize("prefill_chunk", [None, 16, 55])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"])
def test_the_largest_over_segments_is_that_of_ordinary_passes(arch, prefill_chunk):
    """One of each segment alone: slices span the document's end, and several segments."""
    attn = "eager" if arch == "gemma2" else None
    model = tiny_model(arch, sliding_window=WINDOWS.get(arch), attn=attn)
    twin = tiny_model(arch, sliding_window=WINDOWS.get(arch), attn="eager")
    ids = drawn_prompt()
    found = observed_by(model, ids, SEGMENTS, prefill_chunk=prefill_chunk)
    for (observed, score), expected in zip(found, whole_matrix(twin, ids, SEGMENTS), strict=True):
        torch.testing.assert_close(score[0, :, :DOCUMENT], expected, atol=2e-5, rtol=1e-3)
        assert observed.segments == SEGMENTS and not observed.valid[:, DOCUMENT:].any()


@pytest.mark.parametrize("prefill_chunk", [None, 30])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_in_bfloat16_too(arch, prefill_chunk):
    """The queries and keys of the passes apart: attention itself is said in float32, the model's in bfloat16."""
    model = tiny_model(arch, sliding_window=WINDOWS.get(arch), dtype=torch.bfloat16, attn="eager")
    ids = drawn_prompt()
    found = observed_by(model, ids, SEGMENTS, prefill_chunk=prefill_chunk)
    for (_, score), expected in zip(found, whole_matrix(model, ids, SEGMENTS), strict=True):
        torch.testing.assert_close(score[0, :, :DOCUMENT], expected, atol=0.04, rtol=0.04)


def four_dimensional(tokens, segments, window=None):
    """Which tokens each sees, token by token, as a mask that is added: float32 `[1, 1, tokens, tokens]`."""
    document = tokens - sum(segments)
    number = [0] * document + [n for n, length in enumerate(segments, 1) for _ in range(length)]
    positions = segment_positions(tokens, segments, torch.device("cpu"))[0].tolist()
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min)
    for query in range(tokens):
        for key in range(query + 1):
            near = window is None or positions[key] > positions[query] - window
            if number[key] in (0, number[query]) and near:
                mask[query, key] = 0.0
    return mask[None, None]


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma2"])
def test_it_is_one_ordinary_pass_with_a_mask_of_its_own(arch, prefill_chunk):
    """Hidden states too: what the model says at the last token of all."""
    window = WINDOWS.get(arch)
    model = tiny_model(arch, sliding_window=window, attn="eager", layers=3)
    ids = drawn_prompt()
    tokens = ids.shape[1]
    masks = {
        "full_attention": four_dimensional(tokens, SEGMENTS),
        "sliding_attention": four_dimensional(tokens, SEGMENTS, window),
    }
    mask = masks if arch == "gemma2" else masks["sliding_attention" if window else "full_attention"]
    positions = segment_positions(tokens, SEGMENTS, ids.device)
    whole = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True, use_cache=False)
    plan = make_plan(model, method=Method(Reconstruction(), UniformBudget()), budget=12)
    cache = HeadCache(plan.for_observers(sum(SEGMENTS)))
    cache.expect_observers(sum(SEGMENTS), SEGMENTS)
    with attending_ragged(model, prefill_chunk=prefill_chunk), torch.no_grad():
        logits = prefill(model, ids, cache)
    torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-4, rtol=1e-3)
    for (_, score), attention in zip(observed_by(model, ids, SEGMENTS), whole.attentions, strict=True):
        paid = attention[0, :, DOCUMENT:, :DOCUMENT].amax(dim=1).unflatten(0, (2, -1)).amax(dim=1)
        torch.testing.assert_close(score[0, :, :DOCUMENT], paid, atol=2e-5, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    document=st.integers(1, 40),
    segments=st.lists(st.integers(1, 25), min_size=2, max_size=5),
    chunk=st.none() | st.integers(1, 60),
    arch=st.sampled_from(["llama", "mistral"]),
    groups=st.sampled_from([1, 2, 4]),
    norms=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(document, segments, chunk, arch, groups, norms, seed):
    sizes = {"num_heads": 4, "num_kv_heads": 4 // groups, "layers": 1, "seed": seed}
    model = tiny_model(arch, sliding_window=9 if arch == "mistral" else None, **sizes)
    twin = tiny_model(arch, sliding_window=9 if arch == "mistral" else None, attn="eager", **sizes)
    ids = drawn_prompt(segments, document, seed)
    [(_, score)] = observed_by(model, ids, tuple(segments), prefill_chunk=chunk, norms=norms)
    expected = norms_by_hand(twin, ids, segments) if norms else whole_matrix(twin, ids, segments)
    torch.testing.assert_close(score[0, :, :document], expected[0], atol=2e-5, rtol=1e-3)


@given(document=st.integers(0, 20), segments=st.lists(st.integers(1, 9), max_size=5), data=st.data())
def test_parts_are_each_token_once_with_its_position(document, segments, data):
    tokens = document + sum(segments)
    start = data.draw(st.integers(0, tokens))
    stop = data.draw(st.integers(start, tokens))
    positions = segment_positions(tokens, segments, torch.device("cpu"))[0].tolist()
    number = [0] * document + [n for n, length in enumerate(segments, 1) for _ in range(length)]
    states = torch.arange(stop).view(1, 1, stop, 1)
    seen = []
    for part in parts_of(start, stop, document, segments):
        its = range(start + part.queries.start, start + part.queries.stop)
        assert [positions[token] for token in its] == list(range(part.start, part.stop))
        keys = part.seen(states, document).flatten().tolist()
        last = its[-1]
        assert keys == [token for token in range(last + 1) if number[token] in (0, number[last])]
        assert len({number[token] for token in its}) == 1
        seen += its
    assert seen == list(range(start, stop))


def check_class(name):
    """Whether a causal model class reads segments as it reads each alone, or is refused; both ways of judging."""
    if name not in CLASSES:
        pytest.skip("the installed Transformers has no such class")
    torch.manual_seed(0)
    segments, outcome = (9, 6, 8), "equal"
    ids = torch.randint(3, 120, (1, DOCUMENT + sum(segments)))
    with silence():
        try:
            model = tiny_causal(CLASSES[name])
            model(ids)
        except Exception as error:
            pytest.skip(f"{type(error).__name__}: {error}")
        for norms in (False, True):
            try:
                passes = [
                    observed_by(model, each, (each.shape[1] - DOCUMENT,), norms=norms)
                    for each in of_each_segment(ids, segments)
                ]
                found = observed_by(model, ids, segments, norms=norms)
            except HeadprofError as error:
                outcome = f"refused: {error}"
                continue
            for (_, score), *alone in zip(found, *passes, strict=True):
                expected = torch.stack([each[:, :, :DOCUMENT] for _, each in alone]).amax(dim=0)
                difference = (score[:, :, :DOCUMENT] - expected).abs().max()
                assert difference < 1e-3 * expected.max()
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_causal_class_is_equal_or_refused(name):
    check_class(name)


@pytest.mark.parametrize("name", ["GPT2Config", "GPTNeoXConfig", "Cohere2Config", "GptOssConfig", "OPTConfig"])
def test_a_class_is_equal(name):
    """Learned positions, layers without any, sinks, other names of the output projection."""
    assert check_class(name) == "equal"


@pytest.mark.parametrize("name", ["RobertaConfig", "BartConfig"])
def test_a_class_is_refused(name):
    assert check_class(name).startswith("refused: ")


# Norms.


def norms_by_hand(model, ids, segments):
    """The same by definition, head by head: hidden states, values and attention of ordinary passes; `[K, document]`."""
    document = ids.shape[1] - sum(segments)
    heads, groups = (
        model.config.num_attention_heads,
        model.config.num_attention_heads // model.config.num_key_value_heads,
    )
    best = None
    for each in of_each_segment(ids, segments):
        given_states, values = {}, {}

        def note(module, args, kwargs, given_states=given_states):
            given_states[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        attention_modules = [layer.self_attn for layer in model.model.layers]
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attention_modules]
        output = model(each, output_attentions=True, use_cache=True)
        for hook in hooks:
            hook.remove()
        layers = []
        for index, attention in enumerate(output.attentions):
            values = output.past_key_values.layers[index].values[0]  # [K, T, D]
            if values.shape[1] < each.shape[1]:  # a sliding layer of Transformers keeps its window only
                module = attention_modules[index]
                made = module.v_proj(given_states[index])[0]
                values = made.unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            weight = attention_modules[index].o_proj.weight.double()  # [E, H * D]
            width = weight.shape[1] // heads
            rows = []
            for head in range(heads):
                projected = values[head // groups].double() @ weight[:, head * width : (head + 1) * width].T
                states = given_states[index][0].double().norm(dim=-1)[document:, None]
                paid = attention[0, head, document:, :document].double() * projected.norm(dim=-1)[:document] / states
                rows.append(paid.amax(dim=0))
            layers.append(torch.stack(rows).unflatten(0, (-1, groups)).amax(dim=1).float())
        best = layers if best is None else [torch.maximum(a, b) for a, b in zip(best, layers, strict=True)]
    return best


@pytest.mark.parametrize("segments", [SEGMENTS, (30,)])
@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma2"])
def test_norms_are_those_of_the_formula(arch, prefill_chunk, segments):
    model = tiny_model(arch, sliding_window=WINDOWS.get(arch), attn="eager")
    ids = drawn_prompt(segments)
    found = observed_by(model, ids, segments, prefill_chunk=prefill_chunk, norms=True)
    for (_, score), expected in zip(found, norms_by_hand(model, ids, segments), strict=True):
        torch.testing.assert_close(score[0, :, :DOCUMENT], expected, atol=2e-5, rtol=1e-3)


def test_what_values_come_to_in_a_model_with_other_layers():
    """GPT-2's projection is no linear layer, and has a bias; an adapter's is a module around one."""
    config = GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=64, n_positions=32)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    [module] = projecting_modules(model, HeadShape.from_config(config), "This")
    module.c_proj.bias.normal_()
    weights = output_weights(module, 3)
    torch.testing.assert_close(weights, module.c_proj.weight.view(3, 8, 24))
    values = torch.randn(2, 3, 5, 8)
    expected = torch.einsum("bhtd,hde->bhte", values.double(), weights.double()).norm(dim=-1)
    torch.testing.assert_close(projected_norms(values, weights).double(), expected, rtol=1e-5, atol=1e-6)


class _Adapted(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, states):
        return 2 * self.inner(states)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_values_come_to_is_shared_by_no_head_of_a_group(groups):
    model = tiny_model(num_kv_heads=4 // groups)
    module = projecting_modules(model, HeadShape.from_config(model.config), "This")[0]
    weights = output_weights(module, 4)
    module.o_proj = _Adapted(module.o_proj)
    torch.testing.assert_close(output_weights(module, 4), 2 * weights)
    values = torch.randn(1, 4 // groups, 6, 16)
    norms = projected_norms(values, weights)
    for head in range(4):
        states = torch.zeros(6, 64)
        states[:, 16 * head : 16 * (head + 1)] = values[0, head // groups]
        torch.testing.assert_close(norms[0, head], module.o_proj.inner(states).norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_norms_are_refused_where_there_is_no_output_projection():
    model = tiny_model()
    model.model.layers[1].self_attn.out = model.model.layers[1].self_attn._modules.pop("o_proj")
    with pytest.raises(ModelError) as refused:
        make_plan(model, method="kvzip", norms=True)
    assert str(refused.value) == (
        "The method 'kvzip' with norms needs the output projection of each layer's attention, which LlamaForCausalLM "
        "has not where Transformers' Llama has it: leave norms away."
    )


def test_nothing_is_watched_once_the_pass_has_ended_also_by_an_error():
    model = tiny_model()
    ids = drawn_prompt()

    def hooks():
        return [len(module._forward_pre_hooks) for module in model.modules()]

    before = hooks()
    observed_by(model, ids, SEGMENTS, norms=True)
    assert hooks() == before
    plan = make_plan(model, method="kvzip", norms=True, budget=12)
    with attending_ragged(model), torch.no_grad():
        inside, mlp = hooks(), model.model.layers[1].mlp
        mlp.forward = None
        with pytest.raises(TypeError):
            prefill(model, ids, HeadCache(plan))
        del mlp.forward
        assert hooks() == inside
        prefill(model, ids, HeadCache(plan))


def test_while_text_is_generated_values_count():
    """The last queries judge what is still held: by attention times what each row's value comes to."""
    model = tiny_model()
    queries, keys, values = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    module = model.model.layers[0].self_attn
    observed = as_held_rows(observed_prompt(queries, keys, values=values, scaling=0.5, module=module))
    attention = slow_attention(observed)[0].amax(dim=1)  # [H, T]
    norms = projected_norms(values, output_weights(module, 4))[0]
    expected = (attention * norms).unflatten(0, (2, 2)).amax(dim=1)
    found = Reconstruction(norms=True).score(observed)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_norms_serve_prompts_and_go_on():
    model = tiny_model()
    ids = drawn_prompt()
    answers = []
    for budget in (4096, 20):
        with compressed(model, method="kvzip", norms=True, budget=budget, buffer=4):
            answers.append(model.generate(ids, max_new_tokens=30, do_sample=False))
    full = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(answers[0], full) and not torch.equal(answers[1], full)


def test_norms_of_padded_prompts_are_those_of_each_alone():
    model = tiny_model()
    documents, lengths = random_ids(2, 40), [40, 25]
    ids, mask = left_padded(documents, lengths)
    plan = make_plan(model, method=Method(Reconstruction(norms=True), UniformBudget()), budget=10)
    with attending_ragged(model), torch.no_grad():
        batch = HeadCache(plan)
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=batch)
        for entry, length in enumerate(lengths):
            prefill(model, documents[entry : entry + 1, :length], alone := HeadCache(plan))
            shift = 40 - length
            for both, its in zip(kept_positions(batch), kept_positions(alone), strict=True):
                assert both[entry] == [[position + shift for position in head] for head in its[0]]


# What is read.


@pytest.mark.parametrize("chat", [True, False])
def test_each_part_is_asked_for_by_the_tokens_before_it(chat):
    tokenizer = tiny_tokenizer(chat=chat)
    encoder = PromptEncoder(tokenizer)
    document = encoder.document_ids(TEXT)
    repeated = encoder.repeated_ids(document)
    parts = encoder.repetition_parts(document, 30)
    count = -(-len(repeated) // 30)
    first, later = encoder.demand_lengths()
    assert len(parts) == count > 3
    demand = encoder.question_ids(REPETITION)
    assert parts[0][: len(demand)] == demand and first == len(demand)
    spoken = [parts[0][first:], *(part[later:] for part in parts[1:])]
    assert [token for part in spoken for token in part] == list(repeated)
    assert {len(part) for part in spoken} <= {len(repeated) // count, len(repeated) // count + 1}
    asked = tokenizer.decode(encoder.question_ids(f"{RESUMPTION}HERE"))
    for before, part in pairwise(range(count)):
        cue = tokenizer.decode(spoken[before][-8:])
        assert tokenizer.decode(parts[part][:later]) == asked.replace("HERE", cue)


def test_a_cue_is_no_longer_than_what_is_before_it():
    encoder = PromptEncoder(tiny_tokenizer(chat=True))
    document = encoder.document_ids("abcdefg")
    repeated = encoder.repeated_ids(document)
    parts = encoder.repetition_parts(document, 1)
    assert len(parts) == len(repeated) > 4
    assert parts[2] == [*encoder._resumption_ids(repeated[:2]), repeated[2]]
    assert encoder.repetition_parts(document, len(repeated)) == [encoder.repetition_ids(document)]


def slow_keeps(loaded, twin, plan, text):
    """What each head keeps of a text by ordinary passes over it and each part of its repetition."""
    encoder = PromptEncoder(loaded.tokenizer)
    document = encoder.document_ids(text)
    observers = repeating_observers(loaded, encoder, document, plan.method)
    ids = torch.tensor([[*document, *observers.ids]])
    kept = []
    scores = whole_matrix(twin, ids, observers.segments or (len(observers),))
    for paid, counts in zip(scores, plan.allocation(len(document)), strict=True):
        paid[:, [0, len(document) - 2, len(document) - 1]] = 2.0
        kept.append([[head.topk(int(n)).indices.sort().values.tolist() for head, n in zip(paid, counts, strict=True)]])
    return kept


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("segment", [25, 2048])
def test_a_document_keeps_what_some_part_of_its_repetition_looks_at(arch, segment, prefill_chunk):
    loaded, twin = load_tiny(arch), tiny_model(arch, attn="eager")
    plan = make_plan(loaded.model, random_profile(loaded.model), method="headkv-kvzip", budget=16, segment=segment)
    cache = compress_document(loaded, TEXT, plan, prefill_chunk=prefill_chunk)
    assert kept_positions(cache) == slow_keeps(loaded, twin, plan, TEXT)
    document = PromptEncoder(loaded.tokenizer).document_ids(TEXT)
    assert cache.get_seq_length() == len(document) and cache.token_ids.tolist() == [document]
    assert max(max(head) for layer in kept_positions(cache) for head in layer[0]) == len(document) - 1
    assert cache.plan.method.importance.segment == segment and cache.segments == ()


def test_one_segment_is_what_it_was():
    loaded = load_tiny()
    document = PromptEncoder(loaded.tokenizer).document_ids(TEXT)
    ids = [*document, *PromptEncoder(loaded.tokenizer).repetition_ids(document)]
    plan = make_plan(loaded.model, method="adakv-kvzip", budget=16)
    cache = HeadCache(plan.for_observers(len(ids) - len(document)))
    cache.expect_observers(len(ids) - len(document))
    with attending_ragged(loaded.model), torch.no_grad():
        prefill(loaded.model, torch.tensor([ids]), cache)
    made = compress_document(loaded, TEXT, plan)
    assert kept_positions(made) == kept_positions(cache)
    for layer, other in zip(made.head_layers, cache.head_layers, strict=True):
        assert torch.equal(layer.storage.compact().keys, other.storage.compact().keys)
    parts = make_plan(loaded.model, method="adakv-kvzip", budget=16, segment=20)
    assert kept_positions(compress_document(loaded, TEXT, parts)) != kept_positions(cache)


@pytest.mark.parametrize("norms", [False, True])
def test_a_document_beyond_half_the_context_is_repeated_in_segments(norms):
    loaded = load_tiny(max_positions=4096)
    document = PromptEncoder(loaded.tokenizer).document_ids(TEXT)
    short = replace(loaded, max_positions=len(document) + ROOM)
    plan = make_plan(loaded.model, method="kvzip", budget=16, segment=20, norms=norms)
    made = compress_document(short, TEXT, plan)
    assert kept_positions(made) == kept_positions(compress_document(loaded, TEXT, plan))
    with pytest.raises(UsageError) as refused:
        compress_document(short, TEXT, make_plan(loaded.model, method="kvzip", budget=16))
    told = re.fullmatch(
        rf"The document of {len(document)} tokens cannot be repeated within the {len(document) + ROOM} that tiny-llama "
        r"can read: repeat it in smaller segments \(--set segment=(\d+)\), choose another method, or give a text that "
        r"judges in place of the repetition with --observe\.",
        str(refused.value),
    )
    mended = make_plan(loaded.model, method="kvzip", budget=16, segment=int(told[1]))
    assert compress_document(short, TEXT, mended).get_seq_length() == len(document)


@pytest.mark.parametrize("segment", [20, 2048])
def test_a_document_too_long_for_segments_is_to_be_shortened(segment):
    loaded = load_tiny()
    encoder = PromptEncoder(loaded.tokenizer)
    document = encoder.document_ids(TEXT)
    short = replace(loaded, max_positions=len(document) + 12)
    plan = make_plan(loaded.model, method="kvzip", budget=16, segment=segment)
    with pytest.raises(UsageError, match=r"cannot be repeated within the \d+ that tiny-llama can read: shorten") as it:
        compress_document(short, TEXT, plan)
    cut = int(re.search(r"shorten it by (\d+) tokens", str(it.value))[1])

    def fits(tokens):
        with suppress(UsageError):
            return bool(repeating_observers(short, encoder, document[:-tokens], plan.method))

    assert fits(cut) and not fits(cut - 1)


@pytest.mark.parametrize("kind", ["no positions", "from 2 on"])
def test_a_model_that_cannot_be_told_positions_is_refused(kind):
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="kvzip", budget=16, segment=20)
    if kind == "no positions":
        loaded.model.forward = lambda input_ids, past_key_values=None, **_: None
    else:
        loaded.model.position_embeddings = torch.nn.Embedding(9, 9, padding_idx=1)
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM takes no position_ids from 0 on, .* \(--set segment="):
        compress_document(loaded, TEXT, plan)


def test_segments_are_refused_with_padding_or_a_mask_of_ones_own():
    model = tiny_model()
    plan = make_plan(model, method="adakv-kvzip", budget=10).for_observers(sum(SEGMENTS))
    ids = drawn_prompt()
    mask = torch.ones_like(ids)
    padded, own = mask.clone(), torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    padded[:, 0] = 0
    with attending_ragged(model), torch.no_grad():
        for each in (padded, own):
            cache = HeadCache(plan)
            cache.expect_observers(sum(SEGMENTS), SEGMENTS)
            with pytest.raises(CacheError, match="read each document by itself"):
                model(ids, attention_mask=each, past_key_values=cache)
        caches = [HeadCache(plan), HeadCache(plan)]
        for cache, given in zip(caches, ({"attention_mask": mask}, {}), strict=True):
            cache.expect_observers(sum(SEGMENTS), SEGMENTS)
            model(ids, past_key_values=cache, **given)
        assert kept_positions(caches[0]) == kept_positions(caches[1])
        with pytest.raises(ValueError, match="segments of 3 tokens are not the 4"):
            caches[0].expect_observers(4, (1, 2))


def test_a_model_that_masks_by_itself_is_refused():
    model = tiny_model()
    plan = make_plan(model, method="kvzip", budget=10).for_observers(sum(SEGMENTS))
    cache = HeadCache(plan)
    cache.expect_observers(sum(SEGMENTS), SEGMENTS)
    layer = model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs | {"attention_mask": None})
    with attending_ragged(model), torch.no_grad(), pytest.raises(ModelError, match="masks its attention otherwise"):
        prefill(model, drawn_prompt(), cache)


@pytest.mark.parametrize("value", ["segment=0", "segment=1.5", "norms=2"])
def test_no_such_segment_or_norms(value):
    with pytest.raises(UsageError):
        find_method(f"kvzip:{value}")


def test_several_caches_are_filled_from_segments_together():
    model = tiny_model()
    ids, count = drawn_prompt(), sum(SEGMENTS)
    plans = [
        make_plan(model, method="adakv-kvzip", budget=budget, norms=norms) for budget, norms in ((9, False), (12, True))
    ]
    plans = [plan.for_observers(count) for plan in plans]
    caches = [HeadCache(plan) for plan in plans]
    with attending_ragged(model), torch.no_grad():
        together = FanOutCache(caches)
        together.expect_observers(count, SEGMENTS)
        prefill(model, ids, together)
        for plan, cache in zip(plans, caches, strict=True):
            alone = HeadCache(plan)
            alone.expect_observers(count, SEGMENTS)
            prefill(model, ids, alone)
            assert kept_positions(alone) == kept_positions(cache)
            assert cache.segments == () and cache.get_seq_length() == DOCUMENT


def test_each_candidate_is_judged_by_its_own_segments():
    loaded = load_tiny()
    question = invented_question(loaded, reply="It is")
    wanted = (
        ("adakv-kvzip", "16"),
        ("full", ""),
        ("adakv-kvzip:segment=40", "16"),
        ("adakv-kvzip:segment=40:norms=true", "16"),
    )
    candidates = candidates_for(loaded, *wanted)
    together = Asker(loaded, candidates, False, (), repeat=True)
    answers = together.ask(question)
    document, encoder = list(question.document_ids), PromptEncoder(loaded.tokenizer)
    observers = [repeating_observers(loaded, encoder, document, candidates[number].plan.method) for number in (0, 2, 3)]
    assert not observers[0].segments and len(observers[1].segments) > 3 and observers[1] == observers[2]
    assert together.sharing.prompt_tokens == 3 * len(document) + len(observers[0]) + len(observers[1])
    for number in (0, 2, 3):
        alone = Asker(loaded, [candidates[number], candidates[1]], False, (), repeat=True).ask(question)[0]
        assert (answers[number].text, answers[number].score) == (alone.text, alone.score)
        assert answers[number].divergence == pytest.approx(alone.divergence, abs=1e-5)
    assert answers[0].divergence != answers[2].divergence != answers[3].divergence


@pytest.mark.processes
@pytest.mark.parametrize("options", [{}, {"norms": True}])
def test_a_document_in_segments_answers_alike_in_another_process(tiny, tiny_folder, tmp_path, options):
    plan = make_plan(tiny.model, method="kvzip", budget=20, segment=25, **options)
    cache = compress_document(tiny, TEXT, plan)
    path = tmp_path / "keeper.kv.safetensors"
    save_document(cache, path, tiny)
    again, notes = load_document(path, tiny)
    assert json.loads(notes["options"])["segment"] == 25 and kept_positions(again) == kept_positions(cache)
    answer = ask(tiny, cache, "How many boats?", max_new_tokens=24).text
    command = [sys.executable, "-c", SCRIPT, str(tiny_folder), str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == answer


def test_a_document_with_norms_is_judged_again_before_any_pass(tiny, tmp_path):
    """Queries that are saved judge before the model has run: what they need of it is found when the file is read."""
    plan = make_plan(tiny.model, method="kvzip", budget=20, norms=True, buffer=30)
    cache = compress_document(tiny, TEXT, plan)
    with attending_ragged(tiny.model), torch.no_grad():
        tiny.model(random_ids(1, 20), past_key_values=cache)
        save_document(cache, tmp_path / "it", tiny)
        again, _ = load_document(tmp_path / "it", tiny)
        following = random_ids(1, 40, seed=5)
        logits = [tiny.model(following, past_key_values=each).logits for each in (cache, again)]
    assert torch.equal(*logits) and kept_positions(cache) == kept_positions(again)


# The command.


def test_compress_takes_segments_and_norms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny", chat=True, max_positions=256)
    (tmp_path / "keeper.txt").write_text(TEXT)
    options = ("--model", "tiny", "--method", "kvzip", "--budget", "16", "--json", "--file", "keeper.txt")
    told = []
    for more in ((), ("--set", "segment=40"), ("--set", "segment=40", "--set", "norms=true", "--prefill-chunk", "16")):
        with pytest.raises(SystemExit) as ended:
            main(["compress", *options, *more])
        printed = capsys.readouterr()
        told.append((ended.value.code, printed.err))
    assert [code for code, _ in told[1:]] == [0, 0]
    with pytest.raises(SystemExit) as ended:
        main(["compress", *options, "--set", "segment=0"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_queries_of_any_segment_see_the_rows_that_may_be_kept(arch):
    """What a reduction that asks some of the queries is told: their attention to the document, shared out anew."""
    window = WINDOWS.get(arch)
    model, twin = tiny_model(arch, sliding_window=window), tiny_model(arch, sliding_window=window, attn="eager")
    ids, index = drawn_prompt(), torch.tensor([0, 5, 19, 20, 40, 52, 53, 59])
    passes = [twin(each, output_attentions=True, use_cache=False).attentions for each in of_each_segment(ids, SEGMENTS)]
    for number, (observed, _) in enumerate(observed_by(model, ids, SEGMENTS)):
        kept = observed.valid[0, :DOCUMENT]
        paid = torch.cat([each[number][0, :, DOCUMENT:, :DOCUMENT] for each in passes], dim=1)[:, index] * kept
        expected = (paid / paid.sum(dim=-1, keepdim=True)).nan_to_num(nan=0.0)
        asked = observed.of_queries(index)
        found = asked.attention_of(0, len(index))[0].flatten(0, 1)
        torch.testing.assert_close(found[..., :DOCUMENT], expected, atol=2e-5, rtol=1e-3)
        assert not found[..., DOCUMENT:].any()
