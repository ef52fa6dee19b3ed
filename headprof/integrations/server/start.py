"""From what a user asks for to a running server; mistakes show before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.table import find_method
from headprof.compression.request import CompressionRequest
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.utils.memory import free_bytes

_PARTS = ("fastapi", "prometheus_client", "starlette", "uvicorn")

try:
    from headprof.integrations.server.app import Limits, Server
    from headprof.integrations.server.documents import DocumentStore
    from headprof.integrations.server.loading import not_yet
    from headprof.integrations.server.run import is_loopback, listening_socket, serve
    from headprof.integrations.server.worker import Served
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] not in _PARTS:
        raise
    raise UsageError("What the server is made of is not here: run `pip install 'headprof[serve]'`.") from missing


@dataclass(frozen=True)
class ServeRequest:
    """What is to be served, and where.

    Attributes:
        prompts, documents: how plain prompts and documents are compressed.
        cache_dir: folder of saved documents.
        host, port: where to listen; port 0 for any that is free.
        memory: most bytes of key/value caches, as a budget is written; `None` for half of what the device has free.
        max_batch: most answers whose tokens are generated together.
        max_queue: most requests that wait.
        grace: seconds that requests under way have when the server is to end.
        limits: of requests.
        match_documents: as for `Server`.
    """

    prompts: CompressionRequest
    documents: CompressionRequest
    cache_dir: Path
    host: str
    port: int
    memory: str | None
    max_batch: int
    max_queue: int
    grace: float
    limits: Limits
    match_documents: bool = True

    def memory_bytes(self, loaded: LoadedModel) -> int:
        """Most bytes of key/value caches."""
        return free_bytes(loaded.device) // 2 if self.memory is None else _bytes(self.memory)

    def check(self) -> None:
        """
        Raises:
            UsageError: the memory is no number of bytes, the key is empty, or a method brings rows back from a second
                tier.
        """
        for asked in (self.prompts, self.documents):
            if find_method(asked.method, **asked.options).recall.is_on:
                raise UsageError(
                    f"The method {asked.method!r} keeps a second tier of rows to bring back, which is not served: "
                    "choose another, or give cluster=0."
                )
        if self.memory is not None:
            _bytes(self.memory)
        if self.limits.api_key is not None and not self.limits.api_key.strip():
            raise UsageError("The API key is empty: give one with --api-key or HEADPROF_API_KEY, or leave both away.")


def _bytes(text: str) -> int:
    try:
        given = Budget.parse(text)
    except UsageError:
        given = None
    if given is None or given.unit != "bytes" or given.above is not None:
        raise UsageError(f"A memory of {text!r} cannot be read: give bytes, such as 512MB or 8GB.")
    return int(given.amount)


@dataclass(frozen=True)
class Reserved:
    """The address and the folder of a server, for which a model may be loaded now.

    Attributes:
        request: what is to be served.
        listening: where.
        store: the saved documents.
    """

    request: ServeRequest
    listening: socket
    store: DocumentStore

    @property
    def url(self) -> str:
        """Where the server is, to which clients add `/v1`."""
        host, port = self.listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it, and it asks for no key."""
        return not is_loopback(self.listening) and self.request.limits.api_key is None

    def not_yet(self) -> AbstractContextManager[None]:
        """While this is entered, whoever asks is told that the model is being loaded."""
        return not_yet(self.listening)

    def serve(self, loaded: LoadedModel, on_start: Callable[[int], None]) -> None:
        """Serve until the process is told to end.

        Args:
            loaded: the model.
            on_start: called with the bytes that caches may have, once requests are taken.

        Raises:
            ProfileError: a method needs a head profile, and there is none or it is for another model.
        """
        request, memory = self.request, self.request.memory_bytes(loaded)
        reading = request.prompts
        served = Served(
            loaded,
            request.prompts.plan(loaded),
            request.documents.plan(loaded),
            memory,
            request.max_batch,
            request.max_queue,
            dict(reading.decoding),
            {"backend": reading.backend, "prefill_chunk": reading.prefill_chunk, "step": reading.step},
        )
        server = Server(served, self.store, request.limits, match_documents=request.match_documents)
        serve(server, self.listening, request.grace, lambda: on_start(memory))


@contextmanager
def reserved(request: ServeRequest) -> Iterator[Reserved]:
    """Take the address and the folder, before a model is loaded.

    Raises:
        UsageError: they cannot be had, or the request is wrong.
    """
    request.check()
    with (
        closing(listening_socket(request.host, request.port)) as listening,
        closing(DocumentStore(request.cache_dir)) as store,
    ):
        yield Reserved(request, listening, store)
