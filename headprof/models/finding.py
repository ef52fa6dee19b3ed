"""Where a model's files are, and what it is called: hub id, folder, `.gguf` file, or the embedded default."""

from __future__ import annotations

from pathlib import Path

from headprof.errors import ModelError
from headprof.models.checkpoint import Progress, Source, adapter_error, check_gguf
from headprof.models.embedded import EMBEDDED, cache_dir, embedded_model_dir

# What a checkpoint consists of; anything else in its folder, such as a picture, was put there by somebody.
_MODEL_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".py",
)


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
        if (path / "adapter_config.json").is_file():
            raise adapter_error(path)
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


def model_files(model: str | None) -> list[Path]:
    """The files of a model as far as they are on this machine, found without loading or downloading anything."""
    path = Path(model or "").expanduser()
    if model is not None and path.is_file():
        return [path]
    if model_name(model) == EMBEDDED and (model is None or not path.exists()):
        folder = cache_dir() / EMBEDDED.lower()
    elif path.is_dir():
        folder = path
    else:
        folder = _hub_folder(model or "")
    return [file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES] if folder.is_dir() else []


def _hub_folder(repo: str) -> Path:
    """Where the hub's cache has a model; some folder that is not there when it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        config = None
    return Path(config).parent if isinstance(config, str) else Path(repo) / "absent"


def looks_like_path(model: str) -> bool:
    """Whether a name that is no file can only have been meant as one: hub ids are `name` or `org/name`."""
    return (
        not model
        or model.startswith((".", "~", "/"))
        or "\\" in model
        or model.endswith((".gguf", ".safetensors", ".bin", "/"))
        or model.count("/") > 1
    )
