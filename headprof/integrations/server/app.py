"""The server's paths: requests become jobs for the worker, and what it says of them becomes responses."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from headprof.compression.document_origin import Origin
from headprof.errors import HeadprofError
from headprof.integrations.server.admission import document_footprint, prompt_footprint
from headprof.integrations.server.asked import AskedReader
from headprof.integrations.server.bodies import Asking, ChatBody, CompletionBody, DocumentBody, read_body
from headprof.integrations.server.documents import DocumentNotFound, DocumentStore
from headprof.integrations.server.errors import ApiError, about_to_end, as_api_error
from headprof.integrations.server.incoming import check_key, read_data
from headprof.integrations.server.jobs import AnswerJob, DocumentJob, Done, Event, Failed, Job, Kept, Piece, Plain
from headprof.integrations.server.metrics import Metrics
from headprof.integrations.server.prefixes import DocumentPrefixes
from headprof.integrations.server.replies import ChatReply, CompletionReply, Reply, error_event
from headprof.integrations.server.worker import Served, Worker

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        timeout: seconds until its body is there, and again until it is answered.
        max_request_bytes: of its body.
        max_new_tokens: of the answer to a chat that does not say, as far as the context has room.
        api_key: that it must carry; `None` for none.
    """

    timeout: float = 600.0
    max_request_bytes: int = 16 * 10**6
    max_new_tokens: int = 1024
    api_key: str | None = None


class Server:
    """All that answers requests.

    Args:
        served: the model, and how its caches are compressed.
        store: the saved documents.
        limits: of requests.
        match_documents: whether a prompt that begins with a saved document starts from its cache unnamed.

    Attributes:
        app: to be run by an ASGI server.
        worker: which owns the model.
    """

    def __init__(
        self, served: Served, store: DocumentStore, limits: Limits = Limits(), *, match_documents: bool = True
    ) -> None:
        self._served, self._store, self._limits = served, store, limits
        self.metrics = Metrics(served.memory)
        self.worker = Worker(served, self.metrics)
        self._reader = AskedReader(served.loaded, limits.max_new_tokens)
        self._prefixes: DocumentPrefixes | None = None
        if match_documents:
            loaded = served.loaded
            self._prefixes = DocumentPrefixes(store, Origin.of(loaded), self._reader, loaded.max_positions)
        self._started = int(time.time())
        self._making: set[str] = set()  # documents that are being compressed
        self.app = FastAPI(
            title="headprof",
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            lifespan=self._lifespan,
        )
        self.app.add_exception_handler(HTTPException, self._refuse_path)
        for method, path, handler in (
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/v1/documents", self._keep_document),
            ("GET", "/v1/documents", self._documents),
            ("GET", "/v1/documents/{name}", self._document),
            ("DELETE", "/v1/documents/{name}", self._delete_document),
            ("GET", "/metrics", self._metrics_page),
        ):
            self.app.add_route(path, self._guarded(path, handler), methods=[method])
        self.app.add_route("/health", self._health, methods=["GET"])

    @asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.end)

    # What every request goes through.

    def _guarded(self, path: str, handler: Handler) -> Handler:
        """A handler that checks the key, counts, and answers errors in OpenAI's form."""

        async def handle(request: Request) -> Response:
            try:
                check_key(request, self._limits.api_key)
                response = await handler(request)
            except Exception as error:
                if not isinstance(error, HeadprofError):
                    logger.error("A request failed.", exc_info=error)
                response = self._error(as_api_error(error))
            except asyncio.CancelledError:  # by the end of the time that a server which ends gives
                response = self._error(about_to_end())
            self.metrics.response(path, response.status_code)
            return response

        return handle

    @staticmethod
    def _error(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        """There is nothing at a path, or not for this method."""
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path[:200]} is not served ({error.detail}): see docs/serving.md."
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        return self._error(ApiError(error.status_code, message, code=code, headers=error.headers))

    # Models, health, metrics.

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._listed()]})

    async def _model(self, request: Request) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._listed())

    def _listed(self) -> dict[str, Any]:
        name = self._served.loaded.name
        return {"id": name, "object": "model", "created": self._started, "owned_by": "headprof"}

    def _require_model(self, name: str) -> None:
        if name != (own := self._served.loaded.name):
            message = f"The model {name[:200]!r} is not served: ask for {own!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _health(self, _: Request) -> Response:
        if self.worker.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the model's thread has ended"}, 503)

    async def _metrics_page(self, _: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    # Answers.

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatBody, ChatReply)

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionBody, CompletionReply)

    async def _answer(self, request: Request, kind: type[Asking], form: type[Reply]) -> Response:
        data = await read_data(request, self._limits.max_request_bytes, self._limits.timeout)
        events: asyncio.Queue[Event] = asyncio.Queue()
        body, job = await run_in_threadpool(self._answer_job, kind, data, _sender(events))
        self.worker.submit(job)
        said = await self._next(request, job, events)
        reply = form(
            self._served.loaded.name,
            with_usage=body.stream_options is not None and body.stream_options.include_usage,
            logprobs=job.asked.logprobs is not None,
            document=None if job.document is None else job.document.name,
        )
        if body.stream:
            return _Stream(job, reply, said, events)
        pieces: list[Piece] = []
        while isinstance(said, Piece):
            pieces.append(said)
            said = await self._next(request, job, events)
        assert isinstance(said, Done)
        return JSONResponse(reply.whole(pieces, said))

    def _answer_job(self, kind: type[Asking], data: bytes, emit: Callable[[Event], None]) -> tuple[Asking, AnswerJob]:
        """What a body asks, as a job; in a thread, since texts are encoded."""
        body = read_body(kind, data)
        self._require_model(body.model)
        job = functools.partial(AnswerJob, emit, time.monotonic() + self._limits.timeout)
        if isinstance(body.document, str):
            document = self._store.find(body.document, "document")
            return body, job(asked=self._reader.read(body, document.tokens), document=document)
        asked = self._reader.read(body, 0)
        prefixes = None if body.document is False else self._prefixes
        begun = None if prefixes is None else prefixes.find(asked.ids)
        if prefixes is None or begun is None or begun.document.tokens > begun.tokens:  # for which there may be no room
            footprint = prompt_footprint(self._served.prompt_plan, len(asked.ids), asked.choosing.max_new_tokens)
            return body, job(footprint, asked=asked)
        plain = Plain(asked, functools.partial(prefixes.pass_over, begun.document))
        rest = replace(asked, ids=asked.ids[begun.tokens :])
        return body, job(asked=rest, document=begun.document, plain=plain)

    async def _next(self, request: Request, job: Job, events: asyncio.Queue[Event]) -> Event:
        """What the worker says next of a job; the job is cancelled when the client leaves before.

        Raises:
            ApiError: it has failed.
        """
        said, left = asyncio.ensure_future(events.get()), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({said, left}, return_when=asyncio.FIRST_COMPLETED)
            if not said.done():
                raise ApiError(499, "The client has left.", code="cancelled")
            if isinstance(event := said.result(), Failed):
                raise event.error
            return event
        except BaseException:
            job.cancelled = True
            raise
        finally:
            said.cancel()
            left.cancel()

    # Documents.

    async def _keep_document(self, request: Request) -> Response:
        data = await read_data(request, self._limits.max_request_bytes, self._limits.timeout)
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = await run_in_threadpool(self._document_job, data, _sender(events))
        if job.name in self._making:
            message = f"The document {job.name} is being made already: wait for it, or choose another id."
            raise ApiError(409, message, param="id", code="document_exists")
        self._making.add(job.name)
        try:
            await run_in_threadpool(self._store.require_new, job.name)  # it may have been made meanwhile
            self.worker.submit(job)
            said = await self._next(request, job, events)
        finally:
            self._making.discard(job.name)
        assert isinstance(said, Kept)
        try:
            made = await run_in_threadpool(self._store.find, job.name)
        except DocumentNotFound:
            message = f"The document {job.name} was made, and has been deleted since: post it again."
            raise ApiError(409, message, param="id", code="document_deleted") from None
        return JSONResponse(made.listed(), 201)

    def _document_job(self, data: bytes, emit: Callable[[Event], None]) -> DocumentJob:
        body = read_body(DocumentBody, data)
        path = self._store.require_new(body.id)
        text = body.text.strip()
        if not text:
            raise ApiError(400, "The document is empty: give it a text.", param="text", code="invalid_value")
        footprint = document_footprint(self._served.document_plan, self._reader.count(text))
        deadline = time.monotonic() + self._limits.timeout
        return DocumentJob(emit, deadline, footprint, name=body.id, text=text, path=path)

    async def _documents(self, _: Request) -> Response:
        found = await run_in_threadpool(self._store.all)
        return JSONResponse({"object": "list", "data": [each.listed() for each in found]})

    async def _document(self, request: Request) -> Response:
        found = await run_in_threadpool(self._store.find, request.path_params["name"])
        return JSONResponse(found.listed())

    async def _delete_document(self, request: Request) -> Response:
        name = request.path_params["name"]
        await run_in_threadpool(self._store.delete, name)
        self.worker.forget(name)
        return JSONResponse({"id": name, "object": "document", "deleted": True})


def _sender(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    """What hands events of the worker's thread to the loop's."""
    loop = asyncio.get_running_loop()
    return lambda said: loop.call_soon_threadsafe(events.put_nowait, said)  # type: ignore[return-value]


async def _left(request: Request) -> None:
    """Wait until the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """An answer in chunks. The job is cancelled when the client leaves, whether anything has been sent or not."""

    def __init__(self, job: Job, reply: Reply, first: Event, events: asyncio.Queue[Event]) -> None:
        super().__init__(_chunks(reply, first, events), media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True


async def _chunks(reply: Reply, said: Event, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    """What a client is sent of an answer, which begins with what has been said."""
    for chunk in reply.first():
        yield chunk
    while isinstance(said, Piece):
        yield reply.piece(said)
        said = await events.get()
    if isinstance(said, Failed):
        yield error_event(said.error)
        return
    assert isinstance(said, Done)
    for chunk in reply.last(said):
        yield chunk
