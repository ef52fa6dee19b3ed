"""Numbers that overflow end every command in one sentence, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import headprof
from support.tiny_models import TEXT, load_tiny, save_tiny

from headprof.compression.generation import compress_document, generate_text
from headprof.compression.session import make_plan, prefill
from headprof.errors import ModelError

OVERFLOW = (
    "The model's numbers overflow in float32, so nothing it says can be trusted: download the checkpoint again, it "
    "is damaged."
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose last layer overflows, and a text."""
    place = tmp_path_factory.mktemp("overflow")
    weights = save_tiny(place / "model", "llama", chat=True) / "model.safetensors"
    damaged = load_file(weights)
    damaged["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(damaged, weights, {"format": "pt"})
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "Hi", "--method", "full"),
        ("generate", "--prompt", "Hi", "--method", "snapkv"),
        ("generate", "--prompt", "Hi", "--method", "snapkv", "--temperature", "1"),
        ("compress", "--file", "text.txt", "--method", "snapkv", "-o", "out.safetensors"),
        ("score", "--probes", "2", "--lengths", "400", "--no-tune", "-o", "out.safetensors"),
        ("score", "--probes", "2", "--lengths", "400", "--decode", "greedy", "-o", "out.safetensors"),
    ],
)
def test_overflow_is_one_sentence(place: Path, arguments: tuple[str, ...]) -> None:
    ended = headprof(place, *arguments, "--model", "model", "--device", "cpu")
    assert ended.returncode == 1 and not ended.stdout.strip()
    assert ended.stderr.strip().endswith(f"Error: {OVERFLOW}") and "Traceback" not in ended.stderr
    assert not list(place.glob("out*"))


def test_overflow_after_the_prompt_is_noticed_too() -> None:
    loaded = load_tiny()
    output = loaded.model.get_output_embeddings()
    steps: list[int] = []

    def overflow(_module, _args, logits):
        steps.append(1)
        return logits if len(steps) < 4 else logits * torch.nan

    output.register_forward_hook(overflow)
    with pytest.raises(ModelError, match="overflow"):
        generate_text(loaded, torch.arange(3, 30)[None], max_new_tokens=9, temperature=1.0)
    assert len(steps) == 4


def test_rows_that_overflow_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="snapkv", budget=32)

    def damaging(model, ids, cache):
        logits = prefill(model, ids, cache)
        cache.head_layers[0].storage.rows.values[0] = torch.inf
        return logits

    monkeypatch.setattr("headprof.compression.filling.prefill", damaging)
    with pytest.raises(ModelError, match="overflow"):
        compress_document(loaded, TEXT, plan)
