"""A budget as the user gave it, read from text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation

from headprof.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LARGEST = 1e15  # of a number in a budget, so that no arithmetic with it overflows
_RATIO = "ratio "
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%B?|(?:[KMG]I?)?B)?", re.IGNORECASE)


_THRESHOLD = re.compile(r">\s*(?P<above>[^/]*?)\s*(?:/\s*(?P<most>.+))?")


def _number(text: str) -> float | None:
    """A number from 0 on that is no trouble; `None` for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < _LARGEST else None


@dataclass(frozen=True)
class Budget:
    """A budget as the user gave it: tokens per KV head, a share of the prompt, or bytes for the whole cache.

    Attributes:
        amount: how much.
        unit: `"tokens"`, `"share"` (of one), `"bytes"` or `"share of bytes"` (of those of the full cache).
        above: what a row's importance must exceed to be kept of a prompt; then the amount is but the most that may be,
            and what the prompt holds decides how much is. `None` to keep as much as there may be.
    """

    amount: float
    unit: str
    above: float | None = None

    def __repr__(self) -> str:
        """As it was before there were thresholds, where there is none: kept results are told apart by it."""
        above = "" if self.above is None else f", above={self.above!r}"
        return f"Budget(amount={self.amount!r}, unit={self.unit!r}{above})"

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Read `64` (tokens per KV head), `1.5%` (of the prompt) or `512MB` (`kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`).

        `1.5%B` is that share of the full cache's bytes: as many tokens where rows are held as they are, more where
        each takes less.
        `>0.01` keeps all rows whose importance is above 0.01, and `>0.01/25%` at most 25 % of the prompt of them.
        `ratio 0.75` is the share of the prompt's cache that is removed, as `--compression-ratio` gives it.

        Raises:
            UsageError: the text is none of these, or not above zero.
        """
        if isinstance(text, Budget):
            return text
        if str(text).startswith(_RATIO):
            return cls(_kept_share(str(text).removeprefix(_RATIO).strip()), "share")
        if (given := _THRESHOLD.fullmatch(str(text).strip())) is not None:
            above = _number(given["above"])
            if above is None or (given["most"] or "").startswith(">"):
                raise UsageError(
                    f"A threshold of {str(text)!r} cannot be read: give an importance (>0.01), and after it what may "
                    "be kept at most (>0.01/25%), if that is to have a bound."
                )
            return replace(cls.parse(given["most"] or "100%"), above=above)
        match = _BUDGET.fullmatch(str(text).strip())
        if match is None or not 0 < float(match["number"]) < _LARGEST:
            raise UsageError(
                f"A budget of {str(text)!r} cannot be read: give tokens per KV head (64), a share of the prompt (1.5%) "
                "or bytes for the whole cache (512MB)."
            )
        amount, unit = float(match["number"]), (match["unit"] or "").upper()
        if unit.startswith("%"):
            if amount > 100:
                raise UsageError(f"A budget of {text} is more than the prompt: give at most 100{unit}.")
            return cls(amount / 100, "share" if unit == "%" else "share of bytes")
        if unit:
            return cls(amount * _UNITS[unit.removesuffix("B")], "bytes")
        if amount != int(amount):
            raise UsageError(
                f"A budget of {text} tokens is not a whole number: round it, or write {text}% for a share."
            )
        return cls(amount, "tokens")

    def tokens(self, prompt_length: int, bytes_per_token: int) -> int:
        """Tokens per KV head.

        Args:
            prompt_length: tokens of the prompt.
            bytes_per_token: bytes that one token takes in the full cache, over all layers and KV heads.
        """
        if self.unit.startswith("share"):
            return max(1, round(self.amount * prompt_length))
        num_bytes = self.num_bytes(prompt_length, bytes_per_token)
        return int(self.amount if num_bytes is None else num_bytes // bytes_per_token)

    def num_bytes(self, prompt_length: int, bytes_per_token: int) -> float | None:
        """Bytes for the whole cache, as `tokens`; `None` where the budget is given in tokens."""
        if self.unit == "share of bytes":
            return self.amount * prompt_length * bytes_per_token
        return self.amount if self.unit == "bytes" else None


def ratio_budget(ratio: str) -> str:
    """The budget that leaves a share of the prompt's cache out, as `Budget.parse` reads it and tables show it."""
    return f"{_RATIO}{ratio.strip()}"


def _kept_share(ratio: str) -> float:
    """What a compression ratio leaves: the number next to 1 - `ratio`, without the rounding of binary fractions."""
    try:
        removed = Decimal(ratio)
    except InvalidOperation:
        removed = Decimal("NaN")
    kept = float(1 - removed) if removed.is_finite() and 0 <= removed < 1 else 0.0
    if not kept:
        raise UsageError(
            f"A compression ratio of {ratio!r} is no share of the cache to remove: give 0 or more, but less than 1, "
            "such as 0.75."
        )
    return kept
