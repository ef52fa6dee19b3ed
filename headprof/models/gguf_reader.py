"""Parsing a GGUF file once, however often Transformers asks for it while a checkpoint is read."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """While this lasts, each GGUF file that has not changed is parsed at its first use only.

    Transformers parses the whole file, every token of its vocabulary included, for the configuration, for the tokenizer
    and for the weights. Of contexts that nest, the outermost remembers.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # Transformers says so, where a GGUF file is read at all
        yield
        return
    parse = gguf.GGUFReader
    if isinstance(parse, _Remembering):
        yield
        return
    gguf.GGUFReader = _Remembering(parse)
    try:
        yield
    finally:
        gguf.GGUFReader = parse


class _Remembering:
    """Stands in for `gguf.GGUFReader`; readers of files that are only read serve more than once."""

    def __init__(self, parse: Any):
        self._parse = parse
        self._readers: dict[tuple[Path, int, int], Any] = {}

    def __call__(self, path: Any, mode: str = "r") -> Any:
        if mode != "r":
            return self._parse(path, mode)
        file = Path(path).resolve()
        state = file.stat()
        key = (file, state.st_size, state.st_mtime_ns)
        if key not in self._readers:
            self._readers[key] = self._parse(path, mode)
        return self._readers[key]
