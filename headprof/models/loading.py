"""Loading a model with its tokenizer: the embedded default, a local folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ModelError, UsageError
from headprof.models.checkpoint import (
    Progress,
    Source,
    no_progress,
    one_line,
    outline,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
    require_decoder,
)
from headprof.models.converted import converted
from headprof.models.embedded import EMBEDDED
from headprof.models.finding import find_model, model_name
from headprof.models.gguf_reader import parsed_once
from headprof.models.placement import (
    ATTENTIONS,
    DTYPES,
    attention_order,
    choose_device,
    placement,
    split_device,
    split_placement,
)
from headprof.models.published import find_shape
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard, check_split

if TYPE_CHECKING:
    import torch

_NO_LIMIT = 1 << 31


@dataclass
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: a Transformers decoder language model, in eval mode, without gradients.
        tokenizer: its fast tokenizer, with a padding token.
        shape: its heads.
        name: what a profile records: the hub id, or the stem of the folder or file.
        max_positions: longest sequence it was made for, in tokens.
        notes: what its user should know, such as weights of the checkpoint that were left out.
        given: how the user named it, with which it is found again; empty where it was made otherwise.
    """

    model: Any
    tokenizer: Any
    shape: HeadShape
    name: str
    max_positions: int
    notes: tuple[str, ...] = ()
    given: str = ""

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def shard(self) -> HeadShard:
        """Which of its heads this process has."""
        return HeadShard.of_model(self.model)

    def full_cache_bytes(self, tokens: int) -> int:
        """Bytes that the full cache of this many tokens of one sequence takes."""
        return self.shape.cache_bytes_per_token(self.dtype.itemsize) * tokens


@parsed_once()
def load_model(
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str = "auto",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    tp: int = 1,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        model: hub id, model folder, `.gguf` file, or `None` for the embedded SmolLM2.
        device: `auto` (CUDA where there is one, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`. A model that is too
            large for the GPU is spread over all GPUs and the CPU.
        dtype: one of `DTYPES`. `auto` is float32 on a CPU with room for it, and else a 16-bit type.
        attn: one of `ATTENTIONS`. `auto` is the fastest that is installed and that the architecture supports.
        trust_remote_code: run Python code that comes with the checkpoint.
        chat_template: instead of the tokenizer's own: a file with one, the name of one of the tokenizer's, or `none`.
        tp: how many processes hold the model together, each its own heads (see `models.tensor_parallel`); they have to
            be all that `torch.distributed` knows of.
        progress: told about the stages that take time.

    Raises:
        UsageError: an unknown device, dtype or attention implementation, or no such chat template.
        ModelError: the model cannot be found, read or used.

    Warns:
        UserWarning: each of the model's `notes`.
    """
    import torch

    _check_option("dtype", dtype, DTYPES)
    _check_option("attention implementation", attn, ATTENTIONS)
    template = None if chat_template is None else _template_file(chat_template)
    if tp > 1:
        chosen = split_device(device, has_cuda=torch.cuda.is_available())
    else:
        chosen = choose_device(device, num_cuda=torch.cuda.device_count(), has_mps=torch.backends.mps.is_available())
    source = find_model(model, progress or no_progress)
    if source.is_gguf:
        source = converted(source, progress or no_progress)
    with quiet():
        config = read_config(source, trust_remote_code)
        require_decoder(config)
        vocab_size = HeadShape.from_config(config).vocab_size
        if tp > 1:
            _check_split(source, config, tp)
        flash = chosen.startswith("cuda") and dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
        attention, num_parameters = outline(config, attention_order(attn, flash), trust_remote_code)
        # Before the weights: a missing tokenizer should not cost minutes of loading.
        tokenizer = read_tokenizer(source, trust_remote_code)
        _check_vocabulary(source, tokenizer, vocab_size)
        if chat_template is not None:
            tokenizer.chat_template = _chosen_template(tokenizer, chat_template, template)
        if tp > 1:
            placed = _placed_alike(split_placement(source, config, chosen, dtype, num_parameters, tp), tp)
        else:
            placed = placement(source, config, chosen, dtype, num_parameters)
        loaded, notes = read_model(source, config, trust_remote_code, attn_implementation=attention, **placed)
    if loaded.generation_config is not None and loaded.generation_config.pad_token_id is None:
        loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    shape = HeadShape.from_config(loaded.config)
    for note in notes:
        warnings.warn(note, stacklevel=3)  # the caller's line, past the decorator
    longest = _max_positions(config, tokenizer)
    return LoadedModel(loaded, tokenizer, shape, source.name, longest, tuple(notes), model or "")


def _check_split(source: Source, config: Any, size: int) -> None:
    """
    Raises:
        ModelError: this checkpoint cannot be held by so many processes together.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() != size:
        raise ModelError(f"Here are not the {size} processes that are to hold the model: start them with torchrun.")
    if source.is_gguf:
        raise ModelError(
            f"The .gguf file of {source.name} is read as a whole and cannot be split: pass the model as a safetensors "
            "folder, or leave --tp away."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{source.name} is quantized, and its weights cannot be split: pass the model without quantization, or "
            "leave --tp away."
        )
    check_split(config, source.name, HeadShape.from_config(config), size)


def _placed_alike(placed: dict[str, Any], size: int) -> dict[str, Any]:
    """The same in all processes, which may have found different amounts of memory free."""
    import torch.distributed as dist

    return placed | {"dtype": HeadShard(dist.get_rank(), size).of_first(placed["dtype"])}


def require_finite(numbers: torch.Tensor, dtype: torch.dtype) -> None:
    """
    Raises:
        ModelError: some of these numbers, which a model of this type came to, are infinite or none at all.
    """
    if not numbers.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        mend = "download the checkpoint again, it is damaged" if kind == "float32" else "pass --dtype float32"
        raise ModelError(f"The model's numbers overflow in {kind}, so nothing it says can be trusted: {mend}.")


def model_shape(model: str | None = None, trust_remote_code: bool = False) -> HeadShape:
    """The shape of a model's heads from its configuration alone: equal to that of `load_model`, without the weights.

    Args:
        model: as for `load_model`. The embedded model needs no network.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        ModelError: the configuration cannot be found or read, or is not that of a decoder.
    """
    on_disk = model is not None and Path(model).expanduser().exists()
    if model_name(model) == EMBEDDED and not on_disk:
        return published_shape("smollm2-135m")
    source = find_model(model, no_progress, weights=False)
    with quiet():
        config = read_config(source, trust_remote_code)
        require_decoder(config)
    return _named_shape(config)


def published_shape(name: str) -> HeadShape:
    """The shape of a published model by a name in `published.SHAPES`; raises `UsageError` for another name."""
    from transformers import AutoConfig

    return _named_shape(AutoConfig.for_model(**find_shape(name)))


def _check_option(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"Unknown {what} {value!r}; pass one of {', '.join(known)}.")


def _named_shape(config: Any) -> HeadShape:
    """The shape with the model's class for its architecture, also where the configuration does not name it (a GGUF)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if not getattr(config, "architectures", None) and type(config) in classes:
        config.architectures = [classes[type(config)].__name__]
    return HeadShape.from_config(config)


def _template_file(name: str) -> str | None:
    """The text of a file with a chat template; `None` where the name is that of no file."""
    path = Path(name).expanduser()
    if name == "none" or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The chat template {name} cannot be read ({one_line(error)}): give a text file.") from error


def _chosen_template(tokenizer: Any, name: str, text: str | None) -> str | None:
    """The chat template that was asked for by name, or the text of its file."""
    if text is not None or name == "none":
        return text
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name not in named:
        known = f"one of {', '.join(sorted(named))}, " if named else ""
        raise UsageError(f"There is no chat template {name}: give --chat-template a file, {known}or none.")
    return named[name]


def _check_vocabulary(source: Source, tokenizer: Any, vocab_size: int) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ModelError(
            f"The tokenizer of {source.name} has token ids up to {largest} but the model only {vocab_size}; "
            "put the model's own tokenizer beside it."
        )


def _max_positions(config: Any, tokenizer: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return min(int(limit), _NO_LIMIT)
