"""The server over HTTP: real clients against a real server on loopback, with a tiny model."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from starlette.requests import Request
from support.servers import running_server
from support.tiny_models import load_tiny

from headprof.compression.document import save_document
from headprof.compression.encoding import prompt_ids
from headprof.compression.generation import ask, compress_document, generate_text
from headprof.compression.prompts import document_cache
from headprof.compression.session import make_plan
from headprof.integrations.server import batch, worker
from headprof.integrations.server.app import Limits
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils import files

TEXT = "The lighthouse keeper counted nine grey boats before breakfast, and her brother sold rope in the harbor. " * 3
QUESTION = "Who sold rope, and what is the code of the green door? " * 3


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture(scope="module")
def server(loaded, tmp_path_factory):
    with running_server(loaded, tmp_path_factory.mktemp("documents")) as running:
        assert running.keep("report", TEXT).status_code == 201
        yield running


@pytest.fixture
def gate(monkeypatch):
    """Steps of answers wait for this to be set."""
    opened, step = threading.Event(), batch.Batch.step

    def wait(own):
        if opened.is_set():
            step(own)
        else:
            time.sleep(0.005)

    monkeypatch.setattr(batch.Batch, "step", wait)
    yield opened
    opened.set()


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error that a response is, in OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".") and "\n" not in body["error"]["message"]
    return body["error"]


def alone(server, question: str, max_tokens: int, document: str | None = None, **options):
    """What `headprof generate` makes of a prompt, in text and numbers."""
    loaded = server.served.loaded
    if server.server.worker.is_alive:  # which holds the model
        loaded = load_tiny()
    if document is not None:
        cache, _ = document_cache(loaded, server.store.find(document).path, {})
        return ask(loaded, cache, question, max_new_tokens=max_tokens, **options)
    ids = prompt_ids(loaded, None, question, max_tokens)
    return generate_text(loaded, ids, server.served.prompt_plan, max_new_tokens=max_tokens, **options)


def wait_until(true, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "this has not come about"
        time.sleep(0.02)


# Answers.


@pytest.mark.parametrize("document", [None, "report"])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_is_that_of_generate(server, document, sampled):
    options = {"temperature": 0.7, "seed": 11} if sampled else {}
    expected = alone(server, QUESTION, 40, document, **options)
    extra = {"document": document} if document else {}
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": server.model, "messages": messages, "max_tokens": 40, **options, "extra_body": extra}
    said = server.openai.chat.completions.create(**asked)
    assert said.choices[0].message.content == expected.text
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert said.usage.prompt_tokens_details.cached_tokens == expected.cached_tokens
    stream = list(server.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert stream[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == expected.text and len([text for text in texts if text]) > 3
    reason = "length" if expected.new_tokens == 40 else "stop"
    assert stream[-2].choices[0].finish_reason == said.choices[0].finish_reason == reason
    assert stream[-1].choices == [] and stream[-1].usage == said.usage


def test_completions_continue_a_text_as_it_is(server):
    loaded = load_tiny()
    ids = torch.tensor([loaded.tokenizer(TEXT, add_special_tokens=False).input_ids])
    expected = generate_text(loaded, ids, server.served.prompt_plan, max_new_tokens=16)
    said = server.openai.completions.create(model=server.model, prompt=TEXT, logprobs=2)
    assert said.choices[0].text == expected.text and said.usage.completion_tokens == 16
    told = said.choices[0].logprobs
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert expected.text[offset:].startswith(token) or token.startswith("bytes:\\x")
    assert all(len(each) <= 2 for each in told.top_logprobs) and max(told.token_logprobs) <= 0
    about = server.openai.completions.create(model=server.model, prompt="Who?", extra_body={"document": "report"})
    assert about.choices[0].text == alone(server, "Who?", 16, "report").text


def test_logprobs_are_those_of_the_model(server):
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    choice = server.post("/v1/chat/completions", **asked).json()["choices"][0]
    text, whole = choice["message"]["content"], choice["logprobs"]["content"]
    assert len(whole) == 12 and bytes(byte for each in whole for byte in each["bytes"] or []) == text.encode()
    for each in whole:  # greedy decoding takes the likeliest
        assert each["top_logprobs"][0]["logprob"] == each["logprob"] <= 0
        assert [top["logprob"] for top in each["top_logprobs"]] == sorted(
            (top["logprob"] for top in each["top_logprobs"]), reverse=True
        )
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"model": server.model, "stream": True} | asked
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0]["logprobs"] for line in lines[:-1]]
    assert [each for chunk in chunks for each in chunk["content"]] == whole


def test_logprobs_are_told_of_every_token_but_the_end(server, monkeypatch):
    """Also of a last one that has no text, as special tokens do, and not of the end beside text that was held back."""
    said: list[int] = []
    text = alone(server, QUESTION, 8, on_ids=said.extend).text
    asked = {"max_tokens": 8, "logprobs": True}
    loaded = server.served.loaded
    config = loaded.model.generation_config
    decode = type(loaded.tokenizer).decode
    with monkeypatch.context() as patch:
        patch.setattr(
            type(loaded.tokenizer),
            "decode",
            lambda own, ids, **how: decode(own, [i for i in ids if i != said[7]], **how),
        )
        whole = server.chat(QUESTION, **asked).json()["choices"][0]
    assert len(whole["logprobs"]["content"]) == 8
    monkeypatch.setattr(config, "eos_token_id", [said[4]])
    held = server.chat(QUESTION, stop=[text[:20] + "never said"], **asked).json()["choices"][0]
    assert len(held["logprobs"]["content"]) == 4 and held["finish_reason"] == "stop"


@pytest.mark.parametrize("cleans_up", [False, True])
def test_logprobs_end_with_the_token_in_which_a_stop_text_begins(server, monkeypatch, cleans_up):
    monkeypatch.setattr(server.served.loaded.tokenizer, "clean_up_tokenization_spaces", cleans_up)
    full = server.chat(QUESTION, max_tokens=40, logprobs=True).json()["choices"][0]
    text, tokens = full["message"]["content"], full["logprobs"]["content"]
    for place in (len(text) // 3, len(text) // 2):
        stop = text[place : place + 4]
        cut = len(text[: text.index(stop)].encode())
        said = server.chat(QUESTION, max_tokens=40, logprobs=True, stop=stop).json()["choices"][0]
        starts = [sum(len(each["bytes"] or []) for each in tokens[:number]) for number in range(len(tokens))]
        assert said["logprobs"]["content"] == tokens[: sum(start < cut for start in starts)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(server, stream):
    full = text_of(server.chat(QUESTION, max_tokens=40))
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    said = server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        stop=["never said", stop],
        stream=stream,
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in said]
        text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        text, reason = said.choices[0].message.content, said.choices[0].finish_reason
    assert text == full[: full.index(stop)] and reason == "stop"


def test_an_end_of_the_model_is_a_stop(server, monkeypatch):
    full = alone(server, QUESTION, 8)
    said: list[int] = []
    alone(server, QUESTION, 8, on_ids=said.extend)
    monkeypatch.setattr(server.served.loaded.model.generation_config, "eos_token_id", [said[4]])
    answer = server.chat(QUESTION, max_tokens=8).json()
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 5
    assert full.text.startswith(text_of(server.chat(QUESTION, max_tokens=4)))


def test_requests_that_arrive_together_get_what_each_gets_alone(server, gate):
    """Plain prompts and questions about a document, of many lengths, greedy and sampled, joining and leaving."""
    asked = [
        (
            f"{'What is it? ' * (1 + 5 * (number % 3))}{number}",
            5 + 4 * number,
            "report" if number % 2 else None,
            number % 3,
        )
        for number in range(8)
    ]
    expected = [
        alone(server, text, count, document, **({"temperature": 0.9, "seed": count} if sampled == 2 else {})).text
        for text, count, document, sampled in asked
    ]

    def send(request):
        text, count, document, sampled = request
        body = {"temperature": 0.9, "seed": count} if sampled == 2 else {}
        return text_of(server.chat(text, max_tokens=count, **body, **({"document": document} if document else {})))

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(send, each) for each in asked]
        wait_until(lambda: server.metric("headprof_batch_size") == 8)
        gate.set()
        assert [answer.result() for answer in answers] == expected


def test_a_conversation_about_a_document(server):
    turns = [("user", "Who?"), ("assistant", "Her brother."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    said = server.post("/v1/chat/completions", messages=messages, document="report", max_tokens=4)
    assert said.status_code == 200
    loaded = server.served.loaded
    whole = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{TEXT.strip()}\n\nWho?"}, *messages[1:]],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = said.json()["usage"]["prompt_tokens"]
    assert abs(tokens - len(loaded.tokenizer(whole, add_special_tokens=False).input_ids)) <= 4  # where texts are parted
    for refused in ([("system", "x"), *turns], turns[:2], [("user", "a"), ("user", "b")]):
        body = [{"role": role, "content": text} for role, text in refused]
        error_of(server.post("/v1/chat/completions", messages=body, document="report"), 400)


def test_an_answer_can_be_sent_back_as_it_came(server):
    messages = [{"role": "user", "content": "Who?"}]
    for _ in range(2):
        said = server.openai.chat.completions.create(model=server.model, messages=messages, max_tokens=3)
        messages += [said.choices[0].message, {"role": "user", "content": "Why?"}]
    assert said.usage.prompt_tokens > 30


# What is refused.


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", b"{", 400, "invalid_json"),
        ("/v1/chat/completions", b'{"model": "tiny-llama"}', 400, "missing_parameter"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}]}', 400, "missing_parameter"),
        ("/v1/completions", b'{"model": "gpt", "prompt": "x"}', 404, "model_not_found"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": ""}', 400, "invalid_value"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": 5}', 400, "invalid_value"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": "x", "prompt": "x"}', 400, "invalid_json"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": "x", "echo": true}', 400, "unsupported_parameter"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": "x", "document": "no"}', 404, "document_not_found"),
        ("/v1/completions", b'{"model": "tiny-llama", "prompt": "x", "document": "../x"}', 400, "invalid_document_id"),
        (
            "/v1/completions",
            b'{"model": "tiny-llama", "prompt": "x", "max_tokens": 9999}',
            400,
            "context_length_exceeded",
        ),
        ("/v1/documents", b'{"id": "../x", "text": "x"}', 400, "invalid_document_id"),
        ("/v1/documents", b'{"id": "report", "text": "x"}', 409, "document_exists"),
        ("/v1/documents", b'{"id": "new", "text": "  "}', 400, "invalid_value"),
        ("/v1/documents", b'{"id": "new"}', 400, "missing_parameter"),
        ("/v1/documents", b'{"id": "new", "text": "x", "budget": 5}', 400, "unsupported_parameter"),
        ("/v1/embeddings", b"{}", 404, "not_found"),
        ("/v1/models", b"{}", 405, "method_not_allowed"),
        ("/v1/completions/", b"{}", 404, "not_found"),
    ],
)
def test_bad_requests(server, path, body, status, code):
    assert error_of(server.http.post(path, content=body), status)["code"] == code


@pytest.mark.parametrize(("count", "text"), [(4097, ""), (40_000, "a"), (90, "word " * 400)])
def test_too_many_messages_are_refused_before_any_is_encoded(server, monkeypatch, count, text):
    monkeypatch.setattr(PromptEncoder, "chat_ids", lambda *_: pytest.fail("They were encoded."))
    body = {"model": server.model, "messages": [{"role": "user", "content": text}] * count}
    error = error_of(server.http.post("/v1/chat/completions", json=body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


def test_a_document_that_is_too_long_is_refused_at_once(server):
    error = error_of(server.keep("long", "word " * 9000), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "text"


@pytest.mark.parametrize(
    "path", ["/v1/documents/..%2fsecret", "/v1/documents/%2e%2e", "/v1/documents/a%00b", "/v1/documents/no"]
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_no_path_leaves_the_folder(server, path, method):
    assert server.http.request(method, path).status_code in (400, 404)


def test_documents_are_listed_and_deleted(server):
    made = server.keep("another", TEXT[:200])
    assert made.status_code == 201
    listed = server.http.get("/v1/documents").json()["data"]
    assert [each["id"] for each in listed] == ["another", "report"] and listed[0] == made.json()
    assert server.http.get("/v1/documents/another").json() == made.json()
    assert text_of(server.chat("Who?", document="another", max_tokens=3))
    held = server.metric('headprof_cache_bytes{of="documents"}')
    assert server.http.delete("/v1/documents/another").json()["deleted"] is True
    wait_until(lambda: server.metric('headprof_cache_bytes{of="documents"}') < held)
    error_of(server.http.get("/v1/documents/another"), 404)
    error_of(server.chat("Who?", document="another"), 404)


def test_a_compressed_body_is_refused(server):
    headers = {"Content-Encoding": "gzip"}
    answer = server.http.post("/v1/completions", content=gzip.compress(b"{}"), headers=headers)
    assert error_of(answer, 415)["code"] == "unsupported_encoding"


def test_pages_of_other_sites_are_refused_where_no_key_is_asked_for(server):
    port = server.http.base_url.port
    for headers, status in (
        ({"Host": f"localhost:{port}", "Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://example.com"}, 403),
        ({"Host": "rebound.example.com"}, 403),
    ):
        answer = server.http.get("/v1/models", headers=headers)
        assert answer.status_code == status
        assert status == 200 or error_of(answer, 403)["code"] == "foreign_origin"


def test_a_document_that_goes_at_the_wrong_moment_is_not_found(server, monkeypatch):
    """Whoever deletes it while it is looked at, deleted or just made."""
    name, store = "gone", server.store
    monkeypatch.setattr(store, "_is_own", lambda path: True)
    for refused in (server.http.delete(f"/v1/documents/{name}"), server.http.get(f"/v1/documents/{name}")):
        assert error_of(refused, 404)["code"] == "document_not_found"
    monkeypatch.undo()
    find = store.find
    monkeypatch.setattr(store, "find", lambda *about: store.delete(name) or find(*about))
    assert error_of(server.keep(name, TEXT[:200]), 409)["code"] == "document_deleted"


def test_a_document_that_goes_while_a_question_waits_is_not_found(server, gate, monkeypatch):
    """It is deleted after the question has come, and before its turn."""
    assert server.keep("going", TEXT[:200]).status_code == 201
    begun, begin = threading.Event(), worker.Worker._begin_next
    monkeypatch.setattr(worker.Worker, "_begin_next", lambda own: begun.wait(20) and begin(own))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, "Who?", document="going")
        wait_until(lambda: len(server.server.worker._waiting) == 1)
        assert server.http.delete("/v1/documents/going").status_code == 200
        begun.set()
        assert error_of(asked.result(), 404)["code"] == "document_not_found"


def test_a_document_of_another_model_is_refused_in_a_sentence(server, tmp_path, caplog):
    other = load_tiny(seed=3)
    with running_server(other, tmp_path) as elsewhere:
        assert elsewhere.keep("theirs", TEXT).status_code == 201
    shutil.copy(tmp_path / "theirs.kv.safetensors", server.store.folder)
    error = error_of(server.chat("Who?", document="theirs"), 400)
    assert error["code"] == "document_unusable" and "made with another model" in error["message"]
    assert str(server.store.folder) not in error["message"] and str(server.store.folder) in caplog.text
    (server.store.folder / "theirs.kv.safetensors").unlink()


def test_a_document_that_brings_rows_back_is_refused_in_a_sentence(server):
    loaded = load_tiny()  # the server's own is its thread's
    plan = make_plan(loaded.model, None, method="clusterkv", budget=40)
    path = server.store.folder / "tiered.kv.safetensors"
    save_document(compress_document(loaded, TEXT, plan), path, loaded)
    error = error_of(server.chat("Who?", document="tiered"), 400)
    assert error["code"] == "unsupported_document" and "second tier" in error["message"]
    path.unlink()


def test_a_full_disk_leaves_nothing(server, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_commit", refuse)
    before = sorted(server.store.folder.iterdir())
    error = error_of(server.keep("full", TEXT), 507)
    assert "no space left" in error["message"] and "--cache-dir" in error["message"]
    assert str(server.store.folder) not in error["message"]
    assert sorted(server.store.folder.iterdir()) == before
    error_of(server.http.get("/v1/documents/full"), 404)


def test_a_failure_inside_is_told_without_its_traceback(server, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret path")

    monkeypatch.setattr(worker, "begin_answer", fail)
    assert "secret" not in error_of(server.chat("Hello"), 500)["message"]
    monkeypatch.undo()
    assert text_of(server.chat("Hello", max_tokens=2))


# Limits.


@pytest.fixture(scope="module")
def limited(loaded, tmp_path_factory):
    limits = Limits(timeout=1.5, max_request_bytes=4000, api_key="geheim")
    other = load_tiny()
    with running_server(other, tmp_path_factory.mktemp("limited"), limits, max_batch=1, max_queue=1) as running:
        running.http.headers["Authorization"] = "Bearer geheim"
        yield running


def test_a_key_is_asked_for(limited):
    for key in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic geheim"}):
        for path in ("/v1/models", "/v1/documents", "/metrics"):
            assert error_of(httpx.get(f"{limited.url}{path}", headers=key), 401)["code"] == "invalid_api_key"
    assert httpx.get(f"{limited.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        limited.openai.models.list()
    with openai.OpenAI(base_url=f"{limited.url}/v1", api_key="geheim", max_retries=0) as client:
        assert client.models.list().data[0].id == limited.model


def test_a_body_that_is_too_large(limited):
    assert error_of(limited.chat("x" * 5000), 413)["code"] == "request_too_large"
    parts = (b"x" * 1000 for _ in range(9))  # of which the size is not said before
    assert error_of(limited.http.post("/v1/completions", content=parts), 413)["code"] == "request_too_large"


def test_a_body_that_does_not_come(limited):
    with socket.create_connection(("127.0.0.1", int(limited.url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer geheim\r\nContent-Length: 100\r\n\r\n{"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_and_a_late_answer(limited, gate):
    """One is being answered, one waits, and a third is refused; neither of the first two is done in time."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(limited.chat, "Hello", max_tokens=50)
        wait_until(lambda: limited.metric("headprof_time_to_first_token_seconds_count") >= 1)
        second = pool.submit(limited.chat, "Hello", max_tokens=50)
        wait_until(lambda: len(limited.server.worker._waiting) == 1)
        refused = limited.chat("Hello")
        assert error_of(refused, 429)["code"] == "queue_full" and refused.headers["retry-after"] == "1"
        time.sleep(1.6)
        gate.set()
        for late in (first, second):
            assert error_of(late.result(), 504)["type"] == "timeout_error"


def test_a_late_stream_says_so(limited, gate):
    threading.Timer(1.6, gate.set).start()
    body = {"model": limited.model, "prompt": "Hello", "stream": True, "max_tokens": 500}
    with limited.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


# Clients that leave, and memory.


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_that_leaves_held_is_free_again(server, gate, stream):
    wait_until(lambda: server.metric("headprof_batch_size") == 0)
    left = server.metric("headprof_cancelled_total")
    body = {"model": server.model, "prompt": TEXT, "stream": stream, "max_tokens": 3500}
    request = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request)}\r\n\r\n"
        client.sendall(head.encode() + request)
        wait_until(lambda: server.metric('headprof_cache_bytes{of="requests"}') > 0)
    wait_until(lambda: server.metric("headprof_batch_size") == 0)
    assert server.metric('headprof_cache_bytes{of="requests"}') == 0
    assert server.metric("headprof_cancelled_total") == left + 1


def test_memory_has_a_cap(tmp_path, gate):
    """A request that can never fit is refused, one that does not fit now waits, and a document goes for others."""
    other = load_tiny()
    with running_server(other, tmp_path, memory=700_000, max_batch=8) as small:
        assert small.keep("report", TEXT).status_code == 201
        error = error_of(small.chat("word " * 900, max_tokens=4), 400)
        assert error["code"] == "memory_exceeded" and "--memory" in error["message"]
        gate.set()
        assert text_of(small.chat("Who?", document="report", max_tokens=3))
        wait_until(lambda: small.metric('headprof_cache_bytes{of="documents"}') > 0)
        gate.clear()
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(small.chat, QUESTION, max_tokens=20) for _ in range(6)]
            wait_until(lambda: small.metric("headprof_time_to_first_token_seconds_count") >= 2)
            gate.set()
            texts = {text_of(answer.result()) for answer in answers}
        assert len(texts) == 1
        wait_until(lambda: small.metric("headprof_batch_size") == 0)
        assert small.metric('headprof_cache_bytes{of="reserved"}') <= 700_000


def test_a_server_that_is_to_end_finishes_within_its_time(tmp_path, gate):
    other = load_tiny()
    with running_server(other, tmp_path) as ending, ThreadPoolExecutor(2) as pool:
        short, long = (pool.submit(ending.chat, "Hello", max_tokens=count) for count in (3, 3000))
        wait_until(lambda: len(ending.server.worker._batch) == 2)
        ending.server.worker.drain(2.0)
        gate.set()
        assert text_of(short.result())
        gate.clear()  # or the model might end the long one by itself in time
        error_of(ending.chat("Hello"), 503)
        assert error_of(long.result(), 503)["code"] == "shutting_down"


def test_a_request_that_the_end_cuts_off_is_told_so(server):
    async def cut_off(request):
        raise asyncio.CancelledError

    asked = Request({"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]})
    response = asyncio.run(server.server._guarded("/", cut_off)(asked))
    assert response.status_code == 503 and b"shutting_down" in response.body


def test_curl(server):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    body = json.dumps({"model": server.model, "prompt": "Hello", "max_tokens": 4, "stream": True})
    said = subprocess.run(
        ["curl", "-sN", f"{server.url}/v1/completions", "-d", body], capture_output=True, timeout=60, check=True
    )
    assert said.stdout.endswith(b"data: [DONE]\n\n") and said.stdout.startswith(b'data: {"id": "cmpl-')


def test_metrics_add_up(server):
    before = server.metric("headprof_completion_tokens_total")
    read = server.metric("headprof_prompt_tokens_total")
    usage = server.chat(QUESTION, max_tokens=7).json()["usage"]
    assert server.metric("headprof_completion_tokens_total") == before + usage["completion_tokens"]
    assert server.metric("headprof_prompt_tokens_total") == read + usage["prompt_tokens"]
    assert server.metric('headprof_requests_total{path="/v1/chat/completions",status="200"}') >= 1
