"""Tiny random models and a tiny tokenizer, so that most tests need no download and run in milliseconds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from headprof.models.checkpoint import quiet
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3")

BOS, EOS, PAD = "<|start|>", "<|end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

TEXT = (
    "The lighthouse keeper counted nine grey boats before breakfast, and wrote the number on the kitchen wall. "
    "Her brother, who sold rope in the harbor, said that there were only eight; the ninth was a whale. "
    "What is the code of the green door? The code of the green door is amber falcon 42. "
    "Every evening the two of them walked to the end of the pier and looked for lights on the other shore. "
    "In 1907 the old bridge was 120 meters long; in 1935 the new bridge was 365 meters long. "
    "Which of them is older, and who keeps the key? Remember the answer: it was the second letter, not the first.\n"
)

VOCAB_SIZE = 512


@cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, vocab_size: int = VOCAB_SIZE, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text round-trips); ids 0, 1, 2 are bos, eos, pad; `chat` adds a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    arch: str = "llama",
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    layers: int = 2,
    head_dim: int = 16,
    hidden: int = 64,
    vocab: int = VOCAB_SIZE,
    sliding_window: int | None = None,
    max_positions: int = 4096,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn: str | None = None,
) -> PreTrainedModel:
    """A model of architecture `arch` (one of `ARCHITECTURES`) with seeded random weights, in eval mode on the CPU.

    Args:
        num_heads, num_kv_heads: equal for MHA, a multiple for GQA, `num_kv_heads=1` for MQA.
        head_dim: width of one head; `phi3` and `qwen2` take `hidden // num_heads` instead.
        sliding_window: window in tokens for `mistral` (every layer) and `gemma2`, `gemma3` (the first layer, then
            every other one, default 8); ignored elsewhere.
        attn: attention implementation; by default what Transformers picks (`sdpa`, for `gemma2` `eager`).
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        options = _options(arch, layers, sliding_window, num_heads, num_kv_heads, head_dim, hidden)
        config = AutoConfig.for_model(
            "gemma3_text" if arch == "gemma3" else arch,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            vocab_size=vocab,
            max_position_embeddings=max_positions,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            # The usual 0.02 gives almost uniform attention, which would hide most mistakes.
            initializer_range=0.2,
            **options,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    finally:
        torch.random.set_rng_state(torch_state)
    # Transformers sets this only when it saves; the fingerprint of a model in memory needs it too.
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False)


def _options(
    arch: str, layers: int, window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, hidden: int
) -> dict[str, Any]:
    heads: dict[str, Any] = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    if arch not in ("phi3", "qwen2"):
        heads["head_dim"] = head_dim
    match arch:
        case "llama" | "qwen2" | "qwen3" | "phi3":
            return heads
        case "mistral":
            return heads | {"sliding_window": window}
        case "gemma2" | "gemma3":
            kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
            return heads | {
                "sliding_window": window or 8,
                "layer_types": kinds,
                "query_pre_attn_scalar": head_dim,
            }
    raise ValueError(f"no tiny model of architecture {arch!r}")


def three_layers(arch: str, num_kv_heads: int) -> PreTrainedModel:
    """A tiny model; Gemma-2 with eager attention, since sdpa, the default of older versions, forgets its softcap."""
    attn = "eager" if arch == "gemma2" else None
    return tiny_model(arch, num_kv_heads=num_kv_heads, layers=3, attn=attn)


def load_tiny(arch: str = "llama", **options: Any) -> LoadedModel:
    """`tiny_model(arch, **options)` with its tokenizer and a chat template, as loading gives it: `tiny-<arch>`."""
    model = tiny_model(arch, **options)
    return LoadedModel(model, tiny_tokenizer(chat=True), HeadShape.from_config(model.config), f"tiny-{arch}", 4096)


def save_tiny(path: Path, arch: str = "llama", *, chat: bool = False, **options: Any) -> Path:
    """Write `tiny_model(arch, **options)` and its tokenizer to folder `path` as a Hugging Face checkpoint."""
    model = tiny_model(arch, **options)
    with quiet():
        model.save_pretrained(path)
    tiny_tokenizer(vocab_size=model.config.vocab_size, chat=chat).save_pretrained(path)
    return path


def save_tiny_gguf(
    path: Path, *, arch: str = "llama", pre_tokenizer: str = "default", chat: bool = True, **options: Any
) -> PreTrainedModel:
    """Write a tiny llama, or another `arch`, with its tokenizer to the file `path` as a GGUF, and return the model.

    Args:
        arch: `llama` or `qwen2`.
        pre_tokenizer: the file's `tokenizer.ggml.pre`, such as `smollm`.
        options: those of `tiny_model`.
    """
    from gguf import GGUFWriter

    model = tiny_model(arch, **options)
    writer = GGUFWriter(path, arch)
    _write_header(writer, model.config)
    _write_tokenizer(writer, tiny_tokenizer(vocab_size=model.config.vocab_size), pre_tokenizer)
    if chat:
        writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        laid_out = _gguf_layout(name, weight, model.config) if arch == "llama" else weight
        writer.add_tensor(_gguf_name(name), laid_out.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_header(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, pre_tokenizer: str) -> None:
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in (BOS, EOS, PAD) else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in trained["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        return f"{names[name.removesuffix('.weight')]}.weight"
    layer, part = name.removeprefix("model.layers.").split(".", maxsplit=1)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    part, kind = part.rsplit(".", maxsplit=1)
    return f"blk.{layer}.{names[part]}.{kind}"


def _gguf_layout(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """GGUF pairs neighboring dimensions for the rotary embedding, Transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            halves = weight.reshape(count, 2, config.head_dim // 2, -1)
            return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
    return weight
