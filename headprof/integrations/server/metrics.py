"""What the server says of itself to Prometheus."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SPAN = 10.0
"""Seconds over which tokens per second are counted."""
_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counts of one server. The worker's thread and the event loop both write to them."""

    def __init__(self, memory_limit: int) -> None:
        self.registry = own = CollectorRegistry()
        self._requests = Counter("headprof_requests", "Responses by path and status", ["path", "status"], registry=own)
        self._read = Counter("headprof_prompt_tokens", "Tokens of prompts that were read", registry=own)
        self._written = Counter("headprof_completion_tokens", "Tokens that were generated", registry=own)
        self._cancelled = Counter("headprof_cancelled", "Requests that their clients left", registry=own)
        self._rate = Gauge("headprof_tokens_per_second", f"Tokens generated, over {_SPAN:g} seconds", registry=own)
        self._bytes = Gauge("headprof_cache_bytes", "Bytes of caches, by what holds them", ["of"], registry=own)
        limit = Gauge("headprof_cache_bytes_limit", "Most bytes that may be set aside for caches", registry=own)
        self._queue = Gauge("headprof_queue_length", "Requests that wait to begin", registry=own)
        self._batch = Gauge("headprof_batch_size", "Answers whose tokens are generated together", registry=own)
        self._first = Histogram("headprof_time_to_first_token_seconds", "From arrival", buckets=_FIRST, registry=own)
        self._between = Histogram("headprof_time_between_tokens_seconds", "In answers", buckets=_BETWEEN, registry=own)
        self._recent: deque[float] = deque()
        limit.set(memory_limit)
        self._rate.set_function(self._tokens_per_second)

    def response(self, path: str, status: int) -> None:
        """A request has been answered, or refused."""
        self._requests.labels(path, str(status)).inc()

    def token(self, seconds: float, *, first: bool) -> None:
        """A token has come, so long after the one before it, or after the request."""
        self._written.inc()
        self._recent.append(time.monotonic())
        while self._recent and self._recent[0] < time.monotonic() - _SPAN:
            self._recent.popleft()
        (self._first if first else self._between).observe(seconds)

    def answered(self, prompt_tokens: int) -> None:
        """An answer is complete, to a prompt of which so many tokens were read."""
        self._read.inc(prompt_tokens)

    def cancelled(self) -> None:
        """A client has left."""
        self._cancelled.inc()

    def holds(self, *, requests: int, documents: int, reserved: int) -> None:
        """Bytes that are held by requests and by saved documents in memory, and those that are set aside."""
        for name, count in {"requests": requests, "documents": documents, "reserved": reserved}.items():
            self._bytes.labels(name).set(count)

    def load(self, *, waiting: int, running: int) -> None:
        """How many requests wait, and how many are being answered."""
        self._queue.set(waiting)
        self._batch.set(running)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _tokens_per_second(self) -> float:
        since = time.monotonic() - _SPAN
        return sum(moment >= since for moment in tuple(self._recent)) / _SPAN
