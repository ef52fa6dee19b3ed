"""Files that say what they should not, with a right checksum: anybody can compute one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from headprof.utils.tensor_files import CHECKSUM_NAMES, checksum

Change = Callable[[dict[str, torch.Tensor], dict[str, str]], object]

NUMBERS = ["NaN", "Infinity", "1e400", "9" * 5000, "true", '"1"', "[]", "null", "-1"]
"""JSON in the place of a number that has to be zero or more."""

NESTED = "[" * 10_000 + "]" * 10_000
"""JSON that no reader follows to its end."""


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def craft(path: Path, target: Path, change: Change) -> Path:
    """A changed copy of a file."""
    tensors, metadata = parts_of(path)
    change(tensors, metadata)
    if any(name in metadata for name in CHECKSUM_NAMES):
        metadata["checksum"] = checksum(tensors, metadata)
    target.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata))
    return target


def sparse(path: Path, target: Path, sizes: dict[str, tuple[int, ...]]) -> Path:
    """A copy with some tensors of other sizes, all of its numbers zero, which takes no room on the disk."""
    with safe_open(path, framework="pt") as file:
        header: dict = {"__metadata__": dict(file.metadata())}
        at = 0
        for name in file.keys():  # noqa: SIM118
            stored = file.get_slice(name)
            shape = list(sizes.get(name, stored.get_shape()))
            end = at + torch.Size(shape).numel() * {"F32": 4, "I32": 4, "I64": 8, "BOOL": 1}[stored.get_dtype()]
            header[name] = {"dtype": stored.get_dtype(), "shape": shape, "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(target, 8 + len(text) + at)
    return target


def note(name: str, text: str) -> Change:
    """Other metadata."""
    return lambda tensors, metadata: metadata.update({name: text})


def forget(name: str) -> Change:
    """Leave metadata out."""
    return lambda tensors, metadata: metadata.pop(name)


def put(name: str, tensor: torch.Tensor) -> Change:
    """Another tensor."""
    return lambda tensors, metadata: tensors.update({name: tensor})


def poke(name: str, value: float) -> Change:
    """Another number at the beginning of a tensor."""

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def drop(name: str) -> Change:
    """Leave a tensor out."""
    return lambda tensors, metadata: tensors.pop(name)


def turn(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A tensor made otherwise."""
    return lambda tensors, metadata: tensors.update({name: how(tensors[name])})


def flipped(content: bytes, bit: int) -> bytes:
    """A file's content with one bit the other way round."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
