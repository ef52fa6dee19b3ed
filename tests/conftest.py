"""Fixtures that many tests share. Tests never reach for the network unless they are about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# The hub client reads these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that share the cores must not have as many threads each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.spread import SPREAD, spread
from support.tiny_models import save_tiny, save_tiny_gguf

from headprof.models.loading import LoadedModel, load_model

settings.register_profile("without deadlines", deadline=None)  # which a busy machine misses
settings.load_profile("without deadlines")


@pytest.fixture(scope="session", autouse=True)
def _copies_of_gguf_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep copies of tiny `.gguf` files out of the user's cache."""
    folder = tmp_path_factory.mktemp("copies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headprof.models.converted.cache_dir", lambda: folder)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=("all", "spread", "rest"),
        default="all",
        help=f"all; spread: of each test at most {SPREAD} cases, always the same, and none marked `long`; or the rest.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `slow` or `processes` unless `-m` names them, and cases that are not asked for."""
    unasked = [mark for mark in ("slow", "processes") if mark not in config.option.markexpr]
    left_out = {item for item in items if any(map(item.get_closest_marker, unasked))}
    if config.option.cases != "all":
        quick = [item for item in items if item not in left_out and not item.get_closest_marker("long")]
        chosen = {quick[at] for at in spread([item.nodeid for item in quick])}
        left_out |= chosen if config.option.cases == "rest" else set(items) - chosen
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The embedded model (its first use on a machine downloads 93 MB). For tests marked `model`; do not change it."""
    return load_model(None, device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with grouped-query attention and a chat template, as a checkpoint folder."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", "llama", chat=True)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny llama as a `.gguf` file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    save_tiny_gguf(path)
    return path


@pytest.fixture
def tiny(tiny_folder: Path) -> LoadedModel:
    """A freshly loaded tiny llama, which a test may change."""
    return load_model(str(tiny_folder), device="cpu")
