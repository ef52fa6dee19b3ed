"""Reconstruction: the largest attention by its slow twins, and documents that are judged by their own repetition."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import interpreted, on_cuda
from support.observations import observed_prompt
from support.profiles import random_profile
from support.prompts import left_padded, random_ids
from support.tiny_models import load_tiny, save_tiny, tiny_model, tiny_tokenizer
from test_column_sums import OPTIONS, PADDING, TYPES, make_arguments
from test_evaluation import candidates_for, invented_question

from headprof.cli import main
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.document import load_document, save_document
from headprof.compression.encoding import question_ids
from headprof.compression.generation import ask, compress_document, generate_text
from headprof.compression.kernels import torch_column_sums as plain
from headprof.compression.kernels.column_sums import column_maxima
from headprof.compression.methods.budget import ProfileBudget, UniformBudget
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import Tokens
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.table import METHODS
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import UsageError
from headprof.evaluation.asker import Asker
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.run import EvalRun
from headprof.models.prompt_encoder import INSTRUCTION, OBSERVATION, REPETITION, PromptEncoder

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 3
EQUAL = Method(Reconstruction(), UniformBudget())
BACKENDS = ("torch", pytest.param("triton", marks=interpreted))


# The largest attention, in blocks.


def whole_matrix(query, key, positions, valid, *, scaling, softcap=None, sliding_window=None, weights=None):
    """The maximum over a dense softmax in float64, `[B, K, T]`."""
    group = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(group, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    keys = torch.arange(key.shape[2])
    hidden = keys > positions[:, None]
    if sliding_window is not None:
        hidden |= keys <= positions[:, None] - sliding_window
    hidden = hidden | ~valid[:, None, None]
    attention = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num(nan=0.0)
    if weights is not None:
        attention = attention * weights.double()[:, None]
    return attention.unflatten(1, (-1, group)).amax(dim=(2, 3))


def assert_like_the_whole_matrix(arguments, **how):
    maxima = column_maxima(**arguments, **how)
    assert maxima.dtype == torch.float32
    torch.testing.assert_close(maxima.double(), whole_matrix(**arguments), rtol=1e-5, atol=1e-7)


def test_whole_matrix_by_hand():
    """Keys whose logits are log 1, log 2 and log 5; a group's second head sees all alike."""
    arguments = {
        "query": torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 2, 2, 1),
        "key": torch.tensor([1.0, 2.0, 5.0]).log().view(1, 1, 3, 1),
        "positions": torch.tensor([1, 2]),
        "valid": torch.ones(1, 3, dtype=torch.bool),
        "scaling": 1.0,
    }
    expected = torch.tensor([1 / 2, 2 / 3, 5 / 8]).double()
    torch.testing.assert_close(whole_matrix(**arguments)[0, 0], expected)
    torch.testing.assert_close(column_maxima(**arguments)[0, 0].double(), expected)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    num_tokens=st.integers(1, 60),
    share=st.floats(0, 1),
    padding=st.sampled_from(PADDING),
    option=st.sampled_from(list(OPTIONS)),
    dtype=st.sampled_from(TYPES),
    block=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_torch_in_blocks_of_any_size(num_tokens, share, block, **rest):
    num_queries = max(1, round(share * num_tokens))
    arguments = make_arguments(num_queries=num_queries, num_tokens=num_tokens, head_dim=8, **rest)
    assert_like_the_whole_matrix(arguments, backend="torch", block=block)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    group_size=st.integers(1, 3),
    num_tokens=st.integers(1, 200),
    share=st.floats(0, 1),
    padding=st.sampled_from(PADDING),
    option=st.sampled_from(list(OPTIONS)),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_triton_on_prompts_of_any_size(num_tokens, share, **rest):
    num_queries = max(1, round(share * num_tokens))
    arguments = make_arguments(batch=2, num_kv_heads=1, num_queries=num_queries, num_tokens=num_tokens, **rest)
    assert_like_the_whole_matrix(arguments, backend="triton")


@on_cuda
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("padding", ["none", "left", "gaps"])
def test_triton_on_a_device(padding, option, dtype):
    arguments = make_arguments(
        batch=3,
        group_size=4,
        num_queries=700,
        num_tokens=1500,
        head_dim=128,
        padding=padding,
        option=option,
        dtype=dtype,
    )
    on_device = {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in arguments.items()}
    found = column_maxima(**on_device, backend="triton").cpu()
    torch.testing.assert_close(found.double(), whole_matrix(**arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_pay_nothing(backend):
    assert column_maxima(**make_arguments(num_queries=0), backend=backend).abs().max() == 0


def test_never_the_whole_matrix(monkeypatch):
    held, products = [], plain._products

    def watched(query, keys):
        held.append(len(query) * len(keys))
        return products(query, keys)

    monkeypatch.setattr(plain, "_products", watched)
    column_maxima(**make_arguments(num_queries=3000, num_tokens=3000, head_dim=8), backend="torch")
    assert max(held) <= 256 * 3000


# The importance.


def test_observers_attend_to_each_other():
    """Of a prompt of 6 tokens the last 3 only observe; attention that they pay to each other is not the document's."""
    queries, keys = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 6, 8)
    valid = torch.tensor([[True] * 3 + [False] * 3])
    everything = Tokens(torch.ones(1, 6, dtype=torch.bool), [6], [6])
    observed = replace(observed_prompt(queries, keys, valid, scaling=0.5), attended=everything)
    found = Reconstruction(3).score(observed)
    arguments = {"query": queries, "key": keys, "positions": torch.arange(3, 6), "scaling": 0.5}
    expected = whole_matrix(**arguments, valid=everything.valid)
    torch.testing.assert_close(found.double(), expected)
    alone = Reconstruction(3).score(replace(observed, attended=None))
    torch.testing.assert_close(alone.double(), whole_matrix(**arguments, valid=valid))
    assert (alone[..., :3] > found[..., :3]).all()


def test_no_queries_judge_nothing():
    held = replace(observed_prompt(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 5, 8), scaling=1.0), is_prompt=False)
    held = replace(held, query_positions=torch.arange(0), seen=5)
    assert torch.equal(Reconstruction().score(held), torch.zeros(1, 2, 5))


def test_a_window_of_none_is_refused():
    with pytest.raises(UsageError, match="give a --window of at least 1"):
        Reconstruction(0)


def test_the_methods_differ_in_budgets():
    kvzip, adakv, headkv = (METHODS[name] for name in ("kvzip", "adakv-kvzip", "headkv-kvzip"))
    assert kvzip.importance == adakv.importance == headkv.importance == Reconstruction()
    assert kvzip.budget.ranks_together and adakv.budget.spreads and headkv.budget == ProfileBudget("reasoning")


# Documents.


def repeated(loaded, text):
    """Tokens of a document, and of the observers after it."""
    encoder = PromptEncoder(loaded.tokenizer)
    document = encoder.document_ids(text)
    return document, encoder.repetition_ids(document)


def kept_positions(cache):
    """Positions that each head keeps, `[L][B][K]` sorted lists."""
    found = []
    for layer in cache.head_layers:
        parts = layer.storage.compact().positions.split(layer.lengths)
        parts = [part.sort().values.tolist() for part in parts]
        found.append([parts[start : start + layer.num_kv_heads] for start in range(0, len(parts), layer.num_kv_heads)])
    return found


def slow_choice(attention, document, counts, num_kv_heads, window):
    """What each head keeps of a document by a layer's whole matrix of attention, `[H, T, T]`; `counts` are `[K]`."""
    paid = attention[:, document:, :document].unflatten(0, (num_kv_heads, -1)).amax(dim=(1, 2))  # [K, document]
    first = 0 if window is None else max(0, document - window)
    paid[:, :first] = -1.0
    for always in (first, document - 2, document - 1):
        paid[:, always] = 2.0
    return [head.topk(int(count)).indices.sort().values.tolist() for head, count in zip(paid, counts, strict=True)]


@pytest.mark.parametrize("prefill_chunk", [None, 16])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma2", "gemma3"])
def test_a_document_keeps_what_its_repetition_looks_at(arch, prefill_chunk):
    """By the model's own matrix of attention over the document and its repetition."""
    window = 24 if arch in ("mistral", "gemma2", "gemma3") else None
    attn = "eager" if arch == "gemma2" else None
    loaded = load_tiny(arch, sliding_window=window, attn=attn)
    twin = tiny_model(arch, sliding_window=window, attn="eager")
    document, observers = repeated(loaded, TEXT)
    plan = make_plan(loaded.model, random_profile(loaded.model), method="headkv-kvzip", budget=16)
    cache = compress_document(loaded, TEXT, plan, prefill_chunk=prefill_chunk)
    attentions = twin(torch.tensor([document + observers]), output_attentions=True, use_cache=False).attentions
    expected = [
        [slow_choice(attention[0], len(document), counts, loaded.shape.num_kv_heads, seen)]
        for attention, counts, seen in zip(
            attentions, plan.allocation(len(document)), plan.windows or (None, None), strict=True
        )
    ]
    assert kept_positions(cache) == expected
    assert cache.get_seq_length() == len(document)
    assert cache.token_ids is not None and cache.token_ids.tolist() == [document]


@pytest.mark.parametrize("method", ["kvzip", "headkv-kvzip"])
def test_chunks_change_nothing_and_no_observer_is_kept(method):
    loaded = load_tiny()
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=20)
    caches = [compress_document(loaded, TEXT, plan, prefill_chunk=chunk) for chunk in (None, 7, 64)]
    assert kept_positions(caches[0]) == kept_positions(caches[1]) == kept_positions(caches[2])
    document, _ = repeated(loaded, TEXT)
    assert max(max(head) for layer in kept_positions(caches[0]) for head in layer[0]) == len(document) - 1
    assert int(caches[0].lengths.sum()) == int(plan.allocation(len(document)).sum())


@pytest.mark.parametrize("prefill_chunk", [None, 9])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_with_padding_each_document_is_judged_as_it_is_alone(arch, prefill_chunk):
    model = tiny_model(arch, sliding_window=12 if arch == "gemma3" else None)
    documents, observers = random_ids(2, 40), random_ids(2, 30, seed=4)
    lengths = [40, 25]
    ids, mask = left_padded(documents, lengths)
    plan = make_plan(model, method=EQUAL, budget=10).for_observers(30)
    with attending_ragged(model, prefill_chunk=prefill_chunk), torch.no_grad():
        batch = HeadCache(plan)
        batch.expect_observers(30)
        mask = torch.cat([mask, torch.ones_like(observers)], dim=1)
        model(torch.cat([ids, observers], dim=1), attention_mask=mask, past_key_values=batch)
        for entry, length in enumerate(lengths):
            alone = HeadCache(plan)
            alone.expect_observers(30)
            prefill(model, torch.cat([documents[entry, :length], observers[entry]])[None], alone)
            shift = 40 - length
            for both, its in zip(kept_positions(batch), kept_positions(alone), strict=True):
                assert both[entry] == [[position + shift for position in head] for head in its[0]]


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
@pytest.mark.parametrize("observers", [4, 30])
@pytest.mark.parametrize("prefill_chunk", [None, 9])
def test_a_layer_with_a_window_keeps_what_the_next_token_sees(arch, observers, prefill_chunk):
    """However many observers there are, and whatever judges: they would push the document out of the window."""
    model = tiny_model(arch, sliding_window=12)
    ids = random_ids(1, 40 + observers)
    plan = make_plan(model, method="snapkv", budget="100%").for_observers(observers)
    with attending_ragged(model, prefill_chunk=prefill_chunk), torch.no_grad():
        cache = HeadCache(plan)
        cache.expect_observers(observers)
        prefill(model, ids, cache)
        following = random_ids(1, 5, seed=6)
        logits = model(following, past_key_values=cache).logits
        expected = model(torch.cat([ids[:, :40], following], dim=1), use_cache=False).logits[:, 40:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chat", [True, False])
def test_the_repetition_is_the_document_without_its_frame(chat):
    tokenizer = tiny_tokenizer(chat=chat)
    encoder = PromptEncoder(tokenizer, spans=True)
    document = encoder.document_ids(TEXT)
    ids = encoder.repetition_ids(document)
    demand = encoder.question_ids(REPETITION)
    assert ids[: len(demand)] == demand
    assert tokenizer.decode(ids[len(demand) :]) == f"{TEXT}\n\n"
    told = tokenizer.decode(encoder.repetition_ids(encoder.encode_context(TEXT).ids)[len(demand) :])
    assert told == f"{INSTRUCTION}\n\n{TEXT}\n\n" if chat else told == f"{TEXT}\n\n"


def test_a_text_of_the_users_judges_in_place_of_the_repetition():
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="adakv-kvzip", budget=16)
    by_text = compress_document(loaded, TEXT, plan, observe="Who counted?")
    document = PromptEncoder(loaded.tokenizer).document_ids(TEXT)
    observers = PromptEncoder(loaded.tokenizer).question_ids("Who counted?")
    with attending_ragged(loaded.model), torch.no_grad():
        expected = HeadCache(plan.for_observers(len(observers)))
        expected.expect_observers(len(observers))
        prefill(loaded.model, torch.tensor([document + observers]), expected)
    assert kept_positions(by_text) == kept_positions(expected)
    assert kept_positions(by_text) != kept_positions(compress_document(loaded, TEXT, plan))


def test_without_observers_the_last_16_queries_judge():
    loaded = load_tiny()
    plan = make_plan(loaded.model, method=EQUAL, budget=16)
    own_end = compress_document(loaded, TEXT, plan, observe="")
    ids = torch.tensor([PromptEncoder(loaded.tokenizer).document_ids(TEXT)])
    with compressed(loaded.model, method=EQUAL, budget=16) as same:
        prefill(loaded.model, ids, prompt := HeadCache(same))
    attentions = tiny_model(attn="eager")(ids, output_attentions=True, use_cache=False).attentions
    tokens, kept = ids.shape[1], []
    for attention in attentions:
        paid = attention[0, :, -16:].unflatten(0, (loaded.shape.num_kv_heads, -1)).amax(dim=(1, 2))
        paid[:, [0, tokens - 2, tokens - 1]] = 2.0
        kept.append([paid.topk(16).indices.sort(dim=-1).values.tolist()])
    assert kept_positions(own_end) == kept_positions(prompt) == kept


def test_a_document_that_cannot_be_repeated_is_refused_in_one_sentence():
    loaded = replace(load_tiny(), max_positions=60)
    plan = make_plan(loaded.model, method="kvzip", budget=16)
    document, observers = repeated(loaded, TEXT)
    assert len(document) <= 60 < len(document) + len(observers)
    with pytest.raises(UsageError) as refused:
        compress_document(loaded, TEXT, plan)
    beyond = len(document) + len(observers) - 60
    assert str(refused.value) == (
        f"The document of {len(document)} tokens cannot be repeated within the 60 that tiny-llama can read: "
        f"shorten it by {-(-beyond // 2)} tokens, choose another method, or give a text that judges in place of the "
        "repetition with --observe."
    )
    assert compress_document(loaded, TEXT, plan, observe="Who?").get_seq_length() == len(document)
    with pytest.raises(UsageError, match="exceeds the 60 that tiny-llama can read: shorten it by"):
        compress_document(loaded, TEXT * 2, plan)


def test_decoding_goes_on_in_constant_memory_by_the_queries_since():
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="kvzip", budget=20, buffer=8)
    cache = compress_document(loaded, TEXT, plan)
    assert cache.plan.method.importance.window == 16
    ids = question_ids(loaded, cache.get_seq_length(), "Who counted?", 60)
    held = []
    handle = loaded.model.register_forward_hook(lambda *_: held.append(int(cache.lengths.sum())))
    made = generate_text(loaded, ids, cache=cache, max_new_tokens=60)
    handle.remove()
    heads = loaded.shape.num_layers * loaded.shape.num_kv_heads
    assert made.new_tokens == len(held) > 20 and max(held) <= heads * (20 + max(8, ids.shape[1]))


SCRIPT = """
import sys
from headprof.compression.document import load_document
from headprof.compression.generation import ask
from headprof.models.loading import load_model
loaded = load_model(sys.argv[1], device="cpu")
cache, _ = load_document(sys.argv[2], loaded)
sys.stdout.buffer.write(ask(loaded, cache, "How many boats?", max_new_tokens=24).text.encode())
"""


@pytest.mark.processes
@pytest.mark.parametrize("method", ["kvzip", "headkv-kvzip"])
def test_a_document_answers_alike_in_another_process(tiny, tiny_folder, tmp_path, method):
    plan = make_plan(tiny.model, random_profile(tiny.model), method=method, budget=20)
    cache = compress_document(tiny, TEXT, plan)
    path = tmp_path / "keeper.kv.safetensors"
    save_document(cache, path, tiny)
    again, notes = load_document(path, tiny)
    assert notes["method"] == method and kept_positions(again) == kept_positions(cache)
    answer = ask(tiny, cache, "How many boats?", max_new_tokens=24).text
    command = [sys.executable, "-c", SCRIPT, str(tiny_folder), str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == answer


# The command.


def test_compress_and_its_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny", chat=True, max_positions=256)
    (tmp_path / "keeper.txt").write_text(TEXT)
    (tmp_path / "long.txt").write_text(TEXT * 5)
    options = ("--model", "tiny", "--method", "kvzip", "--budget", "16", "--json")
    for more in ((), ("--prefill-chunk", "16"), ("--observe", "Who?")):
        with pytest.raises(SystemExit) as ended:
            main(["compress", "--file", "keeper.txt", *options, *more])
        assert ended.value.code == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["method"] == "kvzip" and figures["tokens_per_head"] == 16
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--file", "long.txt", *options])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and "cannot be repeated within the 256" in errors
    assert len(errors.strip().splitlines()) == 1


# Evaluation without the question.


def test_each_method_is_judged_by_its_own_observers():
    """Where one prefill serves some candidates and another the others, each answers as it does alone."""
    loaded = load_tiny()
    question = invented_question(loaded, reply="It is")
    wanted = (("kvzip", "16"), ("full", ""), ("snapkv", "9"), ("headkv-kvzip", "30"), ("headkv-r2", "12"))
    text = PromptEncoder(loaded.tokenizer).question_ids("Who?")
    candidates = candidates_for(loaded, *wanted)
    together = Asker(loaded, candidates, False, text, repeat=True)
    answers = together.ask(question)
    document = list(question.document_ids)
    observers = PromptEncoder(loaded.tokenizer).repetition_ids(document)
    # Once more for the method that ranks all layers' rows together, without observers.
    assert together.sharing.prompt_tokens == 3 * len(document) + len(observers) + len(text)
    assert together.sharing.candidate_tokens == 6 * len(document) + 2 * len(observers) + 3 * len(text)
    full = candidates[1]
    for answer, candidate, (name, _) in zip(answers, candidates, wanted, strict=True):
        its = observers if "kvzip" in name else text
        alone = Asker(loaded, [candidate, full], False, its).ask(question)[0]
        assert (answer.text, answer.score, answer.method) == (alone.text, alone.score, name)
        assert answer.divergence == pytest.approx(alone.divergence, abs=1e-5)
        assert answer.prompt_tokens == len(document) and answer.cache_bytes == alone.cache_bytes
    by_text = Asker(loaded, candidates, False, text).ask(question)
    assert by_text[0].divergence != answers[0].divergence and by_text[2].divergence == answers[2].divergence


def test_what_a_request_says_of_observers():
    loaded = load_tiny()
    asked = EvalRequest(("niah",), ("snapkv",), ("8",), question_known=False)
    assert not asked.repeats and asked.key(loaded, None)["observe"] == OBSERVATION
    kvzip = replace(asked, methods=("snapkv", "kvzip"))
    assert kvzip.repeats and kvzip.key(loaded, None)["observe"] is None
    assert kvzip.observer_ids(loaded) == PromptEncoder(loaded.tokenizer).question_ids(OBSERVATION)
    for other in (replace(kvzip, observe=OBSERVATION), replace(kvzip, observe=""), replace(kvzip, question_known=True)):
        assert not other.repeats


def test_eval_refuses_what_cannot_be_repeated():
    loaded = replace(load_tiny(), max_positions=600)
    request = EvalRequest(("niah",), ("kvzip",), ("8",), probes=2, lengths=(512,), question_known=False)
    with pytest.raises(UsageError, match=r"A text of niah is too long for --query-agnostic: .* cannot be repeated"):
        EvalRun(loaded, None, request)
    EvalRun(loaded, None, replace(request, observe="Who?"))
    EvalRun(loaded, None, replace(request, question_known=True))


def test_two_prefills_can_be_stacked():
    """Caches of one document with other observers have seen the same tokens."""
    loaded = load_tiny()
    plans = [make_plan(loaded.model, method=name, budget=12) for name in ("kvzip", "snapkv")]
    caches = [compress_document(loaded, TEXT, plan) for plan in plans]
    assert stack_caches(caches).token_ids is not None


def test_of_a_prompt_in_chunks_only_the_queries_that_judge_are_held():
    model = tiny_model()
    plan = make_plan(model, method="adakv-kvzip", budget=10).for_observers(20)
    cache = HeadCache(plan)
    cache.expect_observers(20)
    held = []
    layer = cache.head_layers[0]
    filled = layer.filled
    layer.filled = lambda observed: (held.append([each.shape[2] for each in layer._queries]), filled(observed))
    with attending_ragged(model, prefill_chunk=8), torch.no_grad():
        prefill(model, random_ids(1, 60), cache)
    assert held == [[0, 0, 0, 0, 0, 8, 8]]
