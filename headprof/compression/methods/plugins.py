"""Methods that installed packages add, by entry points of the group `headprof.methods`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from headprof.errors import UsageError

GROUP = "headprof.methods"


def plugin_names() -> list[str]:
    """Names of the methods that installed packages add, in alphabetical order; nothing is imported."""
    return sorted(_found())


def load_plugin(name: str) -> Any:
    """What the entry point of this name stands for.

    Raises:
        UsageError: it cannot be imported, or there are several of this name.
    """
    points = _found()[name]
    if len(points) > 1:
        packages = " and ".join(sorted({point.value.partition(":")[0] for point in points}))
        raise UsageError(f"There are several methods {name!r}, in {packages}: uninstall all but one of these packages.")
    try:
        return points[0].load()
    except Exception as error:
        raise UsageError(
            f"The method {name!r} cannot be imported from {points[0].value} ({type(error).__name__}: {error}): mend or "
            "uninstall that package."
        ) from error


def _found() -> Mapping[str, list[EntryPoint]]:
    return _along(tuple(sys.path))


@lru_cache(maxsize=4)
def _along(path: tuple[str, ...]) -> Mapping[str, list[EntryPoint]]:
    """Entry points of the packages on this path, by name; one that is found twice counts once."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        others = found.setdefault(point.name, [])
        if point.value not in [other.value for other in others]:
            others.append(point)
    return found
