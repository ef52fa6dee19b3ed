"""Documents that are repeated in segments, and attention that is weighed by norms: each by its slow twin."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.profiles import random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_model, tiny_tokenizer
from test_evaluation import candidates_for, invented_question
from test_reconstruction import SCRIPT, kept_positions

from headprof.cli import main
from headprof.compression.cache.head_cache import FanOutCache, HeadCache
from headprof.compression.chunks import PendingMask, sliced
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.table import METHODS, Method
from headprof.compression.observers import repeating_observers
from headprof.compression.segments import SegmentMask, parts_of, segment_positions
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, ModelError, UsageError
from headprof.evaluation.asker import Asker
from headprof.models.prompt_encoder import REPETITION, RESUMPTION, PromptEncoder

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 4
SEGMENTS = (20, 33, 7)
DOCUMENT = 50
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
    """The largest attention to each of the document's tokens, `[K, document]` of each layer, by the model's matrices."""
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
