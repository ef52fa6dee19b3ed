"""Where a text or a regular expression matches in texts, within bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from functools import lru_cache

from headprof.errors import UsageError
from headprof.models.text_encoder import Characters

SECONDS = 20.0
"""That a search with a regular expression may take: some expressions take years over a short text."""

_LONGEST = 100
_SEARCH = """
import json, re, sys
pattern, text = json.load(sys.stdin)
json.dump([match.span() for match in re.finditer(pattern, text)], sys.stdout)
"""


def shown(pattern: str) -> str:
    """A pattern in quotes, on one line of bounded length, for messages."""
    text = " ".join(pattern.split())
    return f"'{text}'" if len(text) <= _LONGEST else f"'{text[:_LONGEST]}...'"


def check_pattern(pattern: str) -> None:
    """
    Raises:
        UsageError: it is empty, or a regular expression that cannot be read.
    """
    if not pattern.strip() or pattern == "//":
        raise UsageError(
            'A --keep without a text keeps nothing: give it one, or a regular expression, as in "/No. ?7/".'
        )
    if (expression := _expression(pattern)) is None:
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"The regular expression --keep {shown(pattern)} cannot be read ({fault}): mend it, or give plain text, "
            "which neither begins nor ends with a slash."
        ) from None


@lru_cache(maxsize=64)
def find_matches(pattern: str, text: str) -> tuple[Characters, ...]:
    """Where a pattern matches in a text: `/.../` is a regular expression of Python's `re`, all else is taken literally.

    Literal matches may overlap; matches of nothing are left out.

    Raises:
        UsageError: the pattern cannot be read, or the search takes too long.
    """
    check_pattern(pattern)
    expression = _expression(pattern)
    if expression is None:
        return _literal(pattern, text)
    return tuple((start, stop) for start, stop in _searched(pattern, expression, text) if stop > start)


def _expression(pattern: str) -> str | None:
    return pattern[1:-1] if len(pattern) > 2 and pattern[0] == pattern[-1] == "/" else None


def _literal(wanted: str, text: str) -> tuple[Characters, ...]:
    found = []
    start = text.find(wanted)
    while start >= 0:
        found.append((start, start + len(wanted)))
        start = text.find(wanted, start + 1)
    return tuple(found)


def _searched(pattern: str, expression: str, text: str) -> list[list[int]]:
    """Matches, found by a process of its own: nothing else can be stopped in the middle of a search, on any system."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", _SEARCH],
            input=json.dumps([expression, text]),
            capture_output=True,
            check=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"The regular expression --keep {shown(pattern)} takes more than {SECONDS:.0f} seconds to search the text: "
            "give a simpler one, without repetitions inside of repetitions."
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"The regular expression --keep {shown(pattern)} could not be searched for ({type(error).__name__}): give "
            "plain text."
        ) from None
    return json.loads(done.stdout)
