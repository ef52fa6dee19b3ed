"""Copies of `.gguf` files as ordinary checkpoints, so that the next start need not convert them anew."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from headprof.models.checkpoint import Progress, Source, quiet, read_config, read_model, read_tokenizer
from headprof.models.embedded import cache_dir, save_checkpoint

_MOST_BYTES = 600_000_000
"""Of a file that is copied: the copy is in float32, up to eight times as large."""

_GROWTH = 8
_STAMP = "made_from.json"


def converted(source: Source, progress: Progress) -> Source:
    """A checkpoint folder with what the `.gguf` file of `source` holds, made on first use in the cache folder.

    The file itself is returned where a copy is not worth it or cannot be kept: it is large, there is no room, or its
    tokenizer would be another one when it is read from the copy.
    """
    path = Path(source.location) / source.options["gguf_file"]
    stamp = _stamp(path)
    folder = cache_dir() / "gguf" / f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if _reads(folder / _STAMP) == stamp:
        return _copy(source, folder)
    if path.stat().st_size > _MOST_BYTES:
        return source
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * _GROWTH * path.stat().st_size:
            return source
        return _keep(source, folder, stamp, progress)
    except OSError:
        return source


def _copy(source: Source, folder: Path) -> Source:
    return Source(str(folder), source.name, tokenizer_as_saved=True)


def _keep(source: Source, folder: Path, stamp: dict[str, Any], progress: Progress) -> Source:
    from filelock import FileLock

    with FileLock(folder.with_suffix(".lock")):
        if _reads(folder / _STAMP) == stamp:
            return _copy(source, folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as work:
            made = Path(work) / "made"
            if not _convert(source, made, progress):
                return source
            (made / _STAMP).write_text(json.dumps(stamp))
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return _copy(source, folder)


def _convert(source: Source, folder: Path, progress: Progress) -> bool:
    """Write a copy of the model and its tokenizer to `folder`; whether its tokenizer is the same."""
    import torch

    with quiet():
        progress(f"Converting {source.name} once", 0, 0)
        tokenizer = read_tokenizer(source, trust_remote_code=False)
        config = read_config(source, trust_remote_code=False)
        model, _ = read_model(source, config, trust_remote_code=False, dtype=torch.float32)
        save_checkpoint(model, tokenizer, folder)
        again = read_tokenizer(_copy(source, folder), trust_remote_code=False)
    return _says(again) == _says(tokenizer)


def _says(tokenizer: Any) -> tuple[Any, ...]:
    """All of a tokenizer that a prompt depends on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template)
    return backend, named, tokenizer.model_max_length, tokenizer("a b").input_ids


def _stamp(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another, and one reader of it."""
    import transformers

    state = path.stat()
    return {"bytes": state.st_size, "changed": state.st_mtime_ns, "transformers": transformers.__version__}


def _reads(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
