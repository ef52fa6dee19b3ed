"""Profile the attention heads of a language model, and spend a key/value-cache budget where it pays.

The names below are loaded when first used, so that importing the package is quick:

    from headprof import HeadProfile, compressed, load_model

    loaded = load_model("meta-llama/Meta-Llama-3-8B-Instruct")
    profile = HeadProfile.load("profiles/Meta-Llama-3-8B-Instruct.safetensors", loaded.shape)
    with compressed(loaded.model, profile, method="headkv-r2", budget=64):
        loaded.model.generate(...)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headprof._version import __version__

_HOMES = {
    "HeadCache": "headprof.compression.cache.head_cache",
    "HeadProfile": "headprof.profile.head_profile",
    "HeadprofError": "headprof.errors",
    "METHODS": "headprof.compression.methods.table",
    "Method": "headprof.compression.methods.method",
    "ask": "headprof.compression.generation",
    "compress_document": "headprof.compression.generation",
    "compress_to_promise": "headprof.compression.promise",
    "compressed": "headprof.compression.session",
    "load_document": "headprof.compression.document",
    "load_model": "headprof.models.loading",
    "make_plan": "headprof.compression.session",
    "save_document": "headprof.compression.document",
}
__all__ = [
    "METHODS",
    "HeadCache",
    "HeadProfile",
    "HeadprofError",
    "Method",
    "__version__",
    "ask",
    "compress_document",
    "compress_to_promise",
    "compressed",
    "load_document",
    "load_model",
    "make_plan",
    "save_document",
]

if TYPE_CHECKING:
    from headprof.compression.cache.head_cache import HeadCache
    from headprof.compression.document import load_document, save_document
    from headprof.compression.generation import ask, compress_document
    from headprof.compression.methods.method import Method
    from headprof.compression.methods.table import METHODS
    from headprof.compression.promise import compress_to_promise
    from headprof.compression.session import compressed, make_plan
    from headprof.errors import HeadprofError
    from headprof.models.loading import load_model
    from headprof.profile.head_profile import HeadProfile


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headprof' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
