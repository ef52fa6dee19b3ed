"""What clients are answered while the model is being loaded: 503, at once, whatever they ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

from headprof.integrations.server.errors import ApiError

_SLOWEST = 5.0
"""Seconds in which a request has to come."""
_READ, _PART = 2**26, 2**20
"""Bytes of its body that are read, part by part, since a client may write all of it before it looks for an answer."""


class _NotYet(BaseHTTPRequestHandler):
    timeout = _SLOWEST

    def do_GET(self) -> None:
        left = min(_READ, self._length())
        while left > 0 and (read := self.rfile.read(min(_PART, left))):
            left -= len(read)
        error = ApiError(503, "The model is being loaded: ask again soon.", code="loading")
        said = {"status": "the model is being loaded"} if self.path == "/health" else error.body
        data = json.dumps(said).encode()
        self.send_response(error.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), "Retry-After": 1}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_GET

    def _length(self) -> int:
        given = self.headers.get("Content-Length", "")
        return int(given) if given.isdecimal() and len(given) < 20 else 0

    def log_message(self, format: str, *args: Any) -> None:
        """There is nothing to tell."""


class _Refusing(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket) -> None:
        super().__init__(("", 0), _NotYet, bind_and_activate=False)
        self.socket.close()
        self.socket = listening

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is none of our faults."""


@contextmanager
def not_yet(listening: socket) -> Iterator[None]:
    """Answer that the model is not there yet; who connects afterwards waits for the server to come."""
    server = _Refusing(listening)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="headprof-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
