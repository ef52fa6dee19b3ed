"""Prompts that begin with a saved document without naming it: which are found, and what clients are answered."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.profiles import random_profile
from support.servers import running_server
from support.tiny_models import CHAT_TEMPLATE, EOS, load_tiny
from support.vocabularies import merging_line_ends, of_characters

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import save_document
from headprof.compression.generation import compress_document
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.integrations.server import memory, prefixes
from headprof.integrations.server.documents import SavedDocument
from headprof.integrations.server.prefixes import DocumentPrefixes
from headprof.models.prompt_encoder import PromptEncoder

TEXT = "The lighthouse keeper counted nine grey boats before breakfast, and her brother sold rope in the harbor. " * 3
OTHER = "In 1907 the old bridge was 120 meters long; in 1935 the new bridge was 365 meters long. " * 3
QUESTION = "Who sold rope, and what is the code of the green door?"
ABOUT = f"{TEXT.strip()}\n\n{QUESTION}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(load_tiny(), tmp_path_factory.mktemp("documents")) as running:
        assert running.keep("report", TEXT).status_code == 201
        yield running


@pytest.fixture(scope="module")
def spare(tmp_path_factory):
    """The same model, for documents that the server does not make; and a folder for them."""
    return load_tiny(), tmp_path_factory.mktemp("made")


def put(server, spare, name: str, text: str, **options) -> Path:
    """A document that another process puts into the server's folder."""
    loaded, folder = spare
    method = options.pop("method", "snapkv")
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=40, buffer=8)
    cache = compress_document(loaded, text, plan, **options)
    save_document(cache, folder / name, loaded)
    return shutil.copy(folder / name, server.store.folder / f"{name}.kv.safetensors")


def said(response) -> tuple[str, int, int, str | None]:
    """Text, tokens of the prompt, those of them that a cache held, and the document."""
    assert response.status_code == 200, response.text
    body = response.json()
    usage = body["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return body["choices"][0]["message"]["content"], usage["prompt_tokens"], cached, body.get("document")


def ask(server, text: str = ABOUT, **options):
    return said(server.chat(text, max_tokens=12, **options))


# What a client sees.


def test_a_message_that_begins_with_a_documents_text_is_a_question_about_it(server):
    named = ask(server, QUESTION, document="report")
    assert named[2:] == (server.store.find("report").tokens, "report")
    assert ask(server) == named
    assert ask(server, document=None) == named
    plain = ask(server, document=False)
    assert plain[2:] == (0, None) and plain != named


def test_a_stream_tells_the_document(server):
    messages = [{"role": "user", "content": ABOUT}]
    asked = {"model": server.model, "messages": messages, "max_tokens": 12}
    chunks = list(server.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.document for chunk in chunks} == {"report"}
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == server.store.find("report").tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == ask(server, QUESTION, document="report")[0]


def test_a_conversation_goes_on_from_the_document_in_its_first_message(server):
    turns = [("user", QUESTION), ("assistant", "Her brother."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    named = server.post("/v1/chat/completions", messages=messages, document="report", max_tokens=12)
    whole = [{"role": "user", "content": ABOUT}, *messages[1:]]
    assert said(server.post("/v1/chat/completions", messages=whole, max_tokens=12)) == said(named)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.strip(),  # nothing parts it from what the template has next
        f"{TEXT.strip()}\n{QUESTION}",
        f"{TEXT}\n\n{QUESTION}",  # documents end with no blank
        f" {ABOUT}",
        ABOUT[:100] + "x" + ABOUT[100:],
        QUESTION,
        f"{QUESTION}\n\n{ABOUT}",
    ],
)
def test_what_does_not_begin_with_all_of_a_document_is_read_as_it_is(server, text):
    assert ask(server, text) == ask(server, text, document=False)


def test_a_system_message_stands_before_the_document(server, spare):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ABOUT}]
    asked = {"messages": messages, "max_tokens": 12}
    assert said(server.post("/v1/chat/completions", **asked))[2:] == (0, None)
    path = put(server, spare, "brief", TEXT.strip(), system="Be brief.")
    found = said(server.post("/v1/chat/completions", **asked))
    assert found == ask(server, QUESTION, document="brief")
    path.unlink()


def test_a_completion_writes_what_stands_before_the_document(tmp_path):
    """Without a chat template, whose tokens no text can write."""
    loaded = load_tiny()
    loaded.tokenizer.chat_template = None
    with running_server(loaded, tmp_path) as server:
        assert server.keep("report", TEXT).status_code == 201
        instruction = "Read this text and answer the question that follows it."
        whole = f"{instruction}\n\n{TEXT.strip()}\n\nQuestion: {QUESTION}\nAnswer:"
        named = server.post("/v1/completions", prompt=QUESTION, document="report").json()
        found = server.post("/v1/completions", prompt=whole).json()
        assert found["document"] == "report"
        assert (found["choices"], found["usage"]) == (named["choices"], named["usage"])
        at_its_end = server.post("/v1/completions", prompt=f"{instruction}\n\n{TEXT.strip()}\n\n").json()
        assert "document" not in at_its_end  # nothing would be left to read


def test_it_can_be_turned_off(tmp_path):
    with running_server(load_tiny(), tmp_path, match_documents=False) as server:
        assert server.keep("report", TEXT).status_code == 201
        assert ask(server)[2:] == (0, None)
        assert ask(server, QUESTION, document="report")[3] == "report"


def test_tokens_across_the_documents_end(tmp_path):
    """Its blank line is found in whatever tokens, but not where one of them is more than that."""
    loaded = replace(load_tiny(), tokenizer=merging_line_ends(TEXT))
    encoder = PromptEncoder(loaded.tokenizer)
    document, prompt = encoder.document_ids(TEXT.strip()), encoder.prompt_ids(ABOUT)
    assert prompt[: len(document)] != document  # one token where nothing follows, else two
    with running_server(loaded, tmp_path) as server:
        assert server.keep("report", TEXT).status_code == 201
        assert ask(server) == ask(server, QUESTION, document="report")
        across = f"{TEXT.strip()}\n\n\n"
        assert "ĊĊĊ" in loaded.tokenizer.convert_ids_to_tokens(encoder.texts.ids(across))
        assert ask(server, across) == ask(server, across, document=False)


def test_a_vocabulary_of_characters(tmp_path):
    """It puts a blank before each text: the question's own first token is another one in the prompt."""
    tokenizer = of_characters()
    tokenizer.chat_template = CHAT_TEMPLATE
    with running_server(replace(load_tiny(), tokenizer=tokenizer), tmp_path) as server:
        assert server.keep("report", TEXT).status_code == 201
        named, found = ask(server, QUESTION, document="report"), ask(server)
        assert found[2:] == named[2:] == (server.store.find("report").tokens, "report")
        assert found[1] == named[1] - 1


# What is followed, and what is passed over.


def test_the_folder_is_followed(server, spare, monkeypatch):
    """The longest document is taken, of the same text the first by name; each file is looked at once."""
    read: list[str] = []
    look = prefixes.document_tokens
    monkeypatch.setattr(prefixes, "document_tokens", lambda path, origin: read.append(path.name) or look(path, origin))
    assert ask(server)[3] == "report"
    assert read == []  # it has been, by a test before
    longer = put(server, spare, "longer", f"{TEXT.strip()}\n\n{QUESTION}")
    twin = put(server, spare, "another", TEXT.strip())
    more = f"{ABOUT}\n\n{QUESTION}"
    for _ in range(3):
        assert ask(server, more)[3] == "longer"
        assert ask(server)[3] == "another"
    assert sorted(read) == ["another.kv.safetensors", "longer.kv.safetensors"]
    longer.unlink()
    assert ask(server, more)[3] == "another"
    shutil.copy(put(server, spare, "unlike", OTHER.strip()), twin)  # in place
    assert ask(server, more)[3] == "report"
    assert ask(server, f"{OTHER.strip()}\n\n{QUESTION}")[3] == "another"
    for name in ("another", "unlike"):
        assert server.http.delete(f"/v1/documents/{name}").status_code == 200
    assert ask(server, f"{OTHER.strip()}\n\n{QUESTION}")[3] is None


def test_documents_that_the_model_cannot_go_on_from_are_passed_over(server, spare, tmp_path, caplog):
    """Of another model, with a second tier, without token ids, no document at all, or with an answer in it already."""
    loaded, _ = spare
    text = f"{OTHER.strip()}\n\n{QUESTION}"
    other = load_tiny(seed=3)
    put(server, (other, tmp_path), "theirs", OTHER.strip())
    put(server, spare, "tiered", OTHER.strip(), method="clusterkv")
    plan = make_plan(loaded.model, None, method="snapkv", budget=40)
    unknown = compress_document(loaded, OTHER.strip(), plan).with_tokens(None)
    save_document(unknown, server.store.path("unknown"), loaded)
    server.store.path("broken").write_bytes(b"x" * 100)
    turns = [("user", text), ("assistant", "Her brother."), ("user", "Why?")]
    encoder, kept = PromptEncoder(loaded.tokenizer), HeadCache(plan)
    ids = encoder.chat_ids(turns)[: -len(encoder.question_ids("Why?"))]
    with attending_ragged(loaded.model), torch.no_grad():
        prefill(loaded.model, torch.tensor([ids]), kept)
    save_document(kept, server.store.path("kept"), loaded)
    try:
        assert ask(server, text) == ask(server, text, document=False)
        messages = [{"role": role, "content": each} for role, each in turns]
        response = server.post("/v1/chat/completions", messages=messages, max_tokens=3)
        assert said(response)[2:] == (0, None)
        assert "is read without it" not in caplog.text  # as one that fails later is
    finally:
        for name in ("theirs", "tiered", "unknown", "broken", "kept"):
            server.store.path(name).unlink()


def test_a_document_that_turns_out_to_be_of_no_use_is_left_away(server, spare, monkeypatch, caplog):
    """Damage to its rows shows when they are read: once."""
    text = f"{OTHER.strip()}\n\n{QUESTION}"
    path = put(server, spare, "damaged", OTHER.strip())
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
    tries: list[Path] = []
    load = memory.document_cache
    monkeypatch.setattr(
        memory, "document_cache", lambda loaded, path, how: tries.append(path) or load(loaded, path, how)
    )
    expected = ask(server, text, document=False)
    for _ in range(2):
        assert ask(server, text) == expected
    assert tries == [path] and "damaged" in caplog.text
    assert server.chat(QUESTION, document="damaged").status_code == 400  # which is asked for by its name
    path.unlink()


def test_a_document_that_is_replaced_while_a_question_waits_is_left_away(server, spare, monkeypatch):
    path = put(server, spare, "going", OTHER.strip())
    new = put(server, spare, "coming", OTHER.strip().replace("1907", "1908"))
    load = memory.document_cache

    def replace_and_load(loaded, path, how):
        shutil.move(new, path)
        return load(loaded, path, how)

    monkeypatch.setattr(memory, "document_cache", replace_and_load)
    text = f"{OTHER.strip()}\n\n{QUESTION}"
    assert ask(server, text) == ask(server, text, document=False)
    path.unlink()


def test_a_document_that_has_no_room_is_left_away(tmp_path, spare):
    """Beside the rows that it would need itself, the prompt has none."""
    loaded, _ = spare
    with running_server(load_tiny(), tmp_path, memory=280_000) as small:
        plan = make_plan(loaded.model, None, method="full")
        save_document(compress_document(loaded, TEXT.strip() * 3, plan), small.store.path("large"), loaded)
        text = f"{TEXT.strip() * 3}\n\n{QUESTION}"
        assert small.chat(QUESTION, document="large", max_tokens=12).json()["error"]["code"] == "memory_exceeded"
        assert ask(small, text) == ask(small, text, document=False)


# Finding, beside its slow twin.

WORDS = ["a", "aa", "b", "ab", "\n", "\n\n", ""]
SPELLED = [word.encode() for word in WORDS]
IDS = st.lists(st.integers(0, len(WORDS) - 1), max_size=7)


class Letters:
    """Spells token ids as words; `Store` has documents of such ids."""

    def spelled(self, ids):
        return [SPELLED[token] for token in ids]

    def is_answered(self, spelling):
        return b"bab" in spelling


class Store:
    def __init__(self, documents):
        self.documents = documents

    def stamps(self):
        return {name: (hash(tuple(ids)), 0, 0) for name, ids in self.documents.items()}

    def find(self, name):
        return SavedDocument(name, Path(name), "", "", len(self.documents[name]), 0, self.stamps()[name], 0)


def found_slowly(documents, ids):
    """By looking at every document and every place of the prompt."""
    best = None
    for name, own in sorted(documents.items()):
        text = "".join(WORDS[token] for token in own)
        for count in range(1, len(ids)):
            at = "".join(WORDS[token] for token in ids[:count])
            ends_here = count == len(ids) - 1 or WORDS[ids[count]] != ""
            if text and at == text and ends_here and "bab" not in text and (best is None or len(text) > best[0]):
                best = len(text), name, count
    return best and best[1:]


@given(st.dictionaries(st.sampled_from("xyzuvw"), IDS, max_size=6), st.lists(IDS, max_size=4))
def test_the_longest_document_is_found_as_by_comparing_all(documents, prompts):
    store = Store(documents)
    index = DocumentPrefixes(store, None, Letters(), 10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "document_tokens", lambda path, _: store.documents[path.name])
        patch.setattr(SavedDocument, "is_as_found", True)
        begun_with = [[*own, *end] for own, end in itertools.product(documents.values(), ([0], [4, 2]))]
        for ids in [*prompts, *begun_with]:
            found = index.find(ids)
            assert (found and (found.document.name, found.tokens)) == found_slowly(documents, ids)
            if found is not None:
                index.pass_over(found.document)
                assert index.find(ids) != found
                store.documents.pop(found.document.name)


@given(st.text(alphabet="ab \n<|end|>é😀", max_size=30), st.integers(0, 30))
def test_a_text_is_spelled_alike_wherever_it_is_parted(text, place):
    texts = PromptEncoder(load_tokenizer()).texts
    parted = [*texts.ids(text[:place]), *texts.ids(text[place:])]
    assert b"".join(texts.spelled(texts.ids(text))) == b"".join(texts.spelled(parted))


def test_no_text_is_spelled_as_a_control_token():
    texts = PromptEncoder(load_tokenizer()).texts
    written, control = texts.ids(EOS), texts.ids(EOS, [(0, len(EOS))])
    assert written != control and b"".join(texts.spelled(written)) == EOS.encode()
    assert b"".join(texts.spelled(control)) != EOS.encode()


def load_tokenizer(known=[]):  # noqa: B006
    if not known:
        known.append(merging_line_ends(TEXT))
    return known[0]
