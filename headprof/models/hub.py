"""Finding a model on the Hugging Face hub, without minutes of retries when there is no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headprof.errors import ModelError
from headprof.models.checkpoint import Progress, Source, one_line

_CONNECT_SECONDS = 10.0


def find_on_hub(repo: str, progress: Progress, *, weights: bool = True) -> Source:
    """Where to read hub model `repo` from: the hub, its weights downloaded with `progress`, or else the hub's cache.

    Without `weights` the cache comes first, since a configuration hardly ever changes.

    Raises:
        ModelError: there is no such model, it is gated, or the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        cached = _is_cached(repo)
    except HFValidationError as error:
        raise ModelError(
            f"{repo!r} is neither a file or folder nor a hub id such as meta-llama/Llama-3.2-1B; check the name."
        ) from error
    if cached and not weights:
        return Source(repo, repo, {"local_files_only": True})
    if is_offline_mode():
        failure: Exception = OfflineModeIsEnabled()
    else:
        try:
            _ask(repo)
        except Exception as error:  # the hub client's network errors come from whichever HTTP library it uses
            failure = error
        else:
            if weights:
                _download_weights(repo, progress)
            return Source(repo, repo)
    if cached:
        return Source(repo, repo, {"local_files_only": True})
    raise _unreachable(repo, failure) from failure


def _is_cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "config.json"), str)


def _ask(repo: str) -> None:
    """Ask for the model's configuration in one request that is not retried, unlike those of a download."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=_CONNECT_SECONDS)


def _unreachable(repo: str, failure: Exception) -> ModelError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    match failure:
        case OfflineModeIsEnabled():
            return ModelError(
                f"{repo} is not on this machine and HF_HUB_OFFLINE keeps it from being downloaded; "
                "unset that, or pass a local folder with --model."
            )
        case GatedRepoError():
            return ModelError(
                f"{repo} is gated: accept its license on its hub page and run `hf auth login`, "
                "or pass a local folder with --model."
            )
        case RepositoryNotFoundError():
            return ModelError(
                f"The hub has no model {repo}, or it is private: check the name, run `hf auth login`, "
                "or pass a local folder with --model."
            )
        case EntryNotFoundError():
            return ModelError(
                f"{repo} has no config.json, so Transformers cannot load it; pass another model or a local .gguf file, "
                "and merge an adapter into its base model first."
            )
        case HfHubHTTPError():
            return ModelError(f"The hub refused {repo} ({one_line(failure)}); try later, or pass a local folder.")
    return ModelError(
        f"{repo} is not on this machine and the hub cannot be reached ({one_line(failure)}); "
        "check the network, or pass a local folder with --model."
    )


def _download_weights(repo: str, progress: Progress) -> None:
    """Bring the safetensors files into the hub's cache. A model that has none is left to Transformers."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str, **options: Any) -> Path:
        return Path(hf_hub_download(repo, name, **options))

    try:
        try:
            index = json.loads(fetch("model.safetensors.index.json").read_text())
            shards = sorted(set(index["weight_map"].values()))
        except EntryNotFoundError:
            shards = ["model.safetensors"]
        for number, shard in enumerate(shards, start=1):
            count = f" ({number}/{len(shards)})" if len(shards) > 1 else ""
            fetch(shard, tqdm_class=_reporter(f"Downloading {repo}{count}", progress))
    except EntryNotFoundError:
        return
    except Exception as error:
        raise ModelError(
            f"The weights of {repo} could not be downloaded ({one_line(error)}); run again to resume, "
            "or pass a local folder with --model."
        ) from error


def _reporter(description: str, progress: Progress) -> type:
    """A tqdm class that reports to `progress` and draws nothing."""
    from tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.seen = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})
            self.total = options.get("total")

        def update(self, n: float | None = 1) -> None:
            self.seen += int(n or 0)
            progress(description, self.seen, int(self.total or 0))

    return Reporter
