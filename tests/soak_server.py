"""Many clients ask one server for a while: is each answer the one that it gets alone, and are all bytes free again?

    make soak, or python tests/soak_server.py [--requests 400] [--clients 8] [--smollm2] [-o FILE]

Questions about three documents and plain prompts, of mixed lengths, greedy and sampled with seeds, some streamed; some
clients leave in the middle, some send what cannot be served. What each answer should be is asked of the server before,
one after the other, which also gives the throughput to compare with.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support.servers import Running, running_server
from support.tiny_models import load_tiny

from headprof.models.loading import load_model

_WORDS = ["lighthouse", "keeper", "nine", "grey", "boats", "before", "breakfast", "brother", "rope", "harbor", "bridge"]
_HELD = 'headprof_cache_bytes{of="requests"}'


@dataclass
class Tally:
    """What came of all requests."""

    answered: int = 0
    wrong: int = 0
    cancelled: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock, repr=False)


def bodies(draw: random.Random, count: int, model: str) -> list[dict[str, Any]]:
    """Different requests, each of which has one right answer."""
    made = []
    for number in range(count):
        words = " ".join(draw.choices(_WORDS, k=draw.randint(3, 120)))
        body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": draw.randint(1, 16)}
        if number % 2:
            body["document"] = f"report{draw.randint(1, 3)}"
        if number % 3 == 0:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": number}
        made.append(body)
    return made


def answer(client: httpx.Client, body: dict[str, Any]) -> tuple[str, int]:
    """The text of an answer that is not streamed, and its tokens."""
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    said = response.json()
    return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]


def stream(client: httpx.Client, body: dict[str, Any], tally: Tally, leave_after: int | None) -> str | None:
    """The text of a streamed answer, with the times at which it came; `None` if its client leaves."""
    start, last, text, pieces = time.monotonic(), None, "", 0
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            if content := choice["delta"].get("content"):
                now = time.monotonic()
                with tally.lock:
                    (tally.first if last is None else tally.between).append(now - (last or start))
                text, last, pieces = text + content, now, pieces + 1
                if leave_after is not None and pieces > leave_after:
                    return None
    return text


def one(client: httpx.Client, number: int, body: dict[str, Any], right: tuple[str, int], tally: Tally) -> None:
    """Send a request: every tenth is malformed, and of every ninth the client leaves."""
    if number % 10 == 7:
        bad = [b"{", json.dumps(body | {"n": 3}).encode(), json.dumps(body | {"document": "../x"}).encode()][number % 3]
        status = client.post("/v1/chat/completions", content=bad).status_code
        with tally.lock:
            tally.refused += status == 400
            tally.failed += [] if status == 400 else [f"a malformed request got {status}"]
        return
    leaves = 2 if number % 9 == 4 else None
    text = stream(client, body, tally, leaves) if leaves or number % 2 else answer(client, body)[0]
    with tally.lock:
        if text is None:
            tally.cancelled += 1
        else:
            tally.answered += 1
            tally.wrong += text != right[0]
            tally.tokens += right[1]


def soak(server: Running, requests: int, clients: int, documents: list[str]) -> dict[str, Any]:
    """All of it, as numbers."""
    for number, text in enumerate(documents, 1):
        assert server.keep(f"report{number}", text).status_code == 201
    asked, tally = bodies(random.Random(1), requests, server.model), Tally()
    with httpx.Client(base_url=server.url, timeout=600) as client:
        start = time.monotonic()
        alone = [answer(client, body) for body in asked]
        seconds_alone, tokens_alone = time.monotonic() - start, sum(tokens for _, tokens in alone)
        wait_until_idle(server)
        at_start = server.metric('headprof_cache_bytes{of="reserved"}')

        def send(number: int) -> None:
            try:
                one(client, number, asked[number], alone[number], tally)
            except Exception as error:
                with tally.lock:
                    tally.failed.append(repr(error)[:200])

        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(send, range(requests)))
        seconds = time.monotonic() - start
        wait_until_idle(server)
        at_end = server.metric('headprof_cache_bytes{of="reserved"}')
        together = throughput(client, asked[: requests // 2], clients)
    return {
        "model": server.model,
        "machine": f"{platform.machine()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "requests": requests,
        "clients": clients,
        "answered": tally.answered,
        "not the answer alone": tally.wrong,
        "cancelled": tally.cancelled,
        "refused": tally.refused,
        "failed": tally.failed,
        "cache bytes at the start": at_start,
        "cache bytes at the end": at_end,
        "seconds": round(seconds, 2),
        "seconds to first token": quantiles(tally.first),
        "seconds between tokens": quantiles(tally.between),
        "tokens per second, one after the other": round(tokens_alone / seconds_alone, 1),
        f"tokens per second, {clients} at a time": round(together, 1),
    }


def throughput(client: httpx.Client, asked: list[dict[str, Any]], clients: int) -> float:
    """Tokens generated per second when so many clients send these requests."""
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(count for _, count in pool.map(lambda body: answer(client, body), asked))
    return tokens / (time.monotonic() - start)


def wait_until_idle(server: Running) -> None:
    """Wait until no request holds anything."""
    until = time.monotonic() + 60
    while server.metric(_HELD) or server.metric("headprof_batch_size") or server.metric("headprof_queue_length"):
        assert time.monotonic() < until, "requests hold something although nobody waits for them"
        time.sleep(0.05)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    hundredths = statistics.quantiles(seconds, n=100)
    return {"p50": round(hundredths[49], 4), "p99": round(hundredths[98], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--smollm2", action="store_true", help="the embedded model in place of a tiny one")
    parser.add_argument("-o", "--output", type=Path, default=Path("soak.json"))
    given = parser.parse_args()
    loaded = load_model(None, device="cpu") if given.smollm2 else load_tiny()
    draw = random.Random(0)
    documents = [" ".join(draw.choices(_WORDS, k=count)) for count in (60, 150, 300)]
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(loaded, Path(folder), max_batch=given.clients, buffer=8) as server,
    ):
        found = soak(server, given.requests, given.clients, documents)
    given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    right = not (found["not the answer alone"] or found["failed"])
    sys.exit(0 if right and found["cache bytes at the start"] == found["cache bytes at the end"] else 1)


if __name__ == "__main__":
    main()
