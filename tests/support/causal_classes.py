"""Every causal model class of the installed Transformers that generic tiny numbers make, with a compressed cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from headprof import HeadCache, compressed
from headprof.errors import HeadprofError
from headprof.models.checkpoint import quiet

CLASSES: dict[str, Any] = {
    config.__name__: config
    for config in MODEL_FOR_CAUSAL_LM_MAPPING  # type: ignore[attr-defined]
}
"""Configuration classes by name."""

PROMPT, NEW_TOKENS, WINDOW, BUDGET = 13, 6, 4, 5
_MOST_PARAMETERS = 200_000_000

_NUMBERS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "embedding_size": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "lru_width": 64,
    "d_model": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
}
_MLA = {"num_key_value_heads": 4}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["AXK1Config", "AXK2Config", "DeepseekV2Config", "DeepseekV3Config", "DeepseekV32Config", "Glm4MoeLiteConfig"],
        _MLA,
    ),
    **dict.fromkeys(["GlmMoeDsaConfig", "LongcatFlashConfig", "MiniCPM3Config", "YoutuConfig"], _MLA),
    "Dots3NoteTextConfig": _MLA,
    **dict.fromkeys(["BailingHybridConfig", "KimiLinearConfig"], _HYBRID | _MLA),
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxConfig": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 128,
        "vocab_size": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 64},
    },
    "GraniteMoeHybridConfig": _HYBRID,
    **dict.fromkeys(["Lfm2Config", "Lfm2MoeConfig"], _CONVOLUTIONS),
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "XmodConfig": {"default_language": "en_XX"},
    "CodeGenConfig": {"rotary_dim": 8},
    "GPTJConfig": {"rotary_dim": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 4,
        "vocab_size_per_layer_input": 128,
    },
    "XLNetConfig": {"d_head": 16},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "MptConfig": {"d_model": 64, "n_heads": 4, "n_layers": 4, "vocab_size": 128, "max_seq_len": 128},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16},
    "ReformerConfig": {"axial_pos_embds": False},
    "xLSTMConfig": {"num_heads": 4},
    "Gemma4TextConfig": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    "Gemma4UnifiedTextConfig": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    "Gemma4AssistantConfig": {"hidden_size_per_layer_input": 0},
}

_GIVEN_ONLY_IF_KNOWN = set(_NUMBERS) - {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}


@dataclass(frozen=True)
class Outcome:
    """What became of a class: `equal`, `refused`, `wrong` or `not built`, and why."""

    kind: str
    why: str = ""


def try_class(name: str) -> Outcome:
    """Generate with the full cache and with a compressed one that could hold it all, and compare the logits.

    Then once more with one that holds little, to see that it does.
    """
    torch.manual_seed(0)
    with silence():
        try:
            model = tiny_causal(CLASSES[name])
            ids = torch.randint(3, 120, (1, PROMPT))
            full = _logits(model, ids)
        except Exception as error:
            return Outcome("not built", _brief(error))
        try:
            with compressed(model, method="snapkv", budget=4096):
                ours = _logits(model, ids)
            with compressed(model, method="snapkv", budget=BUDGET):
                held = _held(model, ids)
        except HeadprofError as error:
            return Outcome("refused", str(error))
        except Exception as error:
            return Outcome("wrong", _brief(error))
        if not torch.allclose(_logits(model, ids), full, atol=1e-5):
            return Outcome("not built", "its own logits are not the same twice")
    if held > BUDGET + NEW_TOKENS - 1:
        return Outcome("wrong", f"holds {held} rows with a budget of {BUDGET}")
    difference = float((ours - full).abs().max())
    return (
        Outcome("equal")
        if difference < 1e-3 * max(1.0, float(full.abs().max()))
        else Outcome("wrong", f"logits differ by {difference:.3g}")
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _held(model: Any, ids: torch.Tensor) -> float:
    """The most rows that a KV head of a compressed cache holds after generating; infinite if it was another cache."""
    cache = _generated(model, ids).past_key_values
    return int(cache.lengths.max()) if isinstance(cache, HeadCache) else float("inf")


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens generated greedily, `[N, vocabulary]`."""
    logits = torch.cat(_generated(model, ids).logits).float()
    assert logits.isfinite().all(), "logits are not finite"
    assert len(logits) == NEW_TOKENS, "ends early"
    return logits


def _generated(model: Any, ids: torch.Tensor) -> Any:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2)
    model.generation_config.eos_token_id = None  # so that it does not end early
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        return_dict_in_generate=True,
        output_logits=True,
    )


def tiny_causal(config_class: Any) -> Any:
    """A model of this configuration class with generic tiny numbers and random weights."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]

    def config() -> Any:
        whole = tiny_config(config_class)
        return whole if model_class.config_class is config_class else whole.get_text_config()

    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class._from_config(config()).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"generic numbers make {size} parameters of it")
    model = model_class._from_config(config()).eval().requires_grad_(False)
    # Some of what a class begins with (zeros, ones, gates) would hide mistakes.
    for weight in model.parameters():
        if weight.ndim > 1 and weight.numel():
            weight.copy_(torch.randn_like(weight) * 0.15)
    return model


def tiny_config(config_class: Any) -> Any:
    """Generic tiny numbers in a configuration, and in those it is made of."""
    known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
    numbers = {key: value for key, value in _NUMBERS.items() if key in known or key not in _GIVEN_ONLY_IF_KNOWN}
    numbers |= _OVERRIDES.get(config_class.__name__, {})
    parts = getattr(config_class, "sub_configs", {})
    if not parts:
        return config_class(**numbers)
    made = {}
    for name, part in parts.items():
        if hasattr(part, "model_type") and part.__name__ != "AutoConfig":
            made[name] = tiny_config(part).to_dict()
    return config_class(**made | _OVERRIDES.get(config_class.__name__, {}))


@contextmanager
def silence() -> Iterator[None]:
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
