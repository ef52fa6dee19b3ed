"""Budgets where some layers see a sliding window of tokens only: what they count, and that they are never exceeded."""

import pytest
import torch
from support.profiles import random_profile
from support.prompts import left_padded, random_ids
from support.tiny_models import load_tiny, tiny_model
from transformers import DynamicCache

from headprof import HeadCache, compress_document, compressed, load_document, make_plan, save_document
from headprof.compression.session import attending_ragged, prefill
from headprof.models.decoder import sliding_windows

WINDOW, PROMPT = 10, 100
WINDOWS = {"llama": [None, None], "mistral": [WINDOW, WINDOW], "gemma2": [WINDOW, None], "gemma3": [WINDOW, None]}


def windowed(arch, **sizes):
    return tiny_model(arch, sliding_window=WINDOW, attn="eager" if arch == "gemma2" else None, **sizes)


def held(model, ids, budget, chunk=None, **options):
    """Rows of the first KV head of each layer and sequence after a prompt, `[L][B]`."""
    with compressed(model, method="snapkv", budget=budget, prefill_chunk=chunk) as plan:
        cache = HeadCache(plan)
        model(ids, past_key_values=cache, **options)
    return cache.lengths[:, :, 0].tolist()


@pytest.mark.parametrize("arch", WINDOWS)
def test_windows_are_read_from_the_configuration(arch):
    assert list(sliding_windows(windowed(arch).config)) == WINDOWS[arch]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("budget", ["4%", "12%", "50%", "100%", 12])
@pytest.mark.parametrize("arch", WINDOWS)
def test_a_share_is_one_of_the_prompt_not_of_the_window(arch, budget, chunk):
    tokens = int(str(budget).removesuffix("%"))  # of a prompt of 100
    expected = [[min(tokens, window or tokens)] for window in WINDOWS[arch]]
    assert held(windowed(arch), random_ids(1, PROMPT), budget, chunk) == expected


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("arch", WINDOWS)
def test_a_share_does_not_count_padding(arch, chunk):
    ids, mask = left_padded(random_ids(2, PROMPT), [PROMPT, 60])
    rows = held(windowed(arch), ids, "8%", chunk, attention_mask=mask)
    assert rows == [[8, 5]] * 2
    rows = held(windowed(arch), ids, "20%", chunk, attention_mask=mask)
    assert rows == [[20, 12] if window is None else [WINDOW, WINDOW] for window in WINDOWS[arch]]


@pytest.mark.parametrize("budget", [8, 9, 12, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_no_window_lets_a_profile_spend_more_than_its_budget(budget, seed):
    model = windowed("gemma3", layers=6)
    with compressed(model, random_profile(model, seed), method="headkv-r2", budget=budget) as plan:
        cache = HeadCache(plan)
        model(random_ids(1, PROMPT), past_key_values=cache)
    other = tiny_model("llama", layers=6)
    without = make_plan(other, random_profile(other, seed), method="headkv-r2", budget=budget)
    expected = without.allocation(PROMPT)
    expected[::2] = expected[::2].clamp(max=WINDOW)
    assert torch.equal(cache.lengths[:, 0], expected) and cache.lengths.float().mean() <= budget


def test_targets_while_generating_end_at_the_window_too():
    plan = make_plan(windowed("gemma3"), method="snapkv", budget=20)
    assert plan.decode_allocation(PROMPT).tolist() == [[WINDOW] * 2, [20] * 2]
    assert plan.decode_allocation(PROMPT + 1).tolist() == [[WINDOW] * 2, [20] * 2]
    assert plan.decode_allocation(8).tolist() == [[8] * 2, [8] * 2]


@pytest.mark.parametrize("arch", WINDOWS)
def test_nothing_is_lost_where_every_layer_keeps_what_it_sees(arch):
    plan = make_plan(windowed(arch), method="snapkv", budget=WINDOW)
    assert not plan.loses(WINDOW)
    assert plan.loses(PROMPT) == (None in WINDOWS[arch])


def test_a_loaded_document_goes_on_with_the_windows_of_its_model(tmp_path):
    loaded = load_tiny("gemma3", sliding_window=WINDOW)
    plan = make_plan(loaded.model, method="snapkv", budget="20%")
    cache = compress_document(loaded, "The lighthouse keeper counted nine grey boats before breakfast. " * 12, plan)
    save_document(cache, tmp_path / "document.safetensors", loaded)
    again, _ = load_document(tmp_path / "document.safetensors", loaded)
    assert torch.equal(again.lengths, cache.lengths)
    assert again.plan.windows == plan.windows == (WINDOW, None)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "headkv-r2", "ems", "tova", "kvzip", "headkv-fit"])
@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3"])
def test_what_is_out_of_sight_goes_first_while_generating(arch, method):
    """With room for all that a layer sees, the tokens are the full cache's, however often it is compressed again."""
    model, ids, later = windowed(arch), random_ids(1, PROMPT), random_ids(1, WINDOW + 6, seed=4)
    plan = make_plan(model, random_profile(model), method=method, budget="100%", buffer=3)
    cache, full = HeadCache(plan), DynamicCache(config=model.config)
    with attending_ragged(model), torch.no_grad():
        prefill(model, ids, cache)
        model(ids, past_key_values=full)
        for part in (later, *ids[:, :20].split(1, dim=1)):
            logits = [model(part, past_key_values=each).logits for each in (cache, full)]
            torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert int(cache.lengths[0].max()) <= WINDOW + 3
