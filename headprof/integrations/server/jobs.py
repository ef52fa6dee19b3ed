"""What the thread that owns the model is asked to do, and what it says of that."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headprof.integrations.server.admission import Footprint
from headprof.integrations.server.asked import Asked
from headprof.integrations.server.documents import SavedDocument
from headprof.integrations.server.errors import ApiError


@dataclass(frozen=True)
class TokenChance:
    """How likely a token was.

    Attributes:
        text: it; where it is a part of a character `bytes:` and its bytes, escaped.
        written: its bytes in the text; `None` for one that texts are shown without.
        logprob: of the model's own distribution.
    """

    text: str
    written: bytes | None
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer.

    Attributes:
        own: how likely it was.
        offset: characters of the text before it, or before the one that it is a part of.
        likeliest: the likeliest tokens.
    """

    own: TokenChance
    offset: int
    likeliest: Sequence[TokenChance] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, and the tokens that it came with where they are told."""

    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: `"stop"` or `"length"`.
        prompt_tokens, cached_tokens, new_tokens: read, of these from a saved document, and written.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a request that could not be served."""

    error: ApiError


@dataclass(frozen=True)
class Kept:
    """A document has been compressed and saved."""


Event = Piece | Done | Failed | Kept


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        emit: takes what is said of it, in the worker's thread.
        deadline: when it must be done, as `time.monotonic`.
        footprint: what it will hold; `None` where its document tells that.
        arrived: when it came.
        cancelled: whether nobody waits for it any more; any thread may set it.
    """

    emit: Callable[[Event], None]
    deadline: float
    footprint: Footprint | None = None
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def tell(self, event: Event) -> None:
        """Hand an event on, unless nobody waits."""
        if not self.cancelled:
            with contextlib.suppress(RuntimeError):  # the loop that it would go to has ended
                self.emit(event)

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Plain:
    """A prompt that begins with a document without naming it, as it is read where that cannot be used.

    Attributes:
        asked: all of it.
        pass_over: called when the document's file is of no use, so that it is found no more.
    """

    asked: Asked
    pass_over: Callable[[], None]


@dataclass(eq=False)
class AnswerJob(Job):
    """A prompt to be answered.

    Attributes:
        asked: the prompt.
        document: that it is about, as it was when the request came.
        plain: the prompt without that; `None` where it names its document, or has none.
    """

    asked: Asked = field(kw_only=True)
    document: SavedDocument | None = field(kw_only=True, default=None)
    plain: Plain | None = field(kw_only=True, default=None)

    def leave_document(self, footprint: Footprint) -> None:
        """Read the prompt plainly, which holds so much."""
        assert self.plain is not None
        self.asked, self.footprint, self.document, self.plain = self.plain.asked, footprint, None, None


@dataclass(eq=False)
class DocumentJob(Job):
    """A document to be compressed and saved.

    Attributes:
        name, text: the document.
        path: where it goes.
    """

    name: str = field(kw_only=True)
    text: str = field(kw_only=True)
    path: Path = field(kw_only=True)
