"""The one thread that owns the model: it reads prompts, generates tokens for all answers together, keeps documents."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from headprof.compression.answering import begin_answer
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import save_document
from headprof.compression.generation import compress_document
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged
from headprof.errors import HeadprofError
from headprof.integrations.server.admission import Footprint
from headprof.integrations.server.answers import RunningAnswer
from headprof.integrations.server.batch import Batch
from headprof.integrations.server.documents import FOLDER_OPTION
from headprof.integrations.server.errors import ApiError, about_to_end, as_api_error
from headprof.integrations.server.jobs import AnswerJob, DocumentJob, Failed, Job, Kept
from headprof.integrations.server.memory import DocumentCaches, never_fits
from headprof.integrations.server.metrics import Metrics
from headprof.models.decoder import find_decoder_layers
from headprof.models.loading import LoadedModel
from headprof.models.token_bytes import TokenBytes
from headprof.utils.files import DiskError

logger = logging.getLogger(__name__)

_PUBLISHED = 0.5
"""Seconds after which what is held is counted anew while requests neither come nor go."""


class _Interrupted(Exception):
    """Nobody waits any more for what is being read."""


@dataclass(frozen=True)
class Served:
    """What is served, and how.

    Attributes:
        loaded: the model.
        prompt_plan, document_plan: how plain prompts and documents are compressed.
        memory: most bytes of key/value caches.
        max_batch: most answers whose tokens are generated together.
        max_queue: most requests that wait.
        decoding: `decode_budget` and `buffer` in place of a saved document's own, as for `make_plan`.
        how: `backend`, `prefill_chunk` and `step`, as for `attending_ragged`.
    """

    loaded: LoadedModel
    prompt_plan: CompressionPlan
    document_plan: CompressionPlan
    memory: int
    max_batch: int = 8
    max_queue: int = 64
    decoding: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)


class Worker:
    """Does one job after the other, but generates the tokens of all answers together.

    Between two steps at most one prompt or document is read. The first of those that wait is taken as soon as there is
    room for it, and none passes it.

    Args:
        served: what is served.
        metrics: to be told of it.
    """

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self._served, self._metrics = served, metrics
        self._caches = DocumentCaches(served.loaded, served.prompt_plan, served.decoding, served.memory)
        self._batch = Batch(served.loaded)
        self._token_bytes = TokenBytes(served.loaded.tokenizer)
        self._waiting: deque[Job] = deque()
        self._wakes = threading.Condition()
        self._cut_off: float | None = None  # when what is under way ends, as `time.monotonic`; then nothing is begun
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="headprof-serve", daemon=True)

    # What other threads call.

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it does what it is asked."""
        return self._thread.is_alive() and not self._ends

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            ApiError: it can never be served, there are too many, or the server is about to end.
        """
        if job.footprint is not None and job.footprint.most > self._served.memory:
            raise never_fits(job.footprint.most, self._served.memory)
        with self._wakes:
            if self._cut_off is not None or not self.is_alive:
                raise about_to_end()
            if len(self._waiting) >= self._served.max_queue:
                raise ApiError(
                    429,
                    f"There are {len(self._waiting)} requests waiting already, and no more may: ask again later.",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting.append(job)
            self._wakes.notify()

    def forget(self, document: str) -> None:
        """Let go of a saved document's cache, since its file has gone."""
        with self._wakes:
            self._caches.forgotten.add(document)
            self._wakes.notify()

    def drain(self, seconds: float) -> None:
        """Begin nothing any more, and cut off after so many seconds what is under way."""
        with self._wakes:
            self._cut_off = time.monotonic() + seconds
            self._wakes.notify()

    def end(self, seconds: float = 10.0) -> None:
        """Stop at the next step, and wait for that."""
        with self._wakes:
            self._ends = True
            self._wakes.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    # The thread's own.

    def _run(self) -> None:
        try:
            with attending_ragged(self._served.loaded.model, **self._served.how), torch.no_grad():
                self._work()
        except BaseException as error:
            logger.critical("The thread that owns the model has ended.", exc_info=error)
        finally:
            with self._wakes:
                self._ends = True
            for job in [*self._waiting, *(answer.job for answer in self._batch)]:
                job.tell(Failed(about_to_end()))

    def _work(self) -> None:
        published, known = 0.0, -1
        while self._has_work():
            self._let_go()
            self._begin_next()
            self._batch.step()
            now = time.monotonic()
            if len(self._batch) != known or not self._batch or now - published > _PUBLISHED:
                known, published = len(self._batch), now
                self._publish()

    def _has_work(self) -> bool:
        """Wait until there is something to do; false when it is time to end."""
        with self._wakes:
            while not (self._ends or self._waiting or self._batch or self._caches.forgotten):
                self._wakes.wait()
            return not self._ends

    def _let_go(self) -> None:
        """Let go of what nobody waits for any more, and refuse what has waited too long."""
        self._caches.let_go()
        ended = {answer for answer in self._batch if self._is_over(answer.job)}
        self._batch.remove(ended.__contains__)
        with self._wakes:
            over = [job for job in self._waiting if self._cut_off is not None or self._is_over(job)]
            self._waiting = deque(job for job in self._waiting if job not in over)
        for job in [*over, *(answer.job for answer in ended)]:
            self._say_why(job)

    def _is_over(self, job: Job) -> bool:
        """Whether a job that is under way ends now."""
        return job.cancelled or job.is_late() or (self._cut_off is not None and time.monotonic() > self._cut_off)

    def _say_why(self, job: Job) -> None:
        if job.cancelled:
            self._metrics.cancelled()
        elif job.is_late():
            message = "The request has taken longer than the server lets it: ask for less, or raise --timeout."
            job.tell(Failed(ApiError(504, message, code="timeout")))
        else:
            job.tell(Failed(about_to_end()))

    def _begin_next(self) -> None:
        """Begin with the first job that waits, if there is room for it."""
        with self._wakes:
            job = self._waiting[0] if self._waiting else None
        if job is None or (isinstance(job, AnswerJob) and len(self._batch) >= self._served.max_batch):
            return
        try:
            footprint = self._caches.room_for(job, self._batch.reserved)
            if footprint is None:
                return
            with _interruptible(self._served.loaded, lambda: self._is_over(job)):
                self._do(job, footprint)
        except _Interrupted:
            self._say_why(job)
        except Exception as error:
            if not isinstance(error, HeadprofError):
                logger.error("A request failed.", exc_info=error)
            job.tell(Failed(as_api_error(error)))
        with self._wakes:
            self._waiting.popleft()

    def _do(self, job: Job, footprint: Footprint) -> None:
        if isinstance(job, DocumentJob):
            self._keep(job)
            return
        assert isinstance(job, AnswerJob)
        about = job.document
        cache = HeadCache(self._served.prompt_plan) if about is None else self._caches.copy_of(about.name)
        ids = torch.tensor([job.asked.ids])
        answering, logits = begin_answer(self._served.loaded, ids, cache, job.asked.choosing)
        answer = RunningAnswer(self._served.loaded, job, answering, footprint, self._metrics, self._token_bytes)
        if not answer.take(logits):
            self._batch.add(answer)

    def _keep(self, job: DocumentJob) -> None:
        """Compress a document and save it, as `headprof compress` does."""
        served = self._served
        reading = {name: value for name, value in served.how.items() if name != "step"}
        cache = compress_document(served.loaded, job.text, served.document_plan, **reading)
        try:
            save_document(cache, job.path, served.loaded, {"document": job.name})
        except DiskError as error:
            raise ApiError(507, error.about(job.path.name, FOLDER_OPTION), code="cannot_be_kept") from error
        job.tell(Kept())

    def _publish(self) -> None:
        held, documents, reserved = self._batch.nbytes, self._caches.nbytes, self._batch.reserved
        self._metrics.holds(requests=held, documents=documents, reserved=reserved + documents)
        with self._wakes:
            waiting = len(self._waiting)
        self._metrics.load(waiting=waiting, running=len(self._batch))


@contextmanager
def _interruptible(loaded: LoadedModel, is_over: Callable[[], bool]) -> Iterator[None]:
    """Stop reading before the next layer when nobody waits for it any more; raises `_Interrupted` then."""

    def look(*_: Any) -> None:
        if is_over():
            raise _Interrupted

    hooks = [layer.register_forward_pre_hook(look) for layer in find_decoder_layers(loaded.model) or ()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
