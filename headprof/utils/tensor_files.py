"""Reading safetensors files that somebody else may have written, and telling whether they have been altered."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HEADER = 2**24
"""Bytes; a header of a hundred layers takes 100 kB."""
_CHECKSUM, _CHECKSUM_BY = "checksum", "checksum_by"
CHECKSUM_NAMES = (_CHECKSUM, _CHECKSUM_BY)
"""Metadata by which `is_altered` knows a file. There are two, so that none is lost by damage to a name."""


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor.

    Attributes:
        dtype: as the format names it: `"F32"`, `"I64"`, `"BOOL"`.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """An open safetensors file, of which nothing but the header has been read.

    Attributes:
        metadata: of the whole file.
        stored: what there is, by name.
        size: bytes of the file.
    """

    def __init__(self, file: Any, size: int):
        self._file = file
        self.size = size
        self.metadata: dict[str, str] = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.stored = {name: Stored(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._file.get_tensor(name)

    def read_all(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU."""
        return {name: self.read(name) for name in self.stored}


@contextlib.contextmanager
def open_tensors(path: Path, what: str, mend: str, error_class: type[Exception]) -> Iterator[TensorFile]:
    """Open a safetensors file; its tensors can be looked at before any is read.

    Args:
        path: the file.
        what: what it should be, for the messages: `"profile"`.
        mend: how to get another: "run `headprof score`".
        error_class: what to raise.

    Raises:
        error_class: the file is missing, no regular file, damaged or not readable.
    """
    if not path.is_file():
        raise error_class(f"There is no {what} file at {path}: check the path, or {mend}.")
    try:
        _check_header_size(path)
        with safe_open(path, framework="pt") as file:
            yield TensorFile(file, path.stat().st_size)
    except SafetensorError as error:
        # The library's only word for a file whose header is whole and whose tensors are not.
        fault = "is cut short or altered" if "not fully covered" in str(error) else "is not a safetensors file"
        raise error_class(f"The {what} {path} {fault}: restore it, or {mend}.") from error
    except OSError as error:
        raise error_class(f"The {what} {path} cannot be read ({error}): check its permissions.") from error


def with_sorted_header(content: bytes) -> bytes:
    """A safetensors file's content with its header in the order of names: the same for the same tensors and metadata.

    The library writes metadata in an order of its own, another each time.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 (hex) of all tensors and of all metadata but itself."""
    import torch

    kept = {name: text for name, text in metadata.items() if name != _CHECKSUM}
    sha = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name}{list(tensors[name].shape)}{tensors[name].dtype}".encode())
        sha.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def with_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata, and by what it can be told later whether the file has been altered."""
    known = dict(metadata) | {_CHECKSUM_BY: "sha256"}
    return known | {_CHECKSUM: checksum(tensors, known)}


def is_altered(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file is not what `with_checksum` saw; false for one from before there were checksums."""
    known = any(name in metadata for name in CHECKSUM_NAMES)
    return known and metadata.get(_CHECKSUM) != checksum(tensors, metadata)


def _check_header_size(path: Path) -> None:
    """The library would take headers of 100 MB; raises as it does for what is no such file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST_HEADER:
        raise SafetensorError("the header is too large")
