"""A `.gguf` file is parsed once while a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import pytest
import torch
from support.tiny_models import save_tiny_gguf

from headprof.models import converted
from headprof.models.gguf_reader import parsed_once
from headprof.models.loading import load_model


@pytest.mark.parametrize("most_bytes", [10**9, 10])
@pytest.mark.parametrize("same_tokenizer", [True, False])
def test_a_gguf_is_parsed_once(
    most_bytes: int, same_tokenizer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied or not, and where a copy is thrown away again."""
    made = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, mode="r"):
            made.append(Path(path))
            super().__init__(path, mode)

    path = tmp_path / "tiny.gguf"
    original = save_tiny_gguf(path)
    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(converted, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(converted, "_MOST_BYTES", most_bytes)
    if not same_tokenizer:
        monkeypatch.setattr(converted, "_says", lambda tokenizer: object())
    ids = torch.arange(3, 60)[None]
    loaded = load_model(str(path), device="cpu")
    assert [each.name for each in made] == [path.name]
    assert torch.allclose(loaded.model(ids).logits, original(ids).logits, atol=1e-4)
    assert gguf.GGUFReader is Counted


def test_a_gguf_that_changes_is_parsed_anew(tmp_path: Path) -> None:
    path, plain = tmp_path / "tiny.gguf", gguf.GGUFReader
    save_tiny_gguf(path)
    with parsed_once():
        first = gguf.GGUFReader(path)
        with parsed_once():
            assert gguf.GGUFReader(str(path)) is first
        assert gguf.GGUFReader(path, "c") is not first
        save_tiny_gguf(path, seed=1)
        os.utime(path, ns=(1, 1))
        assert gguf.GGUFReader(path) is not first
    assert gguf.GGUFReader is plain
