"""Which saved document a prompt begins with, found without reading any document's rows."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from headprof.compression.document_origin import Origin, document_tokens
from headprof.errors import HeadprofError
from headprof.integrations.server.asked import AskedReader
from headprof.integrations.server.documents import DocumentStore, SavedDocument, Stamp

_Place = tuple[int, bytes]
"""Where a document's text ends, in bytes of its spelling, and a hash of all of it."""
_Known = tuple[Stamp, tuple[_Place, SavedDocument] | None]
"""When a file was last changed; the document in it, if prompts can begin with that."""


@dataclass(frozen=True)
class Begun:
    """How a prompt begins.

    Attributes:
        document: with all tokens of this one.
        tokens: as many of the prompt's own are these; the others follow it.
    """

    document: SavedDocument
    tokens: int


class DocumentPrefixes:
    """Knows of each saved document how a prompt has to begin that starts from it. Any thread may use it.

    A file is read once, its header and its token ids, until it changes. Tokens are compared by their spelling: the
    blank line at a document's end is one token where nothing follows, and may be two where something does. Documents
    that the model cannot go on from are passed over, and those in which there is an answer already.

    Args:
        store: the saved documents.
        origin: of the model.
        reader: spells tokens.
        most: tokens that the model can read.
    """

    def __init__(self, store: DocumentStore, origin: Origin, reader: AskedReader, most: int) -> None:
        self._store, self._origin, self._reader, self._most = store, origin, reader, most
        self._known: dict[str, _Known] = {}
        self._documents: dict[_Place, SavedDocument] = {}
        self._lock = threading.Lock()

    def find(self, ids: Sequence[int]) -> Begun | None:
        """The longest document with which a prompt of these tokens begins, and after which something follows.

        Of those that are the same text, the one whose name sorts first. The prompt is gone through once.
        """
        with self._lock:
            self._follow()
            documents = self._documents
        if not documents:
            return None
        pieces = self._reader.spelled(ids)
        ends = {end: number for number, end in enumerate(accumulate(map(len, pieces[:-1])), start=1)}
        whole, read, sha = b"".join(pieces), 0, hashlib.sha256()
        found = None
        for end in sorted({end for end, _ in documents} & ends.keys()):
            sha.update(whole[read:end])
            read, document = end, documents.get((end, sha.digest()))
            if document is not None:
                found = Begun(document, ends[end])
        return found

    def pass_over(self, document: SavedDocument) -> None:
        """Find a document no more until its file changes, since it cannot be used."""
        with self._lock:
            self._know(self._known | {document.name: (document.stamp, None)})

    def _follow(self) -> None:
        """Look at the files that have come or changed, and forget those that have gone."""
        stamps = self._store.stamps()
        if stamps != {name: stamp for name, (stamp, _) in self._known.items()}:
            self._know({name: self._looked_at(name, stamp) for name, stamp in stamps.items()})

    def _know(self, known: dict[str, _Known]) -> None:
        self._known = known
        last_to_first = (known[name][1] for name in sorted(known, reverse=True))  # of one text the first name stays
        self._documents = dict(filter(None, last_to_first))

    def _looked_at(self, name: str, stamp: Stamp) -> _Known:
        """What is known of a file that was last changed then."""
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return known
        try:
            document = self._store.find(name)
            ids = document_tokens(document.path, self._origin) if document.tokens <= self._most else None
        except HeadprofError:
            return stamp, None
        if document.stamp != stamp or not document.is_as_found:  # there is another, which the next look finds
            return stamp, None
        spelling = b"" if ids is None else b"".join(self._reader.spelled(ids))
        if not spelling or self._reader.is_answered(spelling):
            return stamp, None
        return stamp, ((len(spelling), hashlib.sha256(spelling).digest()), document)
