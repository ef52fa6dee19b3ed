"""Perplexity over compressed caches: against the plain model, alone and together, and the arithmetic of the table."""

import csv
import io
import math
from functools import partial
from statistics import NormalDist
from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import VOCAB_SIZE, load_tiny, tiny_model, tiny_tokenizer

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.filling import read_document_into
from headprof.compression.observers import Observers, repeating_observers
from headprof.compression.session import attending_ragged, compressed, make_plan
from headprof.errors import UsageError
from headprof.evaluation import perplexity
from headprof.evaluation.asker import Asker
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.perplexity import (
    Document,
    Loss,
    PerplexitySettings,
    measure_perplexity,
    select_documents,
    tabulate_losses,
)
from headprof.evaluation.results import results_csv
from headprof.evaluation.texts import Text
from headprof.models.prompt_encoder import PromptEncoder
from headprof.models.text_encoder import TextEncoder
from headprof.utils.intervals import t_95


def candidate(model, method, budget="", **options):
    profile = random_profile(model)
    return Candidate(method, budget, make_plan(model, profile, method=method, budget=budget or 1, **options))


def random_documents(count=2, prefix=40, continuation=20):
    rows = random_ids(count, prefix + continuation, seed=3).tolist()
    return [Document(str(i), tuple(row[:prefix]), tuple(row[prefix:])) for i, row in enumerate(rows)]


def plain_nll(model, document):
    """Without any cache, in one forward pass."""
    ids = torch.tensor([[*document.prefix, *document.continuation]])
    log_probabilities = model(ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
    start = len(document.prefix)
    return -sum(log_probabilities[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 7, 19, 64])
def test_the_full_cache_predicts_as_the_model_without_a_cache(arch, chunk):
    model, documents = tiny_model(arch), random_documents()
    losses = measure_perplexity(model, documents, [candidate(model, "full")], chunk=chunk)
    assert [loss.nll for loss in losses] == pytest.approx([plain_nll(model, each) for each in documents], rel=1e-5)
    assert [(loss.document, loss.name, loss.tokens) for loss in losses] == [(0, "0", 20), (1, "1", 20)]


@pytest.mark.parametrize(("prefix", "continuation"), [(40, 1), (1, 2), (1, 1)])
def test_the_shortest_documents_work(prefix, continuation):
    model, documents = tiny_model(), random_documents(1, prefix, continuation)
    (loss,) = measure_perplexity(model, documents, [candidate(model, "full")])
    assert loss.nll == pytest.approx(plain_nll(model, documents[0]), rel=1e-5)


@pytest.mark.parametrize("method", ["snapkv", "headkv", "tova"])
def test_a_budget_of_the_whole_document_changes_nothing(method):
    model = tiny_model()
    pair = [candidate(model, "full"), candidate(model, method, "60")]
    losses = measure_perplexity(model, random_documents(), pair)
    assert losses[1].nll == pytest.approx(losses[0].nll, rel=1e-5)
    assert losses[3].nll == pytest.approx(losses[2].nll, rel=1e-5)


def test_candidates_together_predict_as_each_alone():
    model, documents = tiny_model(layers=3), random_documents(prefix=300)
    candidates = [
        candidate(model, "full"),
        candidate(model, "snapkv", "8", window=4),
        candidate(model, "headkv", "8", window=4),
        candidate(model, "adakv", "20%", window=4),
    ]
    batches: list[list[Loss]] = []
    together = measure_perplexity(model, documents, candidates, batches.append, chunk=6)
    assert [loss for batch in batches for loss in batch] == together
    assert [len(batch) for batch in batches] == [4, 4]
    for place, single in enumerate(candidates):
        alone = measure_perplexity(model, documents, [single], chunk=6)
        for one, other in zip(together[place::4], alone, strict=True):
            assert one.nll == pytest.approx(other.nll, rel=1e-5)
            assert (one.document, one.method, one.cache_bytes) == (other.document, other.method, other.cache_bytes)
    assert len({round(loss.nll, 2) for loss in together}) == 8
    assert together[1].cache_bytes < together[0].cache_bytes


@torch.no_grad()
def test_beginnings_are_judged_by_their_repetition_where_that_is_asked_for():
    loaded = load_tiny()
    model, document = loaded.model, random_documents(1, prefix=90, continuation=20)[0]
    cases = (("full", ""), ("adakv-kvzip", "120"), ("adakv-kvzip", "9"), ("snapkv", "9"))
    candidates = [candidate(model, *case, buffer=8) for case in cases]
    asker = Asker(loaded, candidates, question_known=False, repeat=True)
    fill = partial(asker.read, of=("perplexity", ""))
    losses = measure_perplexity(model, [document], candidates, chunk=7, fill=fill)
    whole = plain_nll(model, document)
    assert [loss.nll for loss in losses[:2]] == pytest.approx([whole, whole], rel=1e-5)
    assert [loss.tokens for loss in losses] == [20] * len(candidates)
    for each, loss in zip(candidates[2:], losses[2:], strict=True):
        *prefix, last = document.prefix
        observers = Observers(())
        if each.method == "adakv-kvzip":
            observers = repeating_observers(loaded, PromptEncoder(loaded.tokenizer), prefix, each.plan.method)
            assert list(observers.ids[-len(prefix) :]) == prefix
        alone = HeadCache(each.plan.for_observers(len(observers)))
        with attending_ragged(model):
            read_document_into(model, [alone], prefix, observers)
            assert alone.plan.method == each.plan.method  # from here on the last queries judge
            fed = torch.tensor([[last, *document.continuation[:-1]]])
            logits = [model(part, past_key_values=alone).logits[0] for part in fed.split(7, dim=1)]
        said = torch.cat(logits).double().log_softmax(dim=-1)
        nll = -sum(said[place, token].item() for place, token in enumerate(document.continuation))
        assert loss.nll == pytest.approx(nll, rel=1e-5) and abs(nll - whole) > 1e-3
        assert loss.cache_bytes == alone.nbytes
    plain = measure_perplexity(model, [document], candidates[2:], chunk=7)
    assert losses[2].nll != pytest.approx(plain[0].nll, rel=1e-4)


@torch.no_grad()
def test_a_compressed_cache_predicts_as_one_fed_by_hand():
    model, (document,) = tiny_model(), random_documents(1)
    (loss,) = measure_perplexity(model, [document], [candidate(model, "snapkv", "8", window=4, buffer=8)], chunk=1)
    with compressed(model, method="snapkv", budget=8, window=4, buffer=8) as plan:
        cache = HeadCache(plan)
        logits = model(torch.tensor([document.prefix]), past_key_values=cache).logits[0, -1]
        nll = 0.0
        for token in document.continuation:
            nll -= logits.log_softmax(dim=-1)[token].item()
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    assert loss.nll == pytest.approx(nll, rel=1e-5)
    assert abs(loss.nll - plain_nll(model, document)) > 0.01


def test_while_reading_on_the_cache_is_compressed_again():
    model, bounded = tiny_model(), {"window": 4, "buffer": 8}
    pair = [candidate(model, "full"), candidate(model, "snapkv", "8", **bounded)]
    short, long = (
        measure_perplexity(model, random_documents(1, continuation=tokens), pair, chunk=4) for tokens in (40, 160)
    )
    assert long[0].cache_bytes > 1.5 * short[0].cache_bytes
    assert long[1].cache_bytes < 1.2 * short[1].cache_bytes


def test_a_model_without_a_clue_has_the_perplexity_of_its_vocabulary():
    model = tiny_model()
    model.get_output_embeddings().weight.zero_()
    losses = measure_perplexity(model, random_documents(3), [candidate(model, "full"), candidate(model, "snapkv", "9")])
    for cell in tabulate_losses(losses):
        assert cell.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-5)
        assert cell.interval == pytest.approx((VOCAB_SIZE, VOCAB_SIZE), rel=1e-4)
        assert cell.ratio == pytest.approx(1, rel=1e-5)
        assert (cell.documents, cell.tokens) == (3, 60)


def test_each_cache_is_freed_before_the_next_is_continued(monkeypatch):
    living = WeakSet()

    class Watched(HeadCache):
        def __init__(self, plan):
            super().__init__(plan)
            living.add(self)

    monkeypatch.setattr(perplexity, "HeadCache", Watched)
    model, counts = tiny_model(), []
    candidates = [candidate(model, "full"), candidate(model, "snapkv", "8"), candidate(model, "knorm", "8")]
    model.register_forward_pre_hook(lambda *_: counts.append(len(living)))
    measure_perplexity(model, random_documents(2), candidates)
    assert counts == [3, 3, 2, 1] * 2  # at the prefill, then at each continuation


def test_a_budget_that_cannot_be_met_is_an_error_before_any_work():
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UsageError, match="budget"):
        measure_perplexity(model, random_documents(), [candidate(model, "snapkv", "2", window=8, keep_last=8)])


def loss(document, method, nll, budget="", tokens=10, size=100):
    return Loss(document, f"text {document}", method, budget, tokens, nll, size)


def test_table_pairs_documents_with_their_full_cache():
    losses = [loss(0, "full", 20), loss(0, "snapkv", 21, "8", size=10)]
    losses += [loss(1, "full", 40), loss(1, "snapkv", 42, "8", size=20)]
    losses += [loss(2, "full", 30), loss(2, "snapkv", 33, "8", size=30)]
    full, snapkv = tabulate_losses(losses)
    assert (full.method, full.budget, full.documents, full.tokens, full.cache_bytes) == ("full", "", 3, 30, 100)
    assert (full.perplexity, full.ratio) == (pytest.approx(math.exp(3)), 1.0)
    assert full.ratio_interval == pytest.approx((1.0, 1.0))
    t = 4.302652729749464  # of Student's distribution with 2 degrees of freedom, from published tables 4.3027
    assert full.interval == pytest.approx((math.exp(3 - t / math.sqrt(3)), math.exp(3 + t / math.sqrt(3))))
    assert (snapkv.budget, snapkv.cache_bytes) == ("8", 20)
    assert snapkv.perplexity == pytest.approx(math.exp(3.2))
    assert snapkv.ratio == pytest.approx(math.exp(0.2))  # the mean of 0.1, 0.2 and 0.3
    half = t * 0.1 / math.sqrt(3)
    assert snapkv.ratio_interval == pytest.approx((math.exp(0.2 - half), math.exp(0.2 + half)))


def test_table_without_a_full_cache_or_a_second_document_says_nothing_of_them():
    (alone,) = tabulate_losses([loss(0, "snapkv", 20, "8")])
    assert (alone.perplexity, alone.interval) == (pytest.approx(math.exp(2)), None)
    assert (alone.ratio, alone.ratio_interval) == (None, None)
    _, paired = tabulate_losses([loss(0, "full", 10), loss(0, "snapkv", 20, "8")])
    assert (paired.ratio, paired.ratio_interval) == (pytest.approx(math.e), None)


def test_table_takes_documents_by_their_tokens_and_losses_beyond_all_bounds():
    (cell,) = tabulate_losses([loss(0, "snapkv", 20, tokens=10), loss(1, "snapkv", 10, tokens=20)])
    assert cell.perplexity == pytest.approx(math.e)
    (cell,) = tabulate_losses([loss(0, "snapkv", 0), loss(1, "snapkv", 9000)])
    assert (cell.perplexity, cell.interval) == (pytest.approx(math.exp(450)), (0.0, math.inf))


# Published two-sided 95 % values of Student's t distribution.
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045), (60, 2.000), (120, 1.980)],
)
def test_students_t_equals_published_values(degrees, expected):
    assert t_95(degrees) == pytest.approx(expected, abs=6e-4)


@given(st.integers(1, 2000))
def test_students_t_falls_towards_the_normal_distribution(degrees):
    assert t_95(degrees) > t_95(degrees + 1) > NormalDist().inv_cdf(0.975)


def test_csv_has_a_line_for_each_loss():
    rows = list(csv.DictReader(io.StringIO(results_csv([loss(0, "full", 1.5), loss(0, "snapkv", 2.5, "8")]))))
    assert len(rows) == 2 and rows[1] == {
        "document": "0",
        "name": "text 0",
        "method": "snapkv",
        "budget": "8",
        "tokens": "10",
        "nll": "2.5",
        "cache_bytes": "100",
    }


def texts_of(*lengths):
    """Texts of so many tokens each, all tokens alike in one text; no text is like another."""
    words = [chr(ord("A") + i) for i in range(len(lengths))]
    return [Text(word, " ".join(word * length)) for word, length in zip(words, lengths, strict=True)]


def test_documents_are_the_first_that_are_long_enough():
    tokenizer = tiny_tokenizer()
    texts = texts_of(40, 3, 50, 60, 70)
    chosen = select_documents(tokenizer, texts, PerplexitySettings(20, 5, documents=2, skip=1), max_positions=25)
    assert [document.name for document in chosen] == ["C", "D"]
    for document, text in zip(chosen, [texts[2], texts[3]], strict=True):
        assert (len(document.prefix), len(document.continuation)) == (20, 5)
        assert [*document.prefix, *document.continuation] == tokenizer(text.text).input_ids[:25]
    everything = select_documents(tokenizer, texts, PerplexitySettings(20, 5, skip=1), max_positions=25)
    assert [document.name for document in everything] == ["C", "D", "E"]


def test_a_text_of_exactly_the_length_is_long_enough():
    tokenizer = tiny_tokenizer()
    (text,) = texts_of(40)
    length = len(tokenizer(text.text).input_ids)
    assert select_documents(tokenizer, [text], PerplexitySettings(length - 5, 5), length)
    with pytest.raises(UsageError, match=f"has the {length + 1} tokens .* longest has {length}"):
        select_documents(tokenizer, [text], PerplexitySettings(length - 4, 5), 4096)


def test_special_tokens_are_as_the_tokenizer_adds_them():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    (document,) = select_documents(tokenizer, texts_of(40), PerplexitySettings(20, 5), 4096)
    assert document.prefix[0] == 0 and 0 not in document.prefix[1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PerplexitySettings(4000, 97), "4000 and a continuation of 97 tokens exceed the 4096"),
        (PerplexitySettings(500, 5), "No text has the 505 tokens"),
        (PerplexitySettings(20, 5, documents=3), "Only 2 texts have 25 tokens .* skip 0 and take 3"),
        (PerplexitySettings(20, 5, documents=1, skip=2), "Only 2 texts have 25 tokens .* skip 2 and take 1"),
        (PerplexitySettings(20, 5, skip=2), "Only 2 texts have 25 tokens .* skip 2 and take 1"),
    ],
)
def test_too_few_documents_are_an_error(settings, message):
    with pytest.raises(UsageError, match=message):
        select_documents(tiny_tokenizer(), texts_of(40, 3, 50), settings, max_positions=4096)


@pytest.mark.parametrize(
    ("name", "value"), [("prefix", 0), ("continuation", 0), ("documents", 0), ("skip", -1), ("chunk", 0)]
)
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(UsageError, match=f"cannot use {name} {value}"):
        PerplexitySettings(**{"prefix": 20, "continuation": 5, name: value})


def test_control_tokens_in_a_text_are_characters():
    tokenizer, text = tiny_tokenizer(), "Before <|end|> and after " * 20
    ids = TextEncoder(tokenizer).whole(text)
    assert tokenizer.decode(ids) == text and not {0, 1, 2}.intersection(ids)
    plain = text.replace("<|end|>", "the end")
    assert TextEncoder(tokenizer).whole(plain) == tokenizer(plain).input_ids
