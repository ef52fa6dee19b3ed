"""Budgets that follow the content: rows whose importance is above a threshold, whatever number of them there is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.commands import headprof
from support.profiles import random_profile, random_surrogate
from support.prompts import random_ids
from support.tiny_models import load_tiny, save_tiny, tiny_model
from test_decoding import check_same
from test_evaluation import candidates_for, invented_question
from test_reconstruction import TEXT, kept_positions, repeated

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.given_budget import Budget
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError
from headprof.evaluation.asker import Asker
from headprof.evaluation.request import EvalRequest

JUDGED = ("kvzip", "adakv-kvzip", "headkv-kvzip", "learned-kvzip")


def planned(model, method, budget, **options):
    return make_plan(model, random_profile(model), method=method, budget=budget, **options)


def above(loaded, threshold):
    """Positions that each head should keep by the whole matrices of attention, `[L][K]` lists."""
    document, observers = repeated(loaded, TEXT)
    twin = tiny_model(attn="eager")
    attentions = twin(torch.tensor([document + observers]), output_attentions=True, use_cache=False).attentions
    found = []
    for attention in attentions:
        paid = attention[0, :, len(document) :, : len(document)].unflatten(0, (2, -1)).amax(dim=(1, 2))
        paid[:, :1] = paid[:, -2:] = 2.0
        found.append([(head > threshold).nonzero().flatten().tolist() for head in paid])
    return found


@pytest.mark.parametrize("method", JUDGED)
@pytest.mark.parametrize("threshold", [0.3, 0.05])
def test_rows_above_the_threshold_are_kept_and_no_others(method, threshold):
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, planned(loaded.model, method, f">{threshold}"))
    expected = above(loaded, threshold)
    assert [layer[0] for layer in kept_positions(cache)] == expected
    assert int(cache.lengths.min()) >= 3 and int(cache.lengths.min()) < cache.get_seq_length()


@pytest.mark.parametrize("method", ["kvzap", "headkv-kvzap"])
def test_what_is_foreseen_has_thresholds_too(method):
    """Which rows a surrogate holds to be above it, no more and no fewer, from a single prefill."""
    loaded = load_tiny()
    whole = compress_document(loaded, TEXT, planned(loaded.model, "full", 8))
    surrogate, expected = random_surrogate(loaded.model), []
    for index, layer in enumerate(whole.head_layers):
        rows, tokens = layer.storage.compact(), whole.get_seq_length()
        keys, values = (each.view(1, layer.num_kv_heads, tokens, -1) for each in (rows.keys, rows.values))
        scores = surrogate.predict(index, keys, values).exp()[0]
        scores[:, :1] = scores[:, -2:] = math.inf
        expected.append(scores)
    threshold = torch.stack(expected).flatten().median().item() * 1.0001
    plan = planned(loaded.model, method, f">{threshold!r}", surrogate=surrogate)
    kept = [layer[0] for layer in kept_positions(compress_document(loaded, TEXT, plan))]
    assert kept == [[(head > threshold).nonzero().flatten().tolist() for head in layer] for layer in expected]


def test_a_bound_is_the_one_ranking_where_that_keeps_less():
    loaded = load_tiny()
    free = compress_document(loaded, TEXT, planned(loaded.model, "kvzip", ">0.05"))
    bounded = compress_document(loaded, TEXT, planned(loaded.model, "kvzip", ">0.05/12"))
    same = compress_document(loaded, TEXT, planned(loaded.model, "kvzip", 12))
    assert int(free.lengths.sum()) > 12 * 4
    check_same(bounded, same)
    wide = compress_document(loaded, TEXT, planned(loaded.model, "kvzip", ">0.3/90%"))
    check_same(wide, compress_document(loaded, TEXT, planned(loaded.model, "kvzip", ">0.3")))


def test_more_content_keeps_more():
    loaded = load_tiny()
    plan = planned(loaded.model, "kvzip", ">0.2")
    sizes = [int(compress_document(loaded, TEXT * times, plan).lengths.sum()) for times in (1, 2, 4)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] and plan.shares is None


@pytest.mark.parametrize("method", JUDGED)
def test_decoding_goes_on_at_what_the_document_came_to(method):
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, planned(loaded.model, method, ">0.3", buffer=4))
    at_first, heads = int(cache.lengths.sum()), cache.lengths.numel()
    targets = cache.plan.decode_allocation(400)
    assert at_first <= int(targets.sum()) < at_first + heads
    assert bool((targets >= cache.lengths[:, 0]).all())
    with attending_ragged(loaded.model), torch.no_grad():
        for token in range(3, 60):
            loaded.model(torch.tensor([[token]]), past_key_values=cache)
    assert int(cache.lengths.sum()) <= int(targets.sum()) + 4 * heads


@pytest.mark.parametrize("method", ["adakv-kvzip", "kvzap"])
def test_heads_that_hold_less_than_their_target_keep_it_when_many_tokens_come_at_once(method):
    loaded = load_tiny()
    options = {"surrogate": random_surrogate(loaded.model)} if method == "kvzap" else {}
    plan = planned(loaded.model, method, ">100", decode_budget=40, buffer=3, **options)
    cache = compress_document(loaded, TEXT, plan, keep=["boats"])
    before, tokens = cache.lengths, 60  # beyond target and buffer, so that it is compressed before
    assert int(before.unique().numel()) == 1 and int(before.max()) < 40 < int(before.max()) + tokens - 3
    with attending_ragged(loaded.model), torch.no_grad():
        loaded.model(random_ids(1, tokens, seed=5), past_key_values=cache)
    assert torch.equal(cache.lengths, before + tokens)


@pytest.mark.parametrize(
    ("arch", "window", "keep"),
    [("llama", None, [(48, 50)]), ("llama", None, [(10, 14), (47, 50)]), ("mistral", 12, [(2, 5), (44, 50)])],
    ids=["last", "both", "out-of-sight"],
)
def test_what_is_kept_whatever_was_above_is_in_what_heads_hold_later(arch, window, keep):
    """Tokens that were kept as the last ones, or that no query of the prompt's end sees, count from then on."""
    model = tiny_model(arch, sliding_window=window)
    count = sum(stop - start for start, stop in keep)
    with attending_ragged(model), torch.no_grad():
        cache = HeadCache(planned(model, "kvzip", ">100", buffer=4)).protect(keep)
        prefill(model, random_ids(1, 50), cache)
        for token in range(3, 60):
            model(torch.tensor([[token]]), past_key_values=cache)
    held = 3 + (count if window is None else 0)
    assert held <= int(cache.lengths.min()) and int(cache.lengths.max()) <= 3 + count + 4
    for layer in kept_positions(cache):
        positions = {place for span in keep for place in range(*span) if window is None or place > 107 - window}
        assert all(positions <= set(head) for head in layer[0])


def test_a_saved_document_goes_on_alike(tiny, tmp_path):
    cache = compress_document(tiny, TEXT, planned(tiny.model, "headkv-kvzip", ">0.3", buffer=6))
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
    again, notes = load_document(tmp_path / "doc.kv.safetensors", tiny)
    assert again.plan.budget == Budget(1.0, "share", 0.3) and json.loads(notes["budget"])["above"] == 0.3
    assert torch.equal(again.plan.decode_allocation(300), cache.plan.decode_allocation(300))
    answers = [ask(tiny, each, "How many boats?", max_new_tokens=40).text for each in (cache, again)]
    assert answers[0] == answers[1]


def test_a_prompt_without_observers_and_a_second_one():
    """A cache that is emptied and filled again goes by the new prompt alone."""
    model = tiny_model()
    plan = planned(model, "kvzip", ">0.2")
    with attending_ragged(model), torch.no_grad():
        used, fresh = HeadCache(plan), HeadCache(plan)
        prefill(model, random_ids(1, 70, seed=3), used)
        used.reset()
        for cache in (used, fresh):
            prefill(model, random_ids(1, 50), cache)
    check_same(used, fresh)
    assert torch.equal(used.plan.shares, fresh.plan.shares) and used.plan.decode_budget == fresh.plan.decode_budget


def test_eval_asks_under_thresholds():
    loaded = load_tiny()
    question = invented_question(loaded, reply="It is")
    wanted = (("full", ""), ("kvzip", ">0.3"), ("kvzip", ">0.01"), ("headkv-kvzip", ">0.01/64"))
    answers = Asker(loaded, candidates_for(loaded, *wanted), False, (), repeat=True).ask(question)
    assert [answer.budget for answer in answers] == ["", ">0.3", ">0.01", ">0.01/64"]
    assert answers[1].cache_bytes < answers[2].cache_bytes <= answers[0].cache_bytes * 1.3


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (">0.01", Budget(1.0, "share", 0.01)),
        ("> 1e-3 / 25%", Budget(0.25, "share", 0.001)),
        (">0/64", Budget(64, "tokens", 0.0)),
        (">.5/512MB", Budget(512e6, "bytes", 0.5)),
    ],
)
def test_thresholds_that_can_be_read(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", [">", ">x", ">-1", ">nan", ">inf", ">0.1/>0.2", ">0.1/", ">0.1/x", ">0.1/0"])
def test_thresholds_that_cannot_be_read(text):
    with pytest.raises(UsageError, match="cannot be read"):
        Budget.parse(text)


def test_what_has_no_scale_is_refused():
    model = tiny_model()
    message = "The method 'snapkv' judges tokens by a score without a fixed scale.*: choose kvzip"
    with pytest.raises(UsageError, match=message):
        make_plan(model, method="snapkv", budget=">0.1")
    with pytest.raises(UsageError, match=message):
        EvalRequest(("niah",), ("full", "snapkv"), ("8", ">0.1")).check()
    EvalRequest(("niah",), ("full", "kvzip", "kvzap"), ("8", ">0.1")).check()
    with pytest.raises(UsageError, match=r"'kvzip' with norms .* without a fixed scale.*: leave norms away"):
        make_plan(model, method="kvzip", norms=True, budget=">0.1")
    with pytest.raises(UsageError, match="give --decode-budget in tokens"):
        make_plan(model, method="kvzip", budget=8, decode_budget=">0.1")


def test_the_command(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "doc.txt").write_text(TEXT)
    compress = ("compress", "--model", "tiny", "--file", "doc.txt", "--method", "kvzip", "--json")
    kept = []
    for options in (("--threshold", "0.05"), ("--threshold", "0.3"), ("--threshold", "0.05", "--budget", "12")):
        done = headprof(tmp_path, *compress, *options)
        assert done.returncode == 0, done.stderr
        kept.append(json.loads(done.stdout)["tokens_per_head"])
    assert kept[0] > kept[1] > 3 and kept[2] == 12
    refused = headprof(tmp_path, *compress[:-3], "--method", "snapkv", "--threshold", "0.1")
    assert refused.returncode == 2 and "without a fixed scale" in " ".join(refused.stderr.split())
