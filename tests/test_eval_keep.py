"""`headprof eval --keep`: what patterns match in any task's texts is in every head, and refused where it cannot be."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.hub_data import write_hub_data
from support.profiles import random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_tokenizer

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.evaluation.kept_tokens import KeptTokens
from headprof.evaluation.perplexity import PerplexitySettings, select_documents
from headprof.evaluation.questions import digest_of
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.run import EvalRun
from headprof.evaluation.texts import Text
from headprof.models.encoded import located
from headprof.models.prompt_encoder import PromptEncoder
from headprof.models.text_encoder import TextEncoder

PROBES = EvalRequest(("niah", "reasoning"), ("full", "snapkv"), ("60",), probes=4, lengths=(300,))


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_hub_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"On day {number} the keeper counted boats, nets and gulls. " * 30)
    return folder


@pytest.fixture
def filled(monkeypatch):
    """The caches that an evaluation reads prompts into, each with what it holds once the prompt is read."""
    caches = []
    all_filled = HeadCache.all_filled

    def noted(cache):
        all_filled(cache)
        caches.append((cache, [[set(head.tolist()) for head in positions(layer)] for layer in cache.head_layers]))

    monkeypatch.setattr(HeadCache, "all_filled", noted)
    return caches


def positions(layer):
    rows = layer.storage.compact()
    return rows.positions.split(layer.lengths)


def by_hand(tokenizer, ids, pattern, parts):
    """Numbers of the tokens that matches overlap, from what each token says (of a tokenizer of bytes, in ASCII)."""
    said = [tokenizer.decode([token]) for token in ids]
    whole = "".join(said)
    ends = [sum(map(len, said[: number + 1])) for number in range(len(said))]
    marked = set()
    for part in parts:
        (start,) = [match.start() for match in re.finditer(re.escape(part), whole)]
        for match in re.finditer(pattern, part):
            first, last = start + match.start(), start + match.end()
            marked |= {n for n, end in enumerate(ends) if end > first and end - len(said[n]) < last}
    return marked


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "task", ["niah", "multi", "longbench/hotpotqa", "longbench/trec", "ruler/vt", "loogle/shortdep_qa"]
)
def test_every_head_holds_what_a_pattern_matches(loaded, data_dir, filled, task, known):
    if task == "multi" and known:
        return
    request = replace(PROBES, tasks=(task,), probes=2, limit=2, data_dir=data_dir, question_known=known)
    request = replace(
        request,
        lengths=(1500,),
        methods=("full", "snapkv", "streamingllm"),
        keep=("he ", "/[a-z]o[a-z]+ /"),
    )
    request.check()
    run = EvalRun(loaded, None, replace(request, budgets=("90%",)))
    run.evaluate()
    asked = run.tasks[task].documents if task == "multi" else run.tasks[task].questions
    assert len(filled) == len(asked) * 3
    kept = []
    for number in range(len(asked)):
        question = asked[number][0] if task == "multi" else asked[number]
        ids = [*question.document_ids, *(question.asked_ids if known else ())]
        parts = [each.text for each in question.texts[: 1 + known] if each.text]
        expected = by_hand(loaded.tokenizer, ids, "he |[a-z]o[a-z]+ ", parts)
        kept.append({each for each in expected if each < run.asker.compressed_length(question)})
    for (cache, held), expected in zip(filled, [each for each in kept for _ in range(3)], strict=True):
        assert set(cache.protected.positions[0]) == expected
        assert all(expected <= head for layer in held for head in layer)
    assert any(kept)


@settings(max_examples=60, deadline=None)
@given(st.text("ab é日<|end|>\n", max_size=30), st.text("who is<|end|>?", max_size=12), st.booleans(), st.booleans())
def test_located_ids_are_the_ids(document, question, chat, raw):
    encoder = PromptEncoder(tiny_tokenizer(chat=chat), raw=raw)
    assert list(encoder.encode_start(document).ids) == encoder.start_ids(document)
    for end in (encoder.encode_end(question, "It", "is"), encoder.encode_question(question, "It", "is")):
        tokens = located(end.asked, end.places)
        assert len(tokens.ids) == len(tokens.starts) and list(tokens.stops) == sorted(tokens.stops)
        assert not question or tokens.span(0, len(question))[0] < len(end.asked)
    texts = TextEncoder(tiny_tokenizer())
    ids, places = texts.whole_with_offsets(document)
    assert ids == texts.whole(document)
    assert [document[start:stop] for start, stop in places] if document else not places


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(1, 30), st.integers(3, 60))
def test_of_a_long_text_only_the_beginning_counts(start, width, prefix):
    text = "The keeper counted nine grey boats, two nets and a gull before breakfast; his brother sold rope. " * 3
    wanted = text[start : start + width]
    assume(wanted.strip())
    tokenizer = tiny_tokenizer()
    (document,) = select_documents(
        tokenizer, [Text("a", text)], PerplexitySettings(prefix, 5), 4096, KeptTokens([wanted])
    )
    said = [tokenizer.decode([token]) for token in document.prefix]
    read, ends = "".join(said), [len("".join(said[: n + 1])) for n in range(prefix)]
    expected = set()
    for at in (n for n in range(len(read)) if read.startswith(wanted, n)):
        expected |= {n for n, end in enumerate(ends) if end > at and end - len(said[n]) < at + width}
    assert set(document.protected.positions[0] if document.protected else ()) == expected
    (plain,) = select_documents(tokenizer, [Text("a", text)], PerplexitySettings(prefix, 5), 4096)
    assert digest_of(document) == digest_of(plain)


@pytest.mark.parametrize("agnostic", [True, False])
def test_texts_that_go_on_keep_it_too(loaded, texts, filled, agnostic):
    request = EvalRequest(
        *(("perplexity",), ("full", "adakv-kvzip", "snapkv"), ("60",)),
        lengths=(240,),
        continuation=40,
        data_dir=texts,
        documents=2,
        keep=(r"/day \d/",),
        question_known=not agnostic,
    )
    run = EvalRun(loaded, random_profile(loaded.model), request)
    found = run.evaluate()
    whole = EvalRun(loaded, random_profile(loaded.model), replace(request, keep=())).evaluate()
    kept = [cache.protected for cache, _ in filled if cache.protected is not None]
    assert len(kept) == 6 and all(len(each.positions[0]) > 10 for each in kept)
    for cache, held in filled:
        if cache.protected is not None:
            assert all(set(cache.protected.positions[0]) <= head for layer in held for head in layer)
    changed = [one.nll != other.nll for one, other in zip(found.losses, whole.losses, strict=True)]
    assert changed == [False, True, True] * 2


def test_positions_beyond_what_is_compressed_do_not_count():
    tokens = ProtectedTokens.of([(2, 5), (7, 9)])
    assert tokens.before(8).positions == ((2, 3, 4, 7),)
    assert tokens.before(2) is None


def test_answers_are_kept_under_it_and_those_without_it_stay_valid(loaded, tmp_path):
    EvalRun(loaded, None, PROBES, output=tmp_path / "plain").evaluate()
    keeping = replace(PROBES, keep=("the ",))
    assert "keep" not in PROBES.key(loaded, None) and keeping.key(loaded, None)["keep"] == ["the "]
    first = json.loads((tmp_path / "plain/answers.jsonl").read_text().splitlines()[0])
    assert first["run"] == json.loads(json.dumps(PROBES.key(loaded, None)))
    with pytest.raises(UsageError, match=r"other settings \(keep\)"):
        EvalRun(loaded, None, keeping, output=tmp_path / "plain", resume=True).evaluate()
    found = EvalRun(loaded, None, keeping, output=tmp_path / "kept").evaluate()
    again = EvalRun(loaded, None, keeping, output=tmp_path / "kept", resume=True).evaluate()
    assert again.answers == found.answers
    for other in (PROBES, replace(PROBES, keep=("of ",))):
        with pytest.raises(UsageError, match=r"other settings \(keep\)"):
            EvalRun(loaded, None, other, output=tmp_path / "kept", resume=True).evaluate()


@pytest.fixture
def nothing_is_read(monkeypatch):
    def read(*_, **__):
        raise AssertionError("a prompt was read")

    monkeypatch.setattr("headprof.evaluation.asker.Asker.read", read)
    monkeypatch.setattr("headprof.evaluation.run.measure_perplexity", read)


def test_a_pattern_need_not_match_everywhere_but_somewhere(loaded, nothing_is_read):
    run = EvalRun(loaded, None, PROBES)
    contexts = [run.tasks[task].questions[number].texts for task in PROBES.tasks for number in range(2)]
    word = next(
        word
        for word in contexts[0][0].text.split()
        if word.isalpha() and not any(word in text.text for texts in contexts[1:] for text in texts)
    )
    found = EvalRun(loaded, None, replace(PROBES, keep=(word,)))
    assert list(found.tasks["niah"].protected) == [0] and found.tasks["reasoning"].protected == {}
    for keep in (("no such words",), (word, "no such words"), (r"/\d{9}/",)):
        with pytest.raises(UsageError) as refused:
            EvalRun(loaded, None, replace(PROBES, keep=keep))
        assert f"There is no match for --keep '{keep[-1]}' in what is compressed of niah and reasoning" in str(
            refused.value
        )


def test_what_only_the_question_says_is_kept_where_that_is_known(loaded, nothing_is_read):
    request = replace(PROBES, tasks=("niah",), probes=1)
    question = EvalRun(loaded, None, request).tasks["niah"].questions[0].texts[1].text
    wanted = replace(request, keep=(question[:9],))
    known = EvalRun(loaded, None, wanted).tasks["niah"].protected[0]
    first = EvalRun(loaded, None, wanted).tasks["niah"].questions[0].texts[1].first
    assert min(known.positions[0]) >= first
    with pytest.raises(UsageError, match="in what is compressed of niah"):
        EvalRun(loaded, None, replace(wanted, question_known=False))


def test_more_than_a_budget_holds_is_said_before_anything_is_read(loaded, texts, nothing_is_read):
    with pytest.raises(
        UsageError, match=r"^Question 0 of niah: A budget of 60 tokens is below the \d+ that every head"
    ):
        EvalRun(loaded, None, replace(PROBES, keep=("/(?s).+/",)))
    request = replace(PROBES, tasks=("perplexity",), lengths=(240,), continuation=40, data_dir=texts, documents=2)
    with pytest.raises(UsageError, match=r"^The text 0\.txt: A budget of 60 tokens is below the \d+ that every head"):
        EvalRun(loaded, None, replace(request, keep=("boats, nets and gulls",)))


def test_patterns_that_cannot_be_read_are_refused_before_a_model_is_loaded(tmp_path):
    for keep, message in (("/(/", "cannot be read"), ("", "A --keep without a text keeps nothing")):
        done = headprof(tmp_path, "eval", "--model", "no/such-model", "--keep", keep)
        assert done.returncode == 2 and message in " ".join(done.stderr.split())
    with pytest.raises(UsageError, match="list of patterns"):
        replace(PROBES, keep="the").check()


def test_a_tokenizer_that_tells_no_places_is_refused(loaded, data_dir, texts):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(loaded.tokenizer, name)

        def __call__(self, *given, **options):
            return loaded.tokenizer(*given, **options)

    slow = replace(loaded, tokenizer=Slow())
    for task, data in (("longbench/hotpotqa", data_dir), ("perplexity", texts)):
        request = replace(PROBES, tasks=(task,), data_dir=data, lengths=(240,), continuation=40, documents=1, limit=1)
        with pytest.raises(UsageError, match="fast tokenizers only"):
            EvalRun(slow, None, replace(request, keep=("the",)))
        EvalRun(slow, None, request)


def test_the_command_keeps_and_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("headprof.plots.results_folder.drawings", lambda found: {})  # which would take seconds
    monkeypatch.setattr("headprof.plots.results_folder.write_report", lambda found, path: path)
    save_tiny(tmp_path / "tiny", chat=True)
    command = ("eval", "--model", "tiny", "--tasks", "niah", "--probes", "1", "--lengths", "300", "--methods", "snapkv")
    done = headprof(tmp_path, *command, "--budgets", "60", "--keep", "the ", "--keep", r"/o[fn] /", "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "results/answers.jsonl").read_text().splitlines()[0])
    assert first["run"]["keep"] == ["the ", "/o[fn] /"]
    done = headprof(tmp_path, *command, "--budgets", "60", "--keep", "no such words", "-o", "other")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "other").exists()
    assert "There is no match for --keep 'no such words' in what is compressed of niah" in " ".join(done.stderr.split())
