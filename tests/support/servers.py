"""Real servers on loopback: in a thread of the test's process, which is quick, or in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from headprof.compression.session import make_plan
from headprof.integrations.server.app import Limits, Server
from headprof.integrations.server.documents import DocumentStore
from headprof.integrations.server.run import listening_socket
from headprof.integrations.server.worker import Served
from support.profiles import random_profile


class Running:
    """A server that runs in a thread.

    Attributes:
        url: where, without `/v1`.
        server: it.
        store: its documents.
        served: what it serves.
    """

    def __init__(self, url: str, server: Server, store: DocumentStore, served: Served):
        self.url, self.server, self.store, self.served = url, server, store, served
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def model(self) -> str:
        return self.served.loaded.name

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post JSON to a path, with the model's name unless there is one or it is left out by `model=None`."""
        if path != "/v1/documents":
            body = {"model": self.model} | body
        return self.http.post(path, json={name: value for name, value in body.items() if value is not ...})

    def chat(self, text: str, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)

    def keep(self, name: str, text: str) -> httpx.Response:
        return self.post("/v1/documents", id=name, text=text)

    def metric(self, name: str) -> float:
        """A number of `/metrics`, by its name with its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


@contextmanager
def running_server(loaded: Any, folder: Path, limits: Limits = Limits(), **options: Any) -> Iterator[Running]:
    """A server of a model in memory; options are those of `Served`, of `Server`, and of `make_plan`."""
    matching = {"match_documents": options.pop("match_documents", True)}
    own = {
        name: options.pop(name) for name in ("memory", "max_batch", "max_queue", "decoding", "how") if name in options
    }
    plans = [
        make_plan(loaded.model, random_profile(loaded.model), **({"method": each, "budget": 40, "buffer": 8} | options))
        for each in ("headkv-r2", "headkv-kvzip")
    ]
    served = Served(loaded, *plans, **({"memory": 10**9} | own))
    with closing(DocumentStore(folder)) as store, closing(listening_socket("127.0.0.1", 0)) as listening:
        server = Server(served, store, limits, **matching)
        config = uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=5)
        runner = uvicorn.Server(config)
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        running = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", server, store, served)
        try:
            assert running.http.get("/health").json() == {"status": "ok"}
            yield running
        finally:
            running.http.close()
            running.openai.close()
            runner.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def server_process(place: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`headprof serve` in a process of its own, and where it listens, without `/v1`; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headprof", "serve", "--port", "0", *arguments],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HEADPROF_DATA": str(place / "data-home"), "HF_HUB_OFFLINE": "1"} | environment,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            _, errors = process.communicate(timeout=10)
            raise AssertionError(errors)
        yield process, url.removesuffix("/v1")
    finally:
        process.kill()
        process.communicate()
