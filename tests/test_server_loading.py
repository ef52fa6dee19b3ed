"""What a server answers before its model is there."""

from __future__ import annotations

import socket
from contextlib import closing

import httpx
import pytest

from headprof.integrations.server.loading import not_yet
from headprof.integrations.server.run import listening_socket


@pytest.fixture
def listening():
    with closing(listening_socket("127.0.0.1", 0)) as made:
        yield made


def url(listening) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_every_path_is_refused_at_once(listening):
    with not_yet(listening):
        health = httpx.get(f"{url(listening)}/health")
        assert (health.status_code, health.json()) == (503, {"status": "the model is being loaded"})
        asked = (
            ("POST", "/v1/completions", b"x" * 3_000_000),
            ("GET", "/v1/models", None),
            ("PATCH", "/v1/models", b"x"),
        )
        for method, path, body in asked:
            answer = httpx.request(method, f"{url(listening)}{path}", content=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "loading"
        assert httpx.head(f"{url(listening)}/health").status_code == 503


def test_who_leaves_or_talks_nonsense_stops_nobody(listening, capfd):
    with not_yet(listening):
        for sent in (b"", b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET /"):
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(sent)
        with socket.create_connection(listening.getsockname()):  # which says nothing
            assert httpx.get(f"{url(listening)}/health").status_code == 503
    assert capfd.readouterr().err == ""


def test_afterwards_connections_wait_for_the_server(listening):
    with not_yet(listening):
        pass
    with socket.create_connection(listening.getsockname(), timeout=5) as client:
        client.sendall(b"x")
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.recv(1) == b"x"
