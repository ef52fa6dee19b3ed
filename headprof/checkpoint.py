"""Reading a checkpoint through Transformers: kept silent, and with every failure said in one sentence."""

from __future__ import annotations

import copy
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


def no_progress(description: str, completed: int, total: int) -> None:
    """The default `Progress`: says nothing."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is and what it is called.

    Attributes:
        location: a folder, or a hub id.
        name: what a profile records.
        options: further arguments of `from_pretrained`, such as `gguf_file` or `revision`.
    """

    location: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error's text, for quoting inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".:") if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, log lines and warnings of Transformers and the hub client, and restore them after."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    # The GGUF reader uses tqdm directly, which no setting of Transformers reaches.
    gguf_bar = getattr(gguf_reader, "tqdm", None)
    if gguf_bar is not None:
        gguf_reader.tqdm = partial(gguf_bar, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
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
    """Raise `ModelError` unless `path` starts as a GGUF file does and holds every tensor that its header lists."""
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(f"{path} is not a GGUF file; pass a .gguf file, a model folder or a hub id.")
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:  # the reader's failures on damaged bytes have no common class
        raise ModelError(f"{path} is damaged or incomplete ({one_line(error)}); download it again.") from error


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint; raises `ModelError` when there is none or it is unknown."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.options)
    except Exception as error:
        raise _reading_error(source, "configuration", error) from error


def outline(config: Any, attn: Sequence[str], trust_remote_code: bool) -> tuple[str, int]:
    """Build the model without weights to learn what it supports.

    Args:
        attn: attention implementations in order of preference.

    Returns:
        The first implementation that the architecture supports, and the number of parameters.

    Raises:
        ModelError: the configuration is not that of a decoder language model, or supports none of `attn`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _require_decoder(config)
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
    if failure is not None and "configuration class" in str(failure):
        raise _not_a_decoder(config) from failure
    raise ModelError(
        f"Models of type {config.model_type} cannot run with the attention implementation {attn[-1]}; use `auto`."
    ) from failure


def _require_decoder(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # An encoder such as BERT has a causal class too, but its checkpoints were not trained for it.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise _not_a_decoder(config)


def _not_a_decoder(config: Any) -> ModelError:
    return ModelError(
        f"A model of type {config.model_type} is not a decoder language model; pass one such as Llama, Qwen or Mistral."
    )


def read_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a checkpoint; raises `ModelError` when there is none or only a slow one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **source.options
        )
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
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def read_model(source: Source, config: Any, trust_remote_code: bool, **options: Any) -> Any:
    """The model with its weights, in eval mode and without gradients.

    Args:
        options: `dtype`, `attn_implementation` and `device_map` of `from_pretrained`.

    Raises:
        ModelError: weights are missing, damaged, of another shape, or do not fit the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **source.options,
            **options,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{source.name} does not fit the GPU's memory; free some, pass --dtype bfloat16, or --device cpu."
        ) from error
    except Exception as error:
        raise _reading_error(source, "weights", error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # Transformers would go on with random numbers in their place.
        raise ModelError(
            f"{source.location} lacks {len(missing)} of the model's weights (the first is {missing[0]}); "
            "download the checkpoint again."
        )
    if source.is_gguf:
        _forget_quantization(model)
    return model.eval().requires_grad_(False)


def _forget_quantization(model: Any) -> None:
    """A GGUF's weights are plain once read; what is left of its quantization only keeps the model from being saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _reading_error(source: Source, part: str, error: Exception) -> ModelError:
    reason = one_line(error)
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source.name} runs Python code of its own; read that code, and pass --trust-remote-code if you trust it."
        )
    if "does not recognize this architecture" in str(error):
        return ModelError(f"The installed Transformers does not know {source.name} ({reason}); upgrade transformers.")
    if Path(source.location).is_dir():
        return ModelError(
            f"The {part} of {source.name} cannot be read from {source.location} ({reason}); "
            "check that the folder is complete and undamaged."
        )
    return ModelError(
        f"The {part} of {source.name} cannot be had ({reason}); "
        "check the name and the network, or pass a local folder with --model."
    )
