"""Loading a model with its tokenizer: the embedded default, a local folder, a `.gguf` file, or a hub id."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ModelError, UsageError
from headprof.models.checkpoint import (
    Progress,
    Source,
    check_gguf,
    no_progress,
    outline,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
    require_decoder,
)
from headprof.models.embedded import EMBEDDED, embedded_model_dir
from headprof.models.published import find_shape
from headprof.models.shape import HeadShape
from headprof.utils.memory import free_bytes

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")

# Shares of the free memory that weights may take, so that activations and a cache fit beside them.
_CPU_SHARE = 0.8
_GPU_SHARE = 0.85

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
    """

    model: Any
    tokenizer: Any
    shape: HeadShape
    name: str
    max_positions: int

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def full_cache_bytes(self, tokens: int) -> int:
        """Bytes that the full cache of this many tokens of one sequence takes."""
        return self.shape.cache_bytes_per_token(self.dtype.itemsize) * tokens


def load_model(
    model: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str = "auto",
    trust_remote_code: bool = False,
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
        progress: told about the stages that take time.

    Raises:
        UsageError: an unknown device, dtype or attention implementation.
        ModelError: the model cannot be found, read or used.
    """
    import torch

    _check_option("dtype", dtype, DTYPES)
    _check_option("attention implementation", attn, ATTENTIONS)
    place = choose_device(device, num_cuda=torch.cuda.device_count(), has_mps=torch.backends.mps.is_available())
    source = find_model(model, progress or no_progress)
    with quiet():
        config = read_config(source, trust_remote_code)
        require_decoder(config)
        vocab_size = _shape(source, config).vocab_size
        flash = place.startswith("cuda") and dtype != "float32" and importlib.util.find_spec("flash_attn") is not None
        attention, num_parameters = outline(config, attention_order(attn, flash), trust_remote_code)
        # Before the weights: a missing tokenizer should not cost minutes of loading.
        tokenizer = read_tokenizer(source, trust_remote_code)
        _check_vocabulary(source, tokenizer, vocab_size)
        plan = _placement(source, config, place, dtype, num_parameters)
        loaded = read_model(source, config, trust_remote_code, attn_implementation=attention, **plan)
    if loaded.generation_config is not None and loaded.generation_config.pad_token_id is None:
        loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    shape = HeadShape.from_config(loaded.config)
    return LoadedModel(loaded, tokenizer, shape, source.name, _max_positions(config, tokenizer))


def require_finite(numbers: torch.Tensor, dtype: torch.dtype) -> None:
    """
    Raises:
        ModelError: some of these numbers, which a model of this type came to, are infinite or none at all.
    """
    if not numbers.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise ModelError(f"The model's numbers overflow in {kind}: choose another type with --dtype, such as float32.")


def model_name(model: str | None) -> str:
    """What a profile of `model` records as the model's name, found without loading it (see `LoadedModel.name`)."""
    if model is None or model.lower() == EMBEDDED.lower():
        return EMBEDDED
    path = Path(model).expanduser()
    if not path.exists():
        return path.stem if path.suffix == ".gguf" else model
    path = path.resolve()
    if path.is_file():
        return path.stem
    # A snapshot in the hub's cache lies in models--ORG--NAME/snapshots/COMMIT.
    folder = path.parent.parent.name
    if path.parent.name == "snapshots" and folder.startswith("models--"):
        return folder.removeprefix("models--").replace("--", "/")
    return path.name


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
    return _named_shape(source, config)


def published_shape(name: str) -> HeadShape:
    """The shape of a published model by a name in `published.SHAPES`; raises `UsageError` for another name."""
    from transformers import AutoConfig

    return _named_shape(Source(name, name), AutoConfig.for_model(**find_shape(name)))


def find_model(model: str | None, progress: Progress, *, weights: bool = True) -> Source:
    """Find a model's files, downloading them where needed; without `weights` a hub model's are left there.

    Raises:
        ModelError: there is no such file, folder or hub model, or it cannot be downloaded.
    """
    name = model_name(model)
    if model is None or (name == EMBEDDED and not Path(model).exists()):
        return Source(str(embedded_model_dir(progress)), name)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {model} has no config.json; pass the folder that holds one, or a .gguf file.")
        return Source(str(path), name)
    if path.is_file():
        check_gguf(path)
        return Source(str(path.parent), name, {"gguf_file": path.name})
    if looks_like_path(model):
        raise ModelError(f"There is no file or folder {model}; check the path, or pass a hub id such as org/name.")

    from headprof.models.hub import find_on_hub

    return find_on_hub(model, progress, weights=weights)


def looks_like_path(model: str) -> bool:
    """Whether a name that is no file can only have been meant as one: hub ids are `name` or `org/name`."""
    return (
        not model
        or model.startswith((".", "~", "/"))
        or "\\" in model
        or model.endswith((".gguf", ".safetensors", ".bin", "/"))
        or model.count("/") > 1
    )


def choose_device(requested: str, *, num_cuda: int, has_mps: bool) -> str:
    """`cpu`, `mps` or `cuda:N` for a requested device; raises `UsageError` or `ModelError` when it cannot be had."""
    if requested == "auto":
        return "cuda:0" if num_cuda else "cpu"
    if requested == "cpu":
        return requested
    if requested == "mps":
        if not has_mps:
            raise ModelError("There is no MPS device here; pass --device cpu.")
        return requested
    kind, _, index = requested.partition(":")
    if kind != "cuda" or (":" in requested and not index.isdecimal()):
        raise UsageError(f"Unknown device {requested!r}; pass auto, cpu, cuda, cuda:N or mps.")
    if not num_cuda:
        raise ModelError(
            "PyTorch sees no CUDA device; pass --device cpu, or check the driver and that PyTorch is a CUDA build."
        )
    if int(index or 0) >= num_cuda:
        raise ModelError(f"There is no device {requested}; the last one is cuda:{num_cuda - 1}.")
    return f"cuda:{int(index or 0)}"


def choose_dtype(
    requested: str, *, device: str, stored: str | None, num_parameters: int, free_bytes: int, has_bfloat16: bool
) -> str:
    """Name of the dtype to load weights in.

    Args:
        requested: one of `DTYPES`.
        device: as `choose_device` returns it.
        stored: dtype of the checkpoint, if it says so.
        free_bytes: memory that is free on `device`.
        has_bfloat16: whether the GPU computes in bfloat16.
    """
    if requested != "auto":
        return requested
    if device == "cpu":
        return "float32" if 4 * num_parameters <= _CPU_SHARE * free_bytes else "bfloat16"
    if stored == "float16" or not has_bfloat16:
        return "float16"
    return "bfloat16"


def attention_order(requested: str, flash: bool) -> list[str]:
    """Attention implementations to try, best first; `flash` says whether FlashAttention 2 can be used."""
    if requested != "auto":
        return [requested]
    return ["flash_attention_2", "sdpa", "eager"] if flash else ["sdpa", "eager"]


def _check_option(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"Unknown {what} {value!r}; pass one of {', '.join(known)}.")


def _shape(source: Source, config: Any) -> HeadShape:
    try:
        return HeadShape.from_config(config)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{source.name} ({config.model_type}) has no attention heads to profile; pass a Transformer decoder."
        ) from error


def _named_shape(source: Source, config: Any) -> HeadShape:
    """The shape with the model's class for its architecture, also where the configuration does not name it (a GGUF)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if not getattr(config, "architectures", None) and type(config) in classes:
        config.architectures = [classes[type(config)].__name__]
    return _shape(source, config)


def _check_vocabulary(source: Source, tokenizer: Any, vocab_size: int) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ModelError(
            f"The tokenizer of {source.name} has token ids up to {largest} but the model only {vocab_size}; "
            "put the model's own tokenizer beside it."
        )


def _placement(source: Source, config: Any, device: str, dtype: str, num_parameters: int) -> dict[str, Any]:
    """The `dtype` and `device_map` arguments of `from_pretrained`."""
    import torch

    on_gpu = device.startswith("cuda")
    free = free_bytes(device)
    if getattr(config, "quantization_config", None) is not None and not source.is_gguf:
        # A quantized checkpoint knows its own types, and its size is not that of its parameters.
        return {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype), "device_map": {"": device}}
    chosen = choose_dtype(
        dtype,
        device=device,
        stored=str(config.dtype).removeprefix("torch.") if getattr(config, "dtype", None) else None,
        num_parameters=num_parameters,
        free_bytes=free,
        has_bfloat16=not on_gpu or torch.cuda.is_bf16_supported(),
    )
    weight_dtype = getattr(torch, chosen)
    weight_bytes = num_parameters * weight_dtype.itemsize
    if on_gpu and weight_bytes > _GPU_SHARE * free:
        return {"dtype": weight_dtype, "device_map": "auto"}
    if weight_bytes > free:
        raise ModelError(
            f"{source.name} needs {weight_bytes / 1e9:.1f} GB in {chosen} but only {free / 1e9:.1f} GB are free; "
            f"pass {'--dtype bfloat16' if chosen == 'float32' else 'a smaller model'} or free some memory."
        )
    return {"dtype": weight_dtype, "device_map": None if device == "cpu" else {"": device}}


def _max_positions(config: Any, tokenizer: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return min(int(limit), _NO_LIMIT)
