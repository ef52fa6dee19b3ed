"""Reading numbers as people write them."""

from __future__ import annotations

import re

from headprof.errors import UsageError

_LENGTH = re.compile(r"(\d+)(k?)", re.IGNORECASE)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Token counts with commas between them: `"1k,4k"` is `(1024, 4096)`.

    Raises:
        UsageError: one of them is not a positive whole number with or without a `k`.
    """
    lengths = []
    for part in text.split(","):
        match = _LENGTH.fullmatch(part.strip())
        if match is None or int(match[1]) == 0:
            raise UsageError(f"A length of {part.strip()!r} cannot be read: write token counts such as 512,1k,4k.")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(lengths)
