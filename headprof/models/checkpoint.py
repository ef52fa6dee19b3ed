"""Reading a checkpoint through Transformers: kept silent, and with every failure said in one sentence."""

from __future__ import annotations

import copy
import importlib
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from headprof.errors import ModelError

# Called with what is being done, how much of it is done, and how much there is (0 when unknown).
Progress = Callable[[str, int, int], None]

_GGUF_MAGIC = b"GGUF"
_GGUF_SHORT, _GGUF_STRING = 2, 8  # type codes of a 16-bit number and of a string in a GGUF header
_GGUF_HEADER_BYTES = 64 << 20  # larger than any header with its vocabulary
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

# Names of `tokenizer.ggml.pre` under which llama.cpp splits as GPT-2, as does the reader what it does not know.
_SPLIT_AS_GPT2 = ("", "default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum")

# What older checkpoints hold though a model makes it anew: rotary frequencies, causal masks.
_COMPUTED_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", "position_ids")
_ADAPTER_PARTS = (".lora_", ".modules_to_save.", ".base_layer.")
_MOST_NAMES = 3


def no_progress(description: str, completed: int, total: int) -> None:
    """The default `Progress`: says nothing."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is and what it is called.

    Attributes:
        location: a folder, or a hub id.
        name: what a profile records.
        options: further arguments of `from_pretrained`, such as `gguf_file` or `revision`.
        tokenizer_as_saved: whether its `tokenizer.json` counts alone, where the class that belongs to the model would
            make another tokenizer of it: Qwen's adds a normalizer.
    """

    location: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer_as_saved: bool = False

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first sentence of an error's text, for quoting inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].split(". ")[0].rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, log lines and warnings of Transformers and the hub client, and restore them after."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    # The GGUF reader uses tqdm directly, which no setting of Transformers reaches.
    gguf_bar = getattr(gguf_reader, "tqdm", None)
    if gguf_bar is not None:
        gguf_reader.tqdm = partial(gguf_bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if gguf_bar is not None:
            gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not hub_bars:
            enable_progress_bars()


def check_gguf(path: Path) -> None:
    """Raise `ModelError` unless file `path` starts as a GGUF file does, and holds a whole model."""
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(f"{path} is not a GGUF file; pass a .gguf file, a model folder or a hub id.")
    number = _SPLIT_NAME.search(path.name)
    parts = int(number[2]) if number else _gguf_short(path, b"split.count")
    if parts > 1:
        part = int(number[1]) if number else _gguf_short(path, b"split.no") + 1
        raise ModelError(
            f"{path} is part {part} of {parts} of a model: merge them with `llama-gguf-split --merge FIRST_PART "
            "WHOLE.gguf`, and pass the whole file."
        )


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint; raises `ModelError` when there is none or it is unknown."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.options)
    except Exception as error:
        raise _reading_error(source, "configuration", error) from error


def require_decoder(config: Any) -> None:
    """Raise `ModelError` unless the configuration is that of a decoder language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # An encoder such as BERT has a causal class too, but its checkpoints were not trained for it.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder
    if getattr(config, "is_encoder_decoder", False) or not (known or own_class):
        raise ModelError(
            f"A model of type {config.model_type} is not a decoder language model; "
            "pass one such as Llama, Qwen or Mistral."
        )


def outline(config: Any, attn: Sequence[str], trust_remote_code: bool) -> tuple[str, int]:
    """Build the model without weights to learn what it supports.

    Args:
        attn: attention implementations in order of preference.

    Returns:
        The first implementation that the architecture supports, and the number of parameters.

    Raises:
        ModelError: the architecture supports none of `attn`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    failure: Exception | None = None
    for name in attn:
        try:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), attn_implementation=name, trust_remote_code=trust_remote_code
                )
        except (ValueError, ImportError) as error:
            failure = error
            continue
        return name, sum(parameter.numel() for parameter in skeleton.parameters())
    raise ModelError(
        f"Models of type {config.model_type} cannot run with the attention implementation {attn[-1]}; use `auto`."
    ) from failure


def read_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a checkpoint; raises `ModelError` when there is none or only a slow one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reader: Any = PreTrainedTokenizerFast if source.tokenizer_as_saved else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.options)
    except Exception as error:
        raise _reading_error(source, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {source.name} is a slow one; headprof needs a fast one (a tokenizer.json) to find spans."
        )
    # A tokenizer class without its files loads as an empty vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{source.location} has no tokenizer.json; put the model's tokenizer files there.")
    if source.is_gguf:
        _split_as_trained(tokenizer, Path(source.location) / source.options["gguf_file"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _split_as_trained(tokenizer: Any, path: Path) -> None:
    """Split digits apart in a SmolLM tokenizer, which Transformers' GGUF reader leaves out.

    Without it, spaces and line breaks before a number become other tokens than those the model was trained on.

    Raises:
        ModelError: the file names a way to split text that the reader does not know, and would take GPT-2's for it.
    """
    from tokenizers import pre_tokenizers

    way = _gguf_string(path, b"tokenizer.ggml.pre").decode(errors="replace")
    if way == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif _gguf_string(path, b"tokenizer.ggml.model") == b"gpt2" and way not in _known_splits(way):
        raise ModelError(
            f"{path} splits text in a way that Transformers does not know ({way}), so its tokens would be wrong: pass "
            "the model as a safetensors folder with its tokenizer.json."
        )


def _known_splits(way: str) -> set[str]:
    """The ways to split text that the GGUF reader knows; `way` itself if it does not say."""
    try:
        reader: Any = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
        return {*reader.GGUF_PRE_TOKENIZER_SPLITS, *_SPLIT_AS_GPT2}
    except (ImportError, AttributeError):
        return {way}


def _gguf_value(path: Path, key: bytes) -> bytes:
    """What follows a key in a GGUF header; a full parse takes seconds, since it visits every token."""
    with path.open("rb") as file:
        header = file.read(_GGUF_HEADER_BYTES)
    at = header.find(struct.pack("<Q", len(key)) + key)
    return b"" if at < 0 else header[at + 8 + len(key) :][:4096]


def _gguf_string(path: Path, key: bytes) -> bytes:
    """One string of a GGUF header; empty if there is none."""
    value = _gguf_value(path, key)
    if len(value) < 12:
        return b""
    kind, length = struct.unpack_from("<IQ", value)
    return value[12 : 12 + length] if kind == _GGUF_STRING else b""


def _gguf_short(path: Path, key: bytes) -> int:
    """One 16-bit number of a GGUF header; 0 if there is none."""
    value = _gguf_value(path, key)
    kind, number = struct.unpack_from("<IH", value) if len(value) >= 6 else (None, 0)
    return number if kind == _GGUF_SHORT else 0


def read_model(source: Source, config: Any, trust_remote_code: bool, **options: Any) -> tuple[Any, list[str]]:
    """The model with its weights, in eval mode and without gradients; and what a user should know about these.

    Args:
        options: `dtype`, `attn_implementation` and `device_map` of `from_pretrained`.

    Raises:
        ModelError: weights are missing, damaged, of another shape, those of an adapter, or do not fit the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    try:
        model, report = auto_model.from_pretrained(
            source.location,
            config=config,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source.options,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{source.name} does not fit the GPU's memory; free some, pass --dtype bfloat16, or --device cpu."
        ) from error
    except Exception as error:
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and not source.is_gguf:
            raise _quantized_error(source, quantization, error) from error
        raise _reading_error(source, "weights", error) from error
    notes = _ignored_weights(source, report)
    _check_weights(source, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise adapter_error(source.location)
    if source.is_gguf:
        _forget_quantization(model)
    # A GGUF does not name its class, which is part of the fingerprint in the files that this package writes.
    model.config.architectures = model.config.architectures or [type(model).__name__]
    return model.eval().requires_grad_(False), notes


def _check_weights(source: Source, report: dict[str, Any]) -> None:
    """Transformers would go on with random numbers in place of weights that are missing or do not fit."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source.location} lacks {len(missing)} of the model's weights (the first is {missing[0]}); "
            "download the checkpoint again."
        )
    mismatched = sorted(key for key, *_ in report["mismatched_keys"])
    if mismatched:
        raise ModelError(
            f"{len(mismatched)} weights in {source.location} have another shape than its config.json says "
            f"(the first is {mismatched[0]}); download both again."
        )


def adapter_error(location: str | Path) -> ModelError:
    """What to say of an adapter in the place of a model."""
    return ModelError(
        f"{location} holds an adapter, not a whole model: merge it into its base model first (with peft, "
        "`model.merge_and_unload()` and `save_pretrained`), and pass the folder of the merged model."
    )


def _ignored_weights(source: Source, report: dict[str, Any]) -> list[str]:
    """Remarks about weights of the checkpoint that have no place in the model, which Transformers leaves out.

    Raises:
        ModelError: they are those of an adapter that was never merged, so the model would be another one.
    """
    names = sorted(name for name in report["unexpected_keys"] if not name.endswith(_COMPUTED_BUFFERS))
    if not names:
        return []
    if any(part in name for name in names for part in _ADAPTER_PARTS):
        raise adapter_error(source.location)
    shown = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES))
    return [
        f"{len(names)} weights in {source.location} have no place in the model and are left out, so it may answer "
        f"otherwise than it was trained to: {shown}."
    ]


def _forget_quantization(model: Any) -> None:
    """A GGUF's weights are plain once read; what is left of its quantization only keeps the model from being saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _quantized_error(source: Source, quantization: Any, error: Exception) -> ModelError:
    settings = quantization if isinstance(quantization, dict) else vars(quantization)
    method = settings.get("quant_method", "a method of its own")
    return ModelError(
        f"{source.name} is quantized with {getattr(method, 'value', method)}, which cannot be read here "
        f"({one_line(error)}): install what that names, or pass the model without quantization."
    )


def _reading_error(source: Source, part: str, error: Exception) -> ModelError:
    reason = one_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source.name} runs Python code of its own; read that code, and pass --trust-remote-code if you trust it."
        )
    if "does not recognize this architecture" in str(error):
        return ModelError(
            f"The installed Transformers does not know the architecture of {source.name}; upgrade transformers."
        )
    if source.is_gguf:
        path = Path(source.location) / source.options["gguf_file"]
        return ModelError(
            f"{path} is damaged, incomplete or of a kind that Transformers cannot read ({reason}); "
            "download it again, or pass the model as a safetensors folder."
        )
    if Path(source.location).is_dir():
        files = "tokenizer.json" if part == "tokenizer" else "files"
        return ModelError(
            f"The {part} of {source.name} cannot be read from {source.location} ({reason}); "
            f"put the model's complete {files} there."
        )
    return ModelError(
        f"The {part} of {source.name} cannot be had ({reason}); "
        "check the name and the network, or pass a local folder with --model."
    )
