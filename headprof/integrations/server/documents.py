"""Saved documents: compressed caches in a folder, one a file, whose names are checked."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headprof.compression.document_origin import FORMAT
from headprof.errors import CacheError, HeadprofError, UsageError
from headprof.integrations.server.errors import ApiError
from headprof.utils.files import DiskError, FileLock
from headprof.utils.records import plain
from headprof.utils.tensor_files import open_tensors

logger = logging.getLogger(__name__)

SUFFIX = ".kv.safetensors"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LEFTOVER = re.compile(r"\.[A-Za-z0-9._-]{1,40}\.[0-9a-f]{12}\.partial")
_MOST_TOKENS = 2**31
FOLDER_OPTION = "--cache-dir"
"""By which the folder of documents is chosen."""

Stamp = tuple[int, int, int]
"""What of a file's state changes with its content: when it was written, its bytes, and its number on the disk."""


@dataclass(frozen=True)
class SavedDocument:
    """What a saved document's file says of it.

    Attributes:
        name: by which requests name it.
        path: its file.
        model, method: that made it.
        tokens: of the document, which are the first ones of every prompt about it.
        file_bytes: of the file; what it holds in memory is not more but for free space.
        stamp: changes with the file.
        created: when it was made, in seconds since 1970.
    """

    name: str
    path: Path
    model: str
    method: str
    tokens: int
    file_bytes: int
    stamp: Stamp
    created: int

    @property
    def is_as_found(self) -> bool:
        """Whether its file has neither gone nor been replaced since."""
        try:
            return stamp_of(self.path.stat()) == self.stamp
        except OSError:
            return False

    def listed(self) -> dict[str, Any]:
        """The same as a response has it."""
        return {
            "id": self.name,
            "object": "document",
            "created": self.created,
            "model": self.model,
            "method": self.method,
            "tokens": self.tokens,
            "bytes": self.file_bytes,
        }


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file in this state."""
    return status.st_mtime_ns, status.st_size, status.st_ino


class DocumentNotFound(ApiError):
    """A document that is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(
            404,
            f"There is no document {name}: post it to /v1/documents first.",
            param="document",
            code="document_not_found",
        )


class UnusableDocument(ApiError):
    """A document whose file is damaged, or of another model.

    Args:
        name: of the document.
        fault: what is wrong, with the path of the file, which is told to the log alone.
    """

    def __init__(self, name: str, fault: CacheError) -> None:
        logger.warning("The document %s cannot be used: %s", name, fault)
        super().__init__(
            400,
            f"The document {name} is damaged, or was made with another model, tokenizer or dtype: delete it "
            "and post it again.",
            param="document",
            code="document_unusable",
        )


def unusable(name: str, path: Path, fault: CacheError) -> ApiError:
    """Why a document could not be read: it has gone meanwhile, or there is a fault in its file."""
    return UnusableDocument(name, fault) if path.exists() else DocumentNotFound(name)


class DocumentStore:
    """The saved documents of a folder, which is one server's alone while it runs. Any thread may use it.

    Args:
        folder: made if it is not there. What a server that was killed has left half-written is removed.

    Raises:
        UsageError: another server has the folder, it is none, or the disk refused.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder.resolve(strict=True)
        except OSError as error:
            raise UsageError(
                f"The folder {folder} cannot be used ({error.strerror}): choose another with --cache-dir."
            ) from error
        self._lock = FileLock(self.folder / "documents")
        try:
            taken = self._lock.take()
        except DiskError as error:
            raise UsageError(error.about(self.folder, FOLDER_OPTION)) from error
        if not taken:
            raise UsageError(f"Another server keeps its documents in {folder}: choose another with --cache-dir.")
        for leftover in self.folder.glob(".*.partial"):
            if _LEFTOVER.fullmatch(leftover.name):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    def close(self) -> None:
        """Leave the folder to others."""
        self._lock.release()

    def path(self, name: str, param: str = "id") -> Path:
        """The file of a document, whether it is there or not.

        Args:
            name: of the document.
            param: the field of the request that names it.

        Raises:
            ApiError: this is no name.
        """
        if not _NAME.fullmatch(name):
            raise ApiError(
                400,
                f"A document cannot be named '{plain(name)}': use up to 128 letters, digits, dots, - and _, and begin "
                "with none of . and -.",
                param=param,
                code="invalid_document_id",
            )
        return self.folder / f"{name}{SUFFIX}"

    def require_new(self, name: str) -> Path:
        """The file that a new document goes to.

        Raises:
            ApiError: this is no name, or it is taken.
        """
        path = self.path(name)
        if path.is_symlink() or path.exists():
            raise ApiError(
                409,
                f"There is a document {name} already: delete it first, or choose another id.",
                param="id",
                code="document_exists",
            )
        return path

    def find(self, name: str, param: str = "id") -> SavedDocument:
        """A saved document; arguments as for `path`.

        Raises:
            ApiError: this is no name, or its file is damaged.
            DocumentNotFound: there is no such document.
        """
        path = self.path(name, param)
        if not self._is_own(path):
            raise DocumentNotFound(name)
        try:
            return self._read(name, path)
        except CacheError as error:
            raise unusable(name, path, error) from error

    def all(self) -> list[SavedDocument]:
        """All documents that can be read, by name."""
        found = []
        for name in sorted(self.stamps()):
            with contextlib.suppress(HeadprofError):
                found.append(self._read(name, self.path(name)))
        return found

    def stamps(self) -> dict[str, Stamp]:
        """The state of each file that may be a document, by name; none is opened."""
        found = {}
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(SUFFIX)
                if name != entry.name and _NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(OSError):  # it has gone meanwhile
                        found[name] = stamp_of(entry.stat(follow_symlinks=False))
        return found

    def delete(self, name: str) -> None:
        """
        Raises:
            ApiError: this is no name, or the disk refused.
            DocumentNotFound: there is no such document.
        """
        path = self.path(name)
        if not self._is_own(path):
            raise DocumentNotFound(name)
        try:
            path.unlink()
        except FileNotFoundError:
            raise DocumentNotFound(name) from None
        except OSError as error:
            raise ApiError(
                500, f"The document {name} cannot be deleted ({error.strerror}): see the folder's permissions."
            ) from error

    @staticmethod
    def _is_own(path: Path) -> bool:
        """Whether it is a file of this folder: a symbolic link may lead anywhere."""
        return path.is_file() and not path.is_symlink()

    @staticmethod
    def _read(name: str, path: Path) -> SavedDocument:
        mend = "delete it and post the document again"
        with open_tensors(path, "compressed document", mend, CacheError) as file:
            facts, status = file.metadata, path.stat()
        tokens = facts.get("tokens_seen", "")
        if facts.get("format") != FORMAT or not tokens.isascii() or not tokens.isdecimal() or len(tokens) > 10:
            raise CacheError(f"{path} is no compressed document: {mend}.")
        return SavedDocument(
            name,
            path,
            plain(facts.get("model", ""), 200),
            plain(facts.get("method", ""), 200),
            min(int(tokens), _MOST_TOKENS),
            status.st_size,
            stamp_of(status),
            int(status.st_mtime),
        )
