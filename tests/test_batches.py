"""Many questions to one document at a time: every answer is the one that its question gets alone."""

from __future__ import annotations

import pytest
import torch
from support.profiles import judging, random_profile
from support.tiny_models import load_tiny

from headprof.compression.batches import answer_each
from headprof.compression.cache.head_cache import stack_caches
from headprof.compression.cache.together import TogetherCache
from headprof.compression.conversation import Conversation
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.table import METHODS
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError

TEXT = "The lighthouse keeper counted nine grey boats before breakfast, and her brother sold rope in the harbor. " * 3
QUESTIONS = (
    "Who sold rope?",
    "How many grey boats were counted before breakfast, by whom, and what was written on the kitchen wall?",
    "What?",
    "Where?",
    "Which bridge is older, that of 1907 or that of 1935?",
)


def document(loaded, method="kvzip", **options):
    profile = random_profile(loaded.model) if METHODS[method].budget.profile_scores else None
    options = {"method": method, "budget": 40, "buffer": 8} | judging(loaded.model, method) | options
    return compress_document(loaded, TEXT, make_plan(loaded.model, profile, **options))


def assert_as_alone(loaded, cache, max_new_tokens=40, batch=3, questions=QUESTIONS):
    alone = [ask(loaded, cache, question, max_new_tokens=max_new_tokens) for question in questions]
    together = list(answer_each(loaded, cache, questions, max_new_tokens=max_new_tokens, batch=batch))
    assert [each.text for each in together] == [each.text for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.new_tokens, one.prompt_tokens, one.cached_tokens) == (
            other.new_tokens,
            other.prompt_tokens,
            other.cached_tokens,
        )
    return together


@pytest.mark.parametrize("method", [name for name in METHODS if name != "latent"])  # which the last bit may turn
def test_answers_are_those_of_each_question_alone(tiny, method):
    """With a buffer of 8, every cache is compressed again several times in an answer, each at its own time."""
    assert_as_alone(tiny, document(tiny, method))


@pytest.mark.parametrize("options", [{"buffer": None}, {"buffer": 64}, {"buffer": 1}, {"decode_budget": "20%"}])
def test_with_any_buffer(tiny, options):
    assert_as_alone(tiny, document(tiny, "snapkv", **options), max_new_tokens=80)


@pytest.mark.parametrize("batch", [2, 5, 64])
def test_with_batches_of_any_size(tiny, batch):
    assert_as_alone(tiny, document(tiny, "adakv"), batch=batch)


def test_caches_hold_what_they_hold_alone(tiny):
    """Rows, positions and remembered queries of every layer, after steps in which each was compressed on its own."""
    for method in ("snapkv", "h2o", "headkv-ems", "adakv", "expected"):
        if method not in METHODS:
            continue
        cache = document(tiny, method)
        ids = [torch.arange(5, 5 + count)[None] for count in (3, 11, 20)]
        alone, beside = [stack_caches([cache]) for _ in ids], [stack_caches([cache]) for _ in ids]
        with attending_ragged(tiny.model), torch.no_grad():
            for own, one, other in zip(ids, alone, beside, strict=True):
                prefill(tiny.model, own, one)
                prefill(tiny.model, own, other)
            together = TogetherCache(beside)
            for token in range(30, 60):
                fed = torch.full((3, 1), token)
                expected = torch.cat([prefill(tiny.model, fed[:1], one) for one in alone])
                positions = together.positions
                logits = tiny.model(fed, position_ids=positions, past_key_values=together, use_cache=True).logits[:, -1]
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
                if token == 45:
                    together.part()
        together.part()
        for one, other in zip(alone, beside, strict=True):
            assert one.get_seq_length() == other.get_seq_length()
            assert torch.equal(one.token_ids, other.token_ids)
            for mine, theirs in zip(one.head_layers, other.head_layers, strict=True):
                first, second = mine.storage.compact(), theirs.storage.compact()
                assert mine.lengths == theirs.lengths and mine.storage.appended == theirs.storage.appended
                assert torch.equal(first.positions, second.positions)
                assert first.columns.keys() == second.columns.keys()
                torch.testing.assert_close(first.keys, second.keys, rtol=1e-4, atol=1e-5)
                for name in first.columns:
                    torch.testing.assert_close(first.columns[name], second.columns[name], rtol=1e-4, atol=1e-5)
                assert len(mine.held.recent) == len(theirs.held.recent)
                if len(mine.held.recent):
                    torch.testing.assert_close(
                        mine.held.recent.joined()[0], theirs.held.recent.joined()[0], rtol=1e-4, atol=1e-5
                    )


def test_the_document_is_left_as_it_was(tiny):
    cache = document(tiny)
    before = [layer.storage.compact().keys.clone() for layer in cache.head_layers]
    list(answer_each(tiny, cache, QUESTIONS, max_new_tokens=20, batch=2))
    for keys, layer in zip(before, cache.head_layers, strict=True):
        assert torch.equal(keys, layer.storage.compact().keys)


def test_a_setting_that_looks_at_tokens_holds_for_each(tiny):
    """Of the model's own settings: what must not be said again depends on each question and answer."""
    cache = document(tiny)
    plain = [ask(tiny, cache, each, max_new_tokens=30).text for each in QUESTIONS]
    tiny.model.generation_config.repetition_penalty = 1.5
    tiny.model.generation_config.no_repeat_ngram_size = 2
    assert [each.text for each in assert_as_alone(tiny, cache, 30)] != plain


def test_answers_that_end_early_make_room_for_others(tiny):
    """An end that comes after a different number of tokens in each answer."""
    cache = document(tiny)
    said = [ask(tiny, cache, each, max_new_tokens=30) for each in QUESTIONS]
    ids = [tiny.tokenizer(each.text, add_special_tokens=False).input_ids for each in said]
    tiny.model.generation_config.eos_token_id = [ids[0][4], ids[1][9], ids[3][0]]
    together = assert_as_alone(tiny, cache, 30, batch=2)
    assert len({each.new_tokens for each in together}) > 1


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "mistral"])
def test_other_models(arch):
    window = {"sliding_window": 48} if arch != "qwen3" else {}
    loaded = load_tiny(arch, **window)
    assert_as_alone(loaded, document(loaded, "snapkv"))


def test_one_question_twice_is_answered_once(tiny, monkeypatch):
    cache = document(tiny)
    first, second, again = answer_each(tiny, cache, ["Who?", "What is it?", "Who?"], max_new_tokens=8)
    assert first is again and first is not second


def test_a_question_that_is_too_long_is_named_before_any_is_answered(tiny):
    cache = document(tiny)
    with pytest.raises(UsageError, match=r"^Question 2 is too long: "):
        answer_each(tiny, cache, ["Who?", "word " * 5000])
    with pytest.raises(UsageError, match="--batch"):
        answer_each(tiny, cache, ["Who?"], batch=0)


@pytest.mark.long
@pytest.mark.model
def test_a_real_model_says_to_each_what_it_says_alone(smollm2):
    cache = document(smollm2, "kvzip", budget=64)
    said = assert_as_alone(smollm2, cache, max_new_tokens=16, questions=QUESTIONS[:3])
    assert "rope" in said[0].text


@pytest.mark.model
def test_a_conversation_reads_as_the_chat_template_has_it(smollm2):
    cache = document(smollm2, "snapkv", budget=64)
    conversation, messages = Conversation(smollm2, cache), []
    for question in QUESTIONS[:2]:
        messages.append({"role": "user", "content": question})
        said = conversation.ask(question, max_new_tokens=8).text
        messages.append({"role": "assistant", "content": said})
    messages[0]["content"] = f"{TEXT}\n\n{QUESTIONS[0]}"
    expected = smollm2.tokenizer.apply_chat_template(messages, tokenize=False)
    read = smollm2.tokenizer.decode(conversation.document().token_ids[0])
    assert read == f"{expected}<|im_start|>user\n"
