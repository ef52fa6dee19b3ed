"""Reading a user's texts; writing files so that a reader finds the old content or the new, and never half of it."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from headprof.errors import HeadprofError, UsageError
from headprof.utils.units import human_bytes

_MENDS = {
    errno.ENOSPC: (
        "There is no space left on the disk that holds {path}: free some or choose another place with {option}."
    ),
    errno.EACCES: "Permission to write {path} is denied: change its permissions or choose another place with {option}.",
    errno.EROFS: "The disk that holds {path} is read-only: choose another place with {option}.",
    errno.EFBIG: "{path} would be larger than this disk or account allows: choose another place with {option}.",
    errno.EIO: "The disk that holds {path} failed while it was written: choose another place with {option}.",
    errno.EISDIR: "{path} is a folder: choose the name of a file with {option}.",
    errno.ENODEV: "{path} is a device, not a file: choose the name of a file with {option}.",
    errno.ENOTDIR: "{path} cannot be written because one of its folders is a file: choose another place with {option}.",
    errno.ENAMETOOLONG: "The name {path} is too long for this disk: choose a shorter one with {option}.",
}
_MENDS |= {errno.EDQUOT: _MENDS[errno.ENOSPC], errno.EPERM: _MENDS[errno.EACCES], errno.EEXIST: _MENDS[errno.ENOTDIR]}
PROBES_FORMAT = "headprof.probes"
_LARGEST_TEXT = 1_000_000_000  # bytes
_LARGEST_HEADER = 100_000_000  # bytes; what the safetensors library itself allows

_OTHER_MEND = "{path} cannot be written ({reason}): choose another place with {option}."
_NO_LOCKS = "The disk that holds {path} cannot keep two runs from writing it: choose another place with {option}."

# safetensors raises its own exception and leaves the number of the system's error in the text alone.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class DiskError(HeadprofError):
    """A file that the disk refused to write.

    Args:
        path: of the file, as the user knows it.
        sentence: what is told, with places for the `path`, the `option` that chooses another, and the `reason`.
        reason: the system's.
    """

    def __init__(self, path: str | Path, sentence: str, reason: str = "") -> None:
        self._sentence, self._reason = sentence, reason
        super().__init__(self.about(path, "-o"))

    @classmethod
    def of(cls, number: int, path: str | Path) -> DiskError:
        """That of the system's error of this number."""
        return cls(path, _MENDS.get(number, _OTHER_MEND), os.strerror(number))

    def about(self, path: str | Path, option: str) -> str:
        """The sentence, for a file that is called so and whose place is chosen by such an option."""
        return self._sentence.format(path=path, option=option, reason=self._reason)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; on success it is synced to disk and renamed to `path`.

    On any exception, an interrupt included, the temporary file is removed and `path` is left as it was. Missing
    parent folders are made, a symbolic link is followed, and a file that is replaced keeps its permissions.
    The temporary file must be closed by the end of the block.

    Raises:
        HeadprofError: the disk refused (no space, no permission, `path` is a folder); other exceptions pass through.
    """
    target = Path(path).resolve()  # renaming over a symbolic link would replace the link, not the file behind it
    with _explained(target, path) as temporary:
        mode = _create(temporary, target)
        yield temporary
        _commit(temporary, target, mode)


def check_writable(path: str | Path) -> None:
    """Find out now, not after hours of work, that `path` cannot be written; makes missing parent folders.

    Raises:
        HeadprofError: as `atomic_write` would.
    """
    target = Path(path).resolve()
    with _explained(target, path) as temporary:
        _create(temporary, target)


def check_output(target: str | Path, inputs: Iterable[str | Path], file_format: str | None = None) -> None:
    """Refuse, before any work, to write where something would be lost that is not replaced by its like.

    Args:
        target: what is to be written. A file that is not there yet can always be.
        inputs: files that are read; those that are not there count for nothing.
        file_format: of a safetensors file that is to be written, the `format` in its metadata; `None` to write
            anything else.

    Raises:
        UsageError: the target is one of the inputs, by whatever name or link, or it is a safetensors file of another
            format, such as a model's weights.
    """
    place = Path(target)
    if not is_file(place):
        return
    for path in inputs:
        with contextlib.suppress(OSError):
            if place.samefile(path):
                raise UsageError(
                    f"{target} is read by this command ({path}), and would be lost: choose another name to write to."
                )
    metadata = _safetensors_metadata(place)
    if metadata is not None and not _is_of_format(metadata, file_format):
        raise UsageError(
            f"{target} is a safetensors file of another kind, such as a model's weights: choose another name to "
            "write to, or delete it first."
        )


def is_file(path: Path) -> bool:
    """Whether there is such a file; none by a name that the disk does not take."""
    with contextlib.suppress(OSError):
        return path.is_file()
    return False


def _safetensors_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata in the header of a safetensors file, empty where it has none; `None` for what is no such file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_LARGEST_HEADER, path.stat().st_size - 8):
                return None
            header = json.loads(file.read(size))
    except (OSError, ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _is_of_format(metadata: dict[str, Any], file_format: str | None) -> bool:
    if file_format == PROBES_FORMAT and metadata.keys() >= {"key", "names"}:
        return True  # earlier files of probe results do not name their format
    return file_format is not None and metadata.get("format") == file_format


@contextlib.contextmanager
def _explained(target: Path, path: str | Path) -> Iterator[Path]:
    """A temporary path beside `target`, gone at the end; the disk's refusals as sentences about `path`."""
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(6)}.partial"
    try:
        yield temporary
    except Exception as error:
        number = _os_error_number(error, temporary, target)
        if number is None:
            raise
        raise DiskError.of(number, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_text(path: Path, error_class: type[HeadprofError] = UsageError) -> str:
    """A user's text file: UTF-8 with or without a byte order mark, line ends as `\\n`.

    Raises:
        HeadprofError: of the given class, when it cannot be read, is a device, is too large to be a text, or is not
            UTF-8; the message says at which byte, and how to convert it.
    """
    try:
        if stat.S_ISCHR(path.stat().st_mode) or stat.S_ISBLK(path.stat().st_mode):
            raise error_class(f"{path} is a device, not a file: give a text file.")
        with path.open("rb") as file:
            data = file.read(_LARGEST_TEXT + 1)
    except OSError as error:
        raise error_class(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error
    if len(data) > _LARGEST_TEXT:
        raise error_class(f"{path} has more than {human_bytes(_LARGEST_TEXT)}: give a shorter text.")
    return decode_text(data, str(path), error_class)


def decode_text(data: bytes, name: str, error_class: type[HeadprofError] = UsageError) -> str:
    """What `read_text` makes of a file's bytes; `name` is for the message."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise error_class(
            f"{name} is not UTF-8 text (at byte {error.start}, 0x{data[error.start]:02x}): convert it, such as with "
            f"iconv -f {encoding} -t UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_lone_surrogates(text: str) -> str:
    """JSON can escape half a character, which no tokenizer takes; as others do, put a question mark for it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Write a text atomically, in UTF-8; what has no place there, as in names of files, is written as an escape."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_text(path: str | Path, text: str) -> None:
    """Add a text to the end of a file, in UTF-8; synced to disk.

    Raises:
        HeadprofError: the disk refused; a part of the text may have been written.
    """
    target = Path(path).resolve()
    try:
        with target.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskError.of(error.errno or errno.EIO, path) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, atomically; raises `HeadprofError` when the disk refuses."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_leftovers(path: str | Path) -> None:
    """Delete what a process that was killed in the middle of `atomic_write(path)` has left beside `path`.

    Only for a file that no other process writes at the same time.
    """
    target = Path(path).resolve()
    for leftover in target.parent.glob(glob.escape(f".{target.name[:40]}.") + "*.partial"):
        with contextlib.suppress(OSError):
            leftover.unlink()


class FileLock:
    """The right to write a file, for one run at a time; it ends with the process, however that ends.

    While it is held there is a file `.NAME.lock` beside the file.
    """

    def __init__(self, path: str | Path):
        target = Path(path).resolve()
        self.path = path
        self._marker = target.parent / f".{target.name[:40]}.lock"
        self._lock: Any = None

    def take(self) -> bool:
        """Whether nobody else has it; then it is held from now on.

        Raises:
            HeadprofError: the disk refused.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self._marker)
        try:
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except NotImplementedError as error:
            raise DiskError(self.path, _NO_LOCKS) from error
        except OSError as error:
            raise DiskError.of(error.errno or errno.EIO, self.path) from error
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # while it is still held, so that nobody's but ours is removed
                self._marker.unlink()
            self._lock.release()
            self._lock = None


def _create(temporary: Path, target: Path) -> int:
    """Make the empty temporary file, before any long work is done for nothing; return the permissions to end with."""
    if target.is_dir():
        raise _os_error(errno.EISDIR, target)
    if target.exists():
        if not target.is_file():
            raise _os_error(errno.ENODEV, target)
        if not os.access(target, os.W_OK):
            raise _os_error(errno.EACCES, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch(exist_ok=False)
    return stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)


def _commit(temporary: Path, target: Path, mode: int) -> None:
    # A writer that renames a file of its own over ours (safetensors does) has replaced the permissions too.
    temporary.chmod(mode)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    # Makes the rename itself durable; not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def _os_error_number(error: Exception, temporary: Path, target: Path) -> int | None:
    """The errno of a failure to write our file, or `None` when the exception is about something else."""
    if isinstance(error, SafetensorError):
        found = _RUST_OS_ERROR.search(str(error))
        return int(found[1]) if found else None
    if not isinstance(error, OSError):
        return None
    if error.filename is None:
        return error.errno if error.errno in _MENDS else None
    ours = {str(temporary), str(target), *map(str, target.parents)}
    return error.errno if str(error.filename) in ours else None
