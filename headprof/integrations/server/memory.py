"""What there is room for: saved documents, loaded when they are asked about and let go for others, and requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.plan import CompressionPlan
from headprof.compression.prompts import document_cache
from headprof.errors import CacheError, HeadprofError
from headprof.integrations.server.admission import Footprint, answer_bytes, prompt_footprint
from headprof.integrations.server.documents import DocumentNotFound, SavedDocument, UnusableDocument, unusable
from headprof.integrations.server.errors import ApiError
from headprof.integrations.server.jobs import AnswerJob, Job
from headprof.models.loading import LoadedModel
from headprof.utils.units import human_bytes

logger = logging.getLogger(__name__)


def never_fits(needed: int, memory: int) -> ApiError:
    """For a request that needs more than all memory."""
    return ApiError(
        400,
        f"This request may hold {human_bytes(needed)} of key/value cache where the server has {human_bytes(memory)}: "
        "ask for less, or raise --memory.",
        code="memory_exceeded",
    )


class DocumentCaches:
    """Caches of saved documents, the one that was asked about last at the end. One thread uses them.

    Args:
        loaded: the model.
        plan: how prompts without a document are compressed.
        decoding: `decode_budget` and `buffer` in place of a document's own, as for `make_plan`.
        memory: bytes that these caches and all requests may hold together.

    Attributes:
        forgotten: names of documents whose files have gone; any thread may add one.
    """

    def __init__(self, loaded: LoadedModel, plan: CompressionPlan, decoding: Mapping[str, Any], memory: int) -> None:
        self.forgotten: set[str] = set()
        self._loaded, self._plan, self._decoding, self._memory = loaded, plan, decoding, memory
        self._held: dict[str, tuple[HeadCache, SavedDocument]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that all of them hold."""
        return sum(cache.nbytes for cache, _ in self._held.values())

    def let_go(self) -> None:
        """Let go of the documents whose files have gone."""
        while self.forgotten:  # to which others may add meanwhile
            self._held.pop(self.forgotten.pop(), None)

    def room_for(self, job: Job, reserved: int) -> Footprint | None:
        """What a job will hold, for which there is room now; `None` where it has to wait for others to end.

        Its document is in memory then. One that has not named its document is read plainly if that cannot be used.

        Args:
            job: the request.
            reserved: bytes that are set aside for others.

        Raises:
            HeadprofError: it can never be served, or its document cannot.
        """
        try:
            return self._room_as_asked(job, reserved)
        except HeadprofError as error:
            if not isinstance(job, AnswerJob) or job.plain is None:
                raise
            logger.warning("A prompt begins with a document and is read without it: %s", error)
            if isinstance(error, UnusableDocument):
                job.plain.pass_over()
            asked = job.plain.asked
            job.leave_document(prompt_footprint(self._plan, len(asked.ids), asked.choosing.max_new_tokens))
            return self._room_as_asked(job, reserved)

    def _room_as_asked(self, job: Job, reserved: int) -> Footprint | None:
        """As `room_for`, of a job as it stands."""
        footprint, about = job.footprint, None
        if isinstance(job, AnswerJob) and job.document is not None:
            if not self._load(job.document, reserved):
                return None
            about = job.document.name
            footprint = self._footprint(job, about)
        assert footprint is not None
        return footprint if self._make_room(footprint.most, reserved, about) else None

    def _make_room(self, needed: int, reserved: int, kept: str | None = None) -> bool:
        """Have so many bytes free beside those that are set aside for requests, if that can be.

        Documents go for that, those first that nobody has asked about for longest.

        Args:
            needed, reserved: bytes.
            kept: a document that is needed itself.

        Returns:
            Whether there is room; if not, nothing has gone.

        Raises:
            ApiError: there never is.
        """
        own = self._held[kept][0].nbytes if kept in self._held else 0
        if needed + own > self._memory:
            raise never_fits(needed + own, self._memory)
        if needed + own + reserved > self._memory:
            return False
        while needed + reserved + self.nbytes > self._memory:
            del self._held[next(name for name in self._held if name != kept)]
        return True

    def _load(self, document: SavedDocument, reserved: int) -> bool:
        """Have a document in memory, if there is room for it; whether there is.

        Raises:
            ApiError: there never is, the document has gone or is another one by now, its file cannot be used with this
                model, or it brings rows back from a second tier.
        """
        _, known = self._held.get(document.name, (None, None))
        if known is None or known.stamp != document.stamp:
            self._held.pop(document.name, None)
            if not self._make_room(document.file_bytes, reserved):
                return False
            if not document.path.is_file():
                raise DocumentNotFound(document.name)
            try:
                cache, _ = document_cache(self._loaded, document.path, self._decoding)
            except CacheError as error:
                raise unusable(document.name, document.path, error) from error
            if cache.recalls:
                raise ApiError(
                    400,
                    f"The document {document.name} keeps a second tier of rows to bring back, which is not served: "
                    "compress it by another method.",
                    param="document",
                    code="unsupported_document",
                )
            if not document.is_as_found or cache.get_seq_length() != document.tokens or cache.batch_size != 1:
                raise ApiError(409, f"The document {document.name} has just been replaced: ask again.", code="changed")
            self._held[document.name] = cache, document
        self._held[document.name] = self._held.pop(document.name)
        return True

    def _footprint(self, job: AnswerJob, name: str) -> Footprint:
        """What a question about a loaded document will hold."""
        cache = self._held[name][0]
        protected = max(cache.plan.protected_later(cache.protected), default=0)
        new, read = job.asked.choosing.max_new_tokens, len(job.asked.ids)
        rows = int(cache.lengths.sum())
        return Footprint(answer_bytes(cache.plan, rows, cache.get_seq_length(), read, new, protected))

    def copy_of(self, name: str) -> HeadCache:
        """A copy of a loaded document's cache, to be continued."""
        return stack_caches([self._held[name][0]])
