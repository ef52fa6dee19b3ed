"""Numbers as people write them."""

from __future__ import annotations

import re

from headprof.errors import UsageError

_LENGTH = re.compile(r"([0-9]{1,9})(k?)", re.IGNORECASE)


def parse_lengths(text: str, least: int = 1) -> tuple[int, ...]:
    """Token counts with commas between them: `"1k,4k"` is `(1024, 4096)`.

    Raises:
        UsageError: one of them is not a whole number, `least` or more, with or without a `k`.
    """
    lengths = []
    for part in text.split(","):
        match = _LENGTH.fullmatch(part.strip())
        if match is None or int(match[1]) < least:
            raise UsageError(f"A length of {part.strip()!r} cannot be read: write token counts such as 512,1k,4k.")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(lengths)


def parse_length(text: str) -> int:
    """A single token count; raises `UsageError` where there are several, or none that can be read."""
    length, *more = parse_lengths(text)
    if more:
        raise UsageError(f"{text!r} are several lengths where one is wanted: give a single one, such as {length}.")
    return length


def format_length(tokens: int) -> str:
    """A token count as it is written on the command line: `"4k"` for 4096, `"1000"` for 1000."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def human_bytes(count: float) -> str:
    """`1.5 MB`: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
