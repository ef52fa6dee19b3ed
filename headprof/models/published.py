"""Published models by the numbers of their configurations: enough to know their heads, and to measure their speed."""

from __future__ import annotations

from typing import Any

from headprof.errors import UsageError


def _shape(
    model_type: str,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    mlp: int,
    vocab: int,
    positions: int,
    theta: float,
    eps: float,
    tied: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Arguments of `AutoConfig.for_model`."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **others,
    }


_8B: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096}
_135M: dict[str, Any] = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "tied": True}

SHAPES: dict[str, dict[str, Any]] = {
    # With the context of Llama 3.1: Llama 3 itself was made for 8192 tokens.
    "llama-3-8b": _shape("llama", layers=32, **_8B, mlp=14336, vocab=128256, positions=131072, theta=5e5, eps=1e-5),
    # Version 0.3; earlier ones have a sliding window.
    "mistral-7b": _shape(
        "mistral", layers=32, **_8B, mlp=14336, vocab=32768, positions=32768, theta=1e6, eps=1e-5, sliding_window=None
    ),
    "qwen3-8b": _shape("qwen3", layers=36, **_8B, mlp=12288, vocab=151936, positions=40960, theta=1e6, eps=1e-6),
    "smollm2-135m": _shape("llama", layers=30, **_135M, mlp=1536, vocab=49152, positions=8192, theta=1e5, eps=1e-5),
}
"""Published models by the numbers of their configurations, for speed without weights."""


def find_shape(name: str) -> dict[str, Any]:
    """The numbers of a published model's configuration.

    Raises:
        UsageError: there is no shape of this name; the message lists those there are.
    """
    if name not in SHAPES:
        raise UsageError(f"There is no model shape {name!r}: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]
