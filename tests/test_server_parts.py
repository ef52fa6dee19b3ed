"""Parts of the server by themselves: stop texts, bodies of requests, documents' names, what requests may hold."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from support.commands import headprof
from support.profiles import judging, random_profile
from support.tiny_models import load_tiny

from headprof.compression.answering import Choosing, begin_answer, next_logits
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.together import TogetherCache
from headprof.compression.generation import compress_document, generate_text
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import UsageError
from headprof.integrations.server.admission import answer_bytes, prompt_footprint
from headprof.integrations.server.asked import AskedReader
from headprof.integrations.server.bodies import ChatBody, CompletionBody, DocumentBody, read_body
from headprof.integrations.server.documents import DocumentStore
from headprof.integrations.server.errors import ApiError
from headprof.integrations.server.incoming import _is_here, check_key
from headprof.integrations.server.stopping import StopText
from headprof.models.prompt_encoder import PromptEncoder

LETTERS = st.text("abc", max_size=12)


def cut_slowly(text: str, stops: list[str]) -> str:
    """The text up to the stop text that is complete first, looked for at every character."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)]
    return text


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_alike_however_the_text_comes(pieces, stops):
    stop = StopText(stops)
    said = [stop.add(piece) for piece in pieces]
    text = "".join(said) + stop.end()
    assert text == cut_slowly("".join(pieces), stops)
    assert stop.found == (text != "".join(pieces) or any(each in "".join(pieces) for each in stops))


def test_only_what_may_begin_a_stop_text_is_held_back():
    stop = StopText(["END"])
    assert [stop.add(piece) for piece in ("some E", "N", "O, so", "EN", "D more")] == ["some ", "", "ENO, so", "", ""]
    assert stop.found and stop.end() == ""


def body(kind, **values):
    return read_body(kind, json.dumps({"model": "m"} | values).encode())


HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    "values",
    [
        {
            "n": 1,
            "frequency_penalty": 0.0,
            "presence_penalty": 0,
            "logit_bias": {},
            "response_format": {"type": "text"},
        },
        {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": None, "stop": None, "tool_choice": "none"},
        {"temperature": 1, "top_p": 0.5, "seed": 3, "stop": "x", "max_completion_tokens": 5},
        {"stream": True, "stream_options": {"include_usage": None}},
    ],
)
def test_parameters_that_ask_for_nothing_are_taken(values):
    assert body(ChatBody, **HELLO, **values).messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"echo": True}, "echo"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"seed": "x"}, "seed"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"top_logprobs": 3}, None),
        ({"max_tokens": 3, "max_completion_tokens": 3}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed"),
        ({"document": 5}, "document"),
        ({"document": True}, "document"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": None}, "messages"),
    ],
)
def test_what_would_be_answered_otherwise_is_refused(values, param):
    with pytest.raises(ApiError) as refused:
        body(ChatBody, **(HELLO | values))
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b'"text"', b"{", b'{"model": NaN}', b"[" * 5000, b'{"a": ' * 100, b"\xff\xfe", b'{"x": 1e999}'),
        *(b'{"model": "a", "model": "a"}', b'{"messages": [{"role": "user", "content": "", "content": ""}]}'),
    ],
)
def test_a_body_that_is_no_json_object(data):
    with pytest.raises(ApiError) as refused:
        read_body(ChatBody, data)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3:8000", True),
        ("::1", True),
        ("[::1]:8000", True),
        ("localhost:8000", True),
        ("http://localhost:3000", True),
        ("https://[::1]", True),
        ("192.168.0.5", False),
        ("2001:db8::1", False),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com:8000", False),
        ("https://example.com", False),
        ("http://[", False),
        ("null", False),
        ("", False),
    ],
)
def test_what_is_this_machine_seen_from_itself(address, here):
    assert _is_here(address) == here


def test_half_a_character_is_refused():
    with pytest.raises(ApiError, match="half a character"):
        read_body(DocumentBody, rb'{"id": "a", "text": "\ud800"}')


def test_a_message_in_parts_and_a_prompt_in_a_list():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert body(ChatBody, messages=[{"role": "user", "content": parts}]).messages[0].content == "Hello"
    assert body(CompletionBody, prompt=["Hello"]).prompt == "Hello"
    with pytest.raises(ApiError):
        body(CompletionBody, prompt=["Hello", "you"])


@pytest.mark.parametrize("key", ["plain", "schl\u00fcssel", "\u9375", "from-a-file\n", "\udcff"])
def test_a_key_is_compared_by_its_bytes(key):
    def sent(value: bytes) -> Request:
        return Request({"type": "http", "headers": [(b"authorization", b"Bearer " + value)]})

    check_key(sent(key.strip().encode("utf-8", "surrogateescape")), key)
    for wrong in (b"", b"?", b"\xfe", key.strip().encode("utf-8", "replace") + b"?"):
        with pytest.raises(ApiError) as refused:
            check_key(sent(wrong), key)
        assert refused.value.status == 401


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "../a", ".hidden", "-a", "a\\b", "a b", "a\0", "", "ä", "a" * 129, "a\n"]
)
def test_names_that_could_leave_the_folder(tmp_path, name):
    store = DocumentStore(tmp_path / "documents")
    for refused in (store.path, store.find, store.delete, store.require_new):
        with pytest.raises(ApiError) as error:
            refused(name)
        assert (error.value.status, error.value.code) == (400, "invalid_document_id")
    store.close()


def test_links_and_leftovers_are_no_documents(tiny, tmp_path):
    """A link may lead anywhere, and what a killed server has left is half a file."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / ".report.kv.safetensors.0123456789ab.partial").write_bytes(b"half")
    (folder / "broken.kv.safetensors").write_bytes(b"x" * 100)
    secret = tmp_path / "secret.kv.safetensors"
    secret.write_bytes(b"secret")
    (folder / "link.kv.safetensors").symlink_to(secret)
    store = DocumentStore(folder)
    assert store.all() == [] and not list(folder.glob("*.partial")) and not list(folder.glob(".*.partial"))
    for name, code in (("link", "document_not_found"), ("broken", "document_unusable")):
        with pytest.raises(ApiError) as error:
            store.find(name)
        assert error.value.code == code and str(tmp_path) not in error.value.message
    with pytest.raises(ApiError) as error:
        store.delete("link")
    assert error.value.status == 404
    with pytest.raises(ApiError) as error:
        store.require_new("link")
    assert error.value.status == 409 and secret.read_bytes() == b"secret"
    with pytest.raises(UsageError, match="Another server"):
        DocumentStore(folder)
    store.delete("broken")
    store.close()
    DocumentStore(folder).close()


def test_a_folder_that_cannot_be_written_is_refused_with_its_option(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    folder = tmp_path / "chosen with -o"
    with pytest.raises(UsageError, match=r"chosen with -o is denied: .* with --cache-dir"):
        DocumentStore(folder)


def test_a_conversation_is_read_as_the_chat_template_has_it(tiny):
    encoder = PromptEncoder(tiny.tokenizer)
    assert encoder.chat_ids([("user", "Who?")]) == encoder.prompt_ids("Who?")
    with_system = PromptEncoder(tiny.tokenizer, system="Be brief.").prompt_ids("Who?")
    assert encoder.chat_ids([("system", "Be brief."), ("user", "Who?")]) == with_system
    turns = [("user", "Who?"), ("assistant", "Her brother."), ("user", "Why <|end|>?")]
    ids = encoder.chat_ids(turns)
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tiny.tokenizer.decode(ids) == text
    ends = tiny.tokenizer.eos_token_id
    assert ids.count(ends) == 3  # the one that the user wrote is none


def test_a_model_without_a_chat_template_takes_one_message(tiny):
    tiny.tokenizer.chat_template = None
    reader = AskedReader(tiny, 16)
    assert list(reader.read(body(ChatBody, **HELLO), 0).ids) == PromptEncoder(tiny.tokenizer).prompt_ids("Hello")
    with pytest.raises(ApiError, match="no chat template"):
        reader.read(body(ChatBody, messages=[{"role": "system", "content": "x"}, *HELLO["messages"]]), 0)


def test_new_tokens_have_room_in_the_context(tiny):
    reader = AskedReader(tiny, 10**6)
    asked = reader.read(body(ChatBody, **HELLO), 0)
    assert len(asked.ids) + asked.choosing.max_new_tokens == tiny.max_positions
    assert reader.read(body(CompletionBody, prompt="Hello"), 0).choosing.max_new_tokens == 16
    for refused in ({"max_tokens": tiny.max_positions}, {"messages": [{"role": "user", "content": "word " * 9000}]}):
        with pytest.raises(ApiError) as error:
            reader.read(body(ChatBody, **(HELLO | refused)), 0)
        assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_on_its_way_is_that_of_generate(tiny, temperature):
    plan = make_plan(tiny.model, random_profile(tiny.model), budget=40, buffer=8)
    ids = torch.tensor([PromptEncoder(tiny.tokenizer).prompt_ids("Who sold rope? " * 9)])
    expected: list[int] = []
    generate_text(
        tiny, ids, plan, max_new_tokens=40, temperature=temperature, seed=7, on_ids=lambda new: expected.extend(new)
    )
    with attending_ragged(tiny.model), torch.no_grad():
        answer, logits = begin_answer(tiny, ids, HeadCache(plan), Choosing(40, temperature, seed=7))
        while not answer.take(logits):
            logits = next_logits(tiny, None, [answer])
    assert answer.new == expected


UNLIKE = ["full", "headkv-r2", "h2o", "adakv", "headkv-ems", "fastgen", "kvzip", "headkv-r2-int4"]
"""Methods that differ in budgets per head, in columns of rows, in queries that are remembered, in how rows are held."""


@pytest.mark.parametrize(("method", "buffer"), [*((name, 8) for name in UNLIKE), ("headkv-r2", None), ("h2o", 64)])
def test_no_request_holds_more_than_is_set_aside_for_it(tiny, method, buffer):
    """Alone and beside another, a plain prompt and a question about a document, at every token."""
    profile = random_profile(tiny.model)
    plan = make_plan(tiny.model, profile, method=method, budget=24, buffer=buffer, **judging(tiny.model, method))
    prompt = torch.randint(3, 500, (1, 90), generator=torch.Generator().manual_seed(0))
    question, new = prompt[:, :30], 60
    document = compress_document(tiny, "The keeper counted nine grey boats before breakfast. " * 8, plan)
    caches = [HeadCache(plan), stack_caches([document])]
    rows, seen = int(document.lengths.sum()), document.get_seq_length()
    bounds = [
        prompt_footprint(plan, prompt.shape[1], new).lasting,
        answer_bytes(document.plan, rows, seen, question.shape[1], new),
    ]
    most = [0, 0]
    with attending_ragged(tiny.model), torch.no_grad():
        begun = [begin_answer(tiny, *each, Choosing(new)) for each in zip((prompt, question), caches, strict=True)]
        answers = [answer for answer, _ in begun]
        for answer, logits in begun:
            answer.take(logits)
        for turn in range(new - 1):
            together = TogetherCache(caches) if turn % 20 < 8 else None
            if together is None:
                logits = torch.cat([next_logits(tiny, None, [answer]) for answer in answers])
            else:
                logits = next_logits(tiny, together, answers)
                assert together.nbytes <= sum(bounds)
                together.part()
            for number, (answer, own) in enumerate(zip(answers, logits.split(1), strict=True)):
                answer.stop = lambda ids, scores: torch.tensor([False])
                answer.take(own)
                most[number] = max(most[number], answer.cache.nbytes)
    most_apart = 20 if "int4" in method else 6
    for held, bound in zip(most, bounds, strict=True):
        assert held <= bound <= most_apart * held, (most, bounds)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("headprof.integrations.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = headprof(tmp_path, "serve", "--model", "no/such-model", "--method", "snapkv")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "pip install 'headprof[serve]'" in refused.stderr


@settings(max_examples=20)
@given(st.integers(1, 3000), st.integers(1, 500))
def test_more_tokens_never_hold_less(prompt, new):
    plan = _plan()
    smaller, larger = prompt_footprint(plan, prompt + 40, new), prompt_footprint(plan, prompt + 140, new + 50)
    assert smaller.lasting <= larger.lasting and smaller.reading < larger.reading


def _plan(known=[]):  # noqa: B006
    if not known:
        known.append(make_plan(load_tiny().model, method="snapkv", budget=24))
    return known[0]
