"""The names of all methods, for those who would rather not load them."""

from __future__ import annotations

from headprof.compression.methods.plugins import plugin_names

METHOD_NAMES: tuple[str, ...] = (
    *("full", "snapkv", "headkv", "headkv-r2", "headkv-r2-int8", "headkv-r2-int4", "lowrank", "latent", "think"),
    *("headkv-tuned", "headkv-refined", "clusterkv", "headkv-cluster", "headkv-curves", "ems", "headkv-ems"),
    *("tova", "pyramidkv", "adakv", "h2o", "prefixkv", "prefixkv-heads", "fastgen", "streamingllm", "knorm"),
    *("keydiff", "expected-attention", "kvzip", "adakv-kvzip", "headkv-kvzip", "learned-kvzip", "curves-kvzip"),
    *("headkv-fit", "learned-fit", "kvzap", "headkv-kvzap", "learned-kvzap"),
)
"""The built-in methods, in the order of their table."""


def method_names() -> list[str]:
    """The built-in names, and after them those that installed packages add, in alphabetical order."""
    return [*METHOD_NAMES, *(name for name in plugin_names() if name not in METHOD_NAMES)]
