"""The names of all methods, for those who would rather not load them."""

from __future__ import annotations

from importlib.metadata import entry_points

METHOD_NAMES: tuple[str, ...] = (
    *("full", "snapkv", "headkv", "headkv-r2", "ems", "headkv-ems", "tova", "pyramidkv", "adakv", "h2o"),
    *("streamingllm", "knorm"),
)
"""The built-in methods, in the order of their table."""

ENTRY_POINTS = "headprof.methods"
"""The group of entry points by which other packages add methods."""


def method_names() -> list[str]:
    """The built-in names, and after them those that installed packages add, sorted; nothing is loaded."""
    added = {each.name for each in entry_points(group=ENTRY_POINTS)}
    return [*METHOD_NAMES, *sorted(added.difference(METHOD_NAMES))]
