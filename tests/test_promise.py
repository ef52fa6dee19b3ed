"""A promise instead of a budget: what is measured and chosen, by slow twins; what cannot be promised."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from support.profiles import random_profile
from support.tiny_models import TEXT as LONG
from support.tiny_models import load_tiny, save_tiny
from transformers.cache_utils import DynamicCache

from headprof.cli import main
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import compress_document
from headprof.compression.loss_meter import _spans
from headprof.compression.methods.given_budget import Budget
from headprof.compression.promise import SHARES, Candidates, compress_to_promise
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import CacheError, UsageError
from headprof.models.loading import load_model
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.intervals import mean_at_most

TEXT = LONG[:300]

FACTORS = {1: 3.078, 2: 1.886, 5: 1.476, 8: 1.397, 13: 1.350}
"""Student's t that 10 % of the distribution exceed, by degrees of freedom: from printed tables."""


def plan_of(loaded, method="headkv-r2", **options):
    return make_plan(loaded.model, random_profile(loaded.model), method=method, **options)


def at_most(values):
    """The bound, in the open."""
    return fmean(values) + FACTORS[len(values) - 1] * stdev(values) / sqrt(len(values))


def logits_after(loaded, cache, exam):
    """Log-probabilities at each token of an exam, from a cache that is used up: `[N, vocabulary]`."""
    fed = torch.tensor([[*exam.tail, *exam.reference[:-1]]])
    logits = loaded.model(fed, past_key_values=cache, use_cache=True).logits[0]
    return logits[len(exam.tail) - 1 :].double().log_softmax(dim=-1)


@torch.no_grad()
def losses_apart(loaded, text, plan, exams):
    """What a plan alone loses on each exam beside Transformers' own cache; each exam has its own prefills."""
    document = torch.tensor([PromptEncoder(loaded.tokenizer).document_ids(text)])
    found = []
    for exam in exams:
        own = DynamicCache(config=loaded.model.config)
        loaded.model(document, past_key_values=own, use_cache=True)
        full = logits_after(loaded, own, exam)
        kept = compress_document(loaded, text, plan)
        kept.continue_with(replace(plan, buffer=None))
        with attending_ragged(loaded.model):
            other = logits_after(loaded, kept, exam)
        found.append((full.exp() * (full - other)).sum(dim=-1).mean().item())
    return found


def assert_same(first: HeadCache, second: HeadCache) -> None:
    """Both hold the same rows."""
    assert torch.equal(first.lengths, second.lengths)
    for mine, theirs in zip(first.head_layers, second.head_layers, strict=True):
        own, other = mine.storage.compact(), theirs.storage.compact()
        for name in ("keys", "values", "positions"):
            torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=0, atol=0)


# The choice.


@pytest.mark.parametrize("count", [degrees + 1 for degrees in FACTORS])
def test_the_bound_is_students(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    assert mean_at_most(values, 0.9) == pytest.approx(at_most(values), rel=1e-3)
    with pytest.raises(ValueError):
        mean_at_most(values[:1], 0.9)


@pytest.mark.parametrize("tokens", [1, 2, 3, 63, 64, 65, 128, 300, 512, 513, 5000])
def test_spans_cover_a_short_document_and_lie_evenly_in_a_long_one(tokens):
    spans = _spans(tokens)
    assert len(spans) <= 8 and all(0 < stop - start <= 64 for start, stop in spans)
    covered = sorted({token for start, stop in spans for token in range(start, stop)})
    assert len(covered) == sum(stop - start for start, stop in spans)
    if tokens <= 128:
        assert covered == list(range(tokens))
    if tokens > 512:
        assert len(covered) == 512 and spans[0][0] == 0
        gaps = [later[0] - earlier[0] for earlier, later in pairwise(spans)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("arch", "method"), [("llama", "headkv-r2"), ("llama", "headkv-ems"), ("gemma3", "headkv-kvzip")]
)
def test_the_smallest_before_one_that_breaks_the_promise(arch, method):
    """Each candidate by itself, beside the full cache of Transformers."""
    loaded = load_tiny(arch, sliding_window=40 if arch == "gemma3" else None)
    plan = plan_of(loaded, method)
    candidates = Candidates(loaded, TEXT, plan, questions=2)
    exams = candidates.meter.exams
    kinds = [exam.kind for exam in exams]
    assert kinds.count("span") >= 2 and (arch == "gemma3" or 1 <= kinds.count("question") <= 2)
    bounds = []
    for number in (0, 5, len(candidates.tokens) - 1):
        tokens = candidates.tokens[number]
        alone = losses_apart(loaded, TEXT, replace(plan, budget=Budget(float(tokens), "tokens"), _known=[]), exams)
        loss = candidates.loss(number)
        assert (*loss.spans, *loss.questions) == pytest.approx(alone, abs=2e-5)
        bounds.append(mean_at_most(alone, 0.9))
        assert loss.at_most == pytest.approx(bounds[-1], abs=2e-5)
        assert loss.measured == pytest.approx(fmean(alone), abs=2e-5)
    assert bounds[0] == pytest.approx(0, abs=1e-5) and bounds[-1] > bounds[1] > 1e-4
    measured = [candidates.loss(number).at_most for number in range(len(candidates.tokens))]
    for max_loss in (each * factor for each in measured[1:] for factor in (0.99, 1.01)):
        broken = next((number for number, each in enumerate(measured) if each > max_loss), len(measured))
        cache, promise = candidates.keep(max_loss)
        assert cache is candidates.caches[broken - 1] and promise.kept.tokens == candidates.tokens[broken - 1]
        assert promise.kept.at_most <= max_loss
        assert [loss.tokens for loss in promise.tried] == candidates.tokens[: broken + 1]


@pytest.mark.parametrize(
    ("method", "prefill_chunk"), [("headkv-r2", None), ("kvzip", 50), ("headkv-ems", None), ("h2o", 50)]
)
def test_the_cache_is_that_of_its_budget(method, prefill_chunk):
    """Measuring leaves no trace in it, nor do the other candidates."""
    loaded = load_tiny()
    plan = plan_of(loaded, method)
    candidates = Candidates(loaded, TEXT, plan, prefill_chunk=prefill_chunk, questions=1)
    for max_loss in (candidates.loss(3).at_most * 1.001, 1e6):
        cache, promise = candidates.keep(max_loss)
        budget = Budget(float(promise.kept.tokens), "tokens")
        assert cache.plan.budget == budget and cache.plan.buffer == plan.buffer
        alone = compress_document(loaded, TEXT, replace(plan, budget=budget, _known=[]), prefill_chunk=prefill_chunk)
        assert_same(cache, alone)


def test_a_promise_of_little_keeps_everything_and_one_of_much_the_least():
    loaded = load_tiny()
    cache, promise = compress_to_promise(loaded, TEXT, plan_of(loaded), 1e-9, questions=2)
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids(TEXT))
    assert promise.keeps_everything and promise.kept.measured == 0 and promise.kept.tokens == tokens
    assert cache.lengths.unique().tolist() == [tokens] and cache.plan.budget == Budget(1.0, "share")
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids(LONG))
    cache, promise = compress_to_promise(loaded, LONG, plan_of(loaded), 1e6, questions=1)
    assert promise.kept.tokens == round(SHARES[-1] * tokens) == int(cache.lengths.float().mean())
    assert len(promise.tried) == 1 + len(SHARES) and not promise.keeps_everything


def test_candidates_are_bounded_and_cover_what_every_head_keeps():
    loaded = load_tiny()
    assert sum(SHARES) < 2.5 and min(SHARES) == pytest.approx(0.0221, abs=1e-4)
    candidates = Candidates(loaded, TEXT, plan_of(loaded, keep_last=30), questions=1)
    assert candidates.tokens[-1] >= 31 > round(candidates.tokens[0] * SHARES[len(candidates.tokens) - 1])


def test_the_model_asks_about_each_part():
    loaded = load_tiny()
    meter = Candidates(loaded, TEXT, plan_of(loaded), questions=4).meter
    assert 1 <= len(meter.asked) <= 4 and len(set(meter.asked)) == len(meter.asked)
    encoder = PromptEncoder(loaded.tokenizer)
    asked = [exam.tail for exam in meter.exams if exam.kind == "question"]
    assert set(asked) <= {tuple(encoder.question_ids(question)) for question in meter.asked}
    assert meter.tokens == sum(len(exam.reference) for exam in meter.exams)


# What cannot be promised.


@pytest.mark.parametrize("max_loss", [0.0, -0.1, float("nan"), float("inf")])
def test_no_number_that_can_be_promised(max_loss):
    loaded = load_tiny()
    with pytest.raises(UsageError, match="cannot be promised: give --max-loss a number above 0"):
        compress_to_promise(loaded, TEXT, plan_of(loaded), max_loss)


def test_the_full_cache_needs_no_promise():
    loaded = load_tiny()
    with pytest.raises(UsageError, match="loses nothing"):
        compress_to_promise(loaded, TEXT, plan_of(loaded, "full"), 0.1)


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_document(text):
    loaded = load_tiny()
    with pytest.raises(UsageError, match="The document is empty"):
        compress_to_promise(loaded, text, plan_of(loaded), 0.1)


def test_a_document_of_a_word_is_kept_whole():
    loaded = load_tiny()
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids("a"))
    cache, promise = compress_to_promise(loaded, "a", plan_of(loaded, keep_last=tokens), 0.1)
    assert promise.keeps_everything and cache.lengths.unique().tolist() == [tokens]
    assert promise.remarks() == ["The document is too short to be compressed by this method: everything is kept."]
    assert promise.measured_on == {"spans": 0, "questions": 0, "tokens": 0}


@pytest.mark.parametrize("keep", ["/(?s).+/", "the"])
def test_what_is_protected_may_leave_nothing_to_compress(keep):
    loaded = load_tiny()
    cache, promise = compress_to_promise(loaded, TEXT, plan_of(loaded), 1e6, questions=1, keep=[keep])
    tokens, protected = cache.get_seq_length(), max(cache.protected.count(0))
    if keep == "the":  # few enough
        assert not promise.keeps_everything and promise.protected_tokens == 0 and promise.remarks() == []
        return
    assert promise.keeps_everything and cache.lengths.unique().tolist() == [tokens] and protected > 0.71 * tokens
    assert promise.remarks() == [
        f"Of the document's {tokens} tokens {protected} are protected, which leaves too few to compress: everything is "
        "kept."
    ]


def test_a_short_document_is_short_whatever_is_protected():
    loaded = load_tiny()
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids("a"))
    _, promise = compress_to_promise(loaded, "a", plan_of(loaded, keep_last=tokens), 0.1, keep=["a"])
    assert promise.remarks() == ["The document is too short to be compressed by this method: everything is kept."]


def test_a_document_that_leaves_no_room_for_questions():
    loaded = load_tiny()
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids(TEXT))
    tight = replace(loaded, max_positions=tokens + 30)
    with pytest.raises(UsageError) as refused:
        compress_to_promise(tight, TEXT, plan_of(loaded), 0.1)
    words = str(refused.value)
    assert "leaves no room for questions about it" in words and "give a --budget" in words
    missing = int(words.partition("shorten it by ")[2].split()[0])
    fits = replace(loaded, max_positions=tokens + 30 + missing)
    assert compress_to_promise(fits, TEXT, plan_of(loaded), 1e6)[1].measured_on["spans"] >= 2
    with pytest.raises(UsageError, match="shorten it by 1 tokens"):
        compress_to_promise(replace(fits, max_positions=tokens + 29 + missing), TEXT, plan_of(loaded), 0.1)


# Files and commands.


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code, capsys.readouterr()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny", chat=True)
    Path("keeper.txt").write_text(TEXT)
    return tmp_path


COMMAND = ("compress", "--file", "keeper.txt", "--model", "tiny", "--method", "kvzip")


def test_the_command_says_what_was_promised_and_measured(workplace, capsys):
    code, shown = run(capsys, *COMMAND, "--max-loss", "0.4", "--json", "-o", "a.kv.safetensors")
    figures = json.loads(shown.out)
    assert code == 0 and figures["promised_loss"] == 0.4
    assert 0 < figures["measured_loss"] <= figures["measured_at_most"] <= 0.4
    assert figures["measured_on"]["spans"] >= 2 and figures["measured_on"]["questions"] >= 1
    tokens = [each["tokens_per_head"] for each in figures["candidates"]]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == figures["document_tokens"]
    assert figures["tokens_per_head"] in tokens[-2:] and figures["candidates"][-1]["measured_at_most"] > 0.4

    code, shown = run(capsys, *COMMAND, "--max-loss", "0.4", "-o", "b.kv.safetensors")
    assert code == 0 and "promised loss" in shown.err and "0.4" in shown.err

    loaded = load_model("tiny", device="cpu")
    _, notes = load_document("a.kv.safetensors", loaded)
    assert notes == load_document("b.kv.safetensors", loaded)[1]  # their checksums cover everything in them
    assert json.loads(notes["promised_loss"]) == 0.4
    assert json.loads(notes["measured_loss"]) == figures["measured_loss"]
    assert json.loads(notes["measured_on"]) == figures["measured_on"]
    assert json.loads(notes["budget"]) == {"amount": figures["tokens_per_head"], "unit": "tokens"}

    asking = ("generate", "--cache", "a.kv.safetensors", "--prompt", "Who?", "--model", "tiny", "--max-new-tokens", "4")
    code, shown = run(capsys, *asking)
    assert code == 0 and "at most 0.4 nats a token lost" in shown.err


def test_the_command_says_plainly_that_everything_is_kept(workplace, capsys):
    code, shown = run(capsys, *COMMAND, "--max-loss", "1e-9", "-q", "Who?")
    assert code == 0 and "Only the full cache loses at most 1e-09 nats a token: everything is kept." in shown.err
    cache, _ = load_document("keeper.kv.safetensors", load_model("tiny", device="cpu"))
    assert cache.lengths.unique().tolist() == [cache.get_seq_length()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-loss", "0.1", "--budget", "64"), "leave --budget or --max-loss away"),
        (("--max-loss", "0.1", "-b", "256"), "leave --budget or --max-loss away"),
        (("--max-loss", "0"), "cannot be promised"),
        (("--max-loss", "-1"), "cannot be promised"),
        (("--max-loss", "0.1", "--method", "full"), "loses nothing"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(workplace, capsys, options, words):
    code, shown = run(capsys, *COMMAND, *options)
    assert code == 2 and words in shown.err and len(shown.err.strip().splitlines()) == 1
    assert not list(workplace.glob("*.kv.safetensors"))


@pytest.mark.parametrize("loss", ["inf", "nan", "1001"])
def test_losses_beyond_all_bounds(workplace, capsys, loss):
    code, shown = run(capsys, *COMMAND, "--max-loss", loss)
    assert code == 2 and "less than or equal to 1000" in " ".join(shown.err.split())
    assert not list(workplace.glob("*.kv.safetensors"))


@pytest.mark.parametrize("value", ["0", "-1", "true", '"0.1"', "NaN", "[0.1]"])
def test_a_file_that_promises_what_cannot_be(tmp_path, value):
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, plan_of(loaded))
    save_document(cache, tmp_path / "bad.kv.safetensors", loaded, {"promised_loss": value})
    with pytest.raises(CacheError, match="is damaged"):
        load_document(tmp_path / "bad.kv.safetensors", loaded)


# A real model.


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_keeps_its_promise_on_what_it_was_measured_by(smollm2):
    text = (Path(__file__).parents[1] / "data/demo/document.txt").read_text("utf-8").strip()[:1200]
    plan = make_plan(smollm2.model, method="adakv-kvzip")
    candidates = Candidates(smollm2, text, plan, questions=2)
    cache, promise = candidates.keep(0.3)
    assert not promise.keeps_everything and promise.kept.tokens < candidates.tokens[0] // 2
    exams = candidates.meter.exams[::4]
    budget = Budget(float(promise.kept.tokens), "tokens")
    alone = losses_apart(smollm2, text, replace(plan, budget=budget, _known=[]), exams)
    measured = [*promise.kept.spans, *promise.kept.questions][::4]
    assert measured == pytest.approx(alone, abs=1e-3, rel=1e-2)
    assert all("?" in question for question in candidates.meter.asked)
    assert int(cache.lengths.sum()) == promise.kept.tokens * cache.lengths.numel()
