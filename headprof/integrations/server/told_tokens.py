"""Where the tokens of an answer are in its text, whose characters may be parted among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headprof.integrations.server.jobs import TokenChance, TokenLogprob
from headprof.models.token_bytes import TokenBytes


@dataclass(frozen=True)
class Chosen:
    """A token of an answer.

    Attributes:
        token: its id.
        logprob: how likely it was.
        likeliest: ids and log-probabilities of the likeliest tokens.
    """

    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]] = ()


class ToldTokens:
    """Tells an answer's tokens as their part of its text becomes final. Joined, their bytes are the text's.

    Args:
        known: bytes of tokens.
        lags: whether the text that has become final may end within a token.
    """

    def __init__(self, known: TokenBytes, *, lags: bool) -> None:
        self._known, self._lags = known, lags
        self._waiting: deque[Chosen] = deque()
        self._text = b""  # which is not any token's yet
        self._characters = 0  # that have begun before

    def add(self, chosen: Chosen) -> None:
        """Take the next token, of which the text comes now or later."""
        self._waiting.append(chosen)

    def take(self, text: str, *, last: bool = False) -> list[TokenLogprob]:
        """The tokens whose bytes are known when so much more of the text, or all of it, is final."""
        self._text += text.encode("utf-8", "replace")
        if not (text or last):
            return []
        raws = [self._known.of(each.token) for each in self._waiting]
        parts = begun(self._text, raws) if self._lags and not last else shared(self._text, raws)
        return [self._told(self._waiting.popleft(), own) for own in parts]

    def _told(self, chosen: Chosen, own: bytes) -> TokenLogprob:
        within = any(map(_is_within, self._text[:1]))  # a character that the tokens before have begun
        self._text = self._text[len(own) :]
        offset = self._characters - within
        self._characters += sum(not _is_within(byte) for byte in own)
        raw = self._known.of(chosen.token)
        blank = b" " if own != raw and own == raw.removeprefix(b" ") else b""
        likeliest = [
            self._chance(token, value, self._known.of(token).removeprefix(blank)) for token, value in chosen.likeliest
        ]
        return TokenLogprob(self._chance(chosen.token, chosen.logprob, own), offset, likeliest)

    def _chance(self, token: int, logprob: float, own: bytes) -> TokenChance:
        if self._known.is_special(token):
            return TokenChance(self._known.name(token), None, logprob)
        try:
            return TokenChance(own.decode(), own, logprob)
        except UnicodeDecodeError:
            return TokenChance("bytes:" + "".join(f"\\x{byte:02x}" for byte in own), own, logprob)


def begun(text: bytes, raws: Sequence[bytes]) -> list[bytes]:
    """As `shared`, of a text of which more may come: what the first tokens have, as far as that is sure."""
    parts, at = [], 0
    for raw in raws:
        if len(text) - at < len(raw) or (own := _own(text, at, raw)) is None:
            break
        parts.append(own)
        at += len(own)
    return parts


def shared(text: bytes, raws: Sequence[bytes]) -> list[bytes]:
    """What each token has of a text that is theirs; joined, it is the text.

    Tokens have the bytes that they stand for, or all but a leading blank. Bytes that no token stands for, as those of
    the character that is shown in the place of bytes that make none, go to the first token that has not its own.

    Args:
        text: the bytes.
        raws: bytes that each token stands for.
    """
    parts, at = [], 0
    for raw in raws:
        if (own := _own(text, at, raw)) is None:
            break
        parts.append(own)
        at += len(own)
    left, others = text[at:], raws[len(parts) :]
    if not others:
        return [*parts[:-1], parts[-1] + left] if parts else []
    ends: list[bytes] = []
    for raw in reversed(others[1:]):
        ends.append(raw if left.endswith(raw) else b"")
        left = left[: len(left) - len(ends[-1])]
    return [*parts, left, *reversed(ends)]


def _own(text: bytes, at: int, raw: bytes) -> bytes | None:
    """What a token has of a text that goes on at `at`; `None` where it is something else."""
    return next((own for own in (raw, raw.removeprefix(b" ")) if text.startswith(own, at)), None)


def _is_within(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80
