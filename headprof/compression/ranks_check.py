"""Which methods several processes can carry out together, each for its own heads of a model."""

from __future__ import annotations

from headprof.compression.methods.method import Method
from headprof.errors import UsageError


def check_ranks(method: Method, called: str, ranks: int, *, is_made: bool = False) -> None:
    """
    Args:
        method: the method, with its parameters.
        called: what to call it, or what it has made, at the beginning of a sentence.
        ranks: how many processes hold the model together.
        is_made: whether it has done its work, so that its parameters cannot be others.

    Raises:
        UsageError: heads that several processes have cannot be compressed so.
    """
    if ranks == 1:
        return
    if method.recall.is_on:
        fault, parameter = "brings rows back from a second tier", "cluster=0"
        not_done = "which processes that share a model's heads do not"
    elif not method.representation.is_per_head:
        fault, parameter = "holds rows in a basis of several heads", "heads=1"
        not_done = "which processes that share a model's heads do not have together"
    else:
        return
    mend = "leave --tp away" if is_made else f"leave --tp away, or give {parameter}"
    raise UsageError(f"{called} {fault}, {not_done}: {mend}.")
