"""Where the tokens of an answer are in its text, whose characters may be parted among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from headprof.integrations.server.jobs import TokenChance, TokenLogprob
from headprof.models.token_bytes import TokenBytes

_NO_CHARACTER = "\ufffd".encode()
"""What a text shows for bytes that make no character."""


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
        lags: whether the text that has become final may end within a token; then all are told with the last of it.
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
        if not last and (self._lags or not text):
            return []
        parts = shared(self._text, [self._known.of(each.token) for each in self._waiting])
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


def shared(text: bytes, raws: Sequence[bytes]) -> list[bytes]:
    """What each token has of a text that is theirs; joined, it is the text.

    Tokens have the bytes that they stand for, or all but a leading blank. The character that is shown in the place of
    bytes that make none is the token's in which these begin. Of a text that is none of this, what no token stands for
    goes to the first token that has not its own.

    Args:
        text: the bytes, of the first tokens or of all.
        raws: bytes that each token stands for.
    """
    joined = b"".join(raws)
    ends = [0, *accumulate(map(len, raws))]
    for left_out in (0, 1) if joined.startswith(b" ") else (0,):
        shown = [b""] * left_out + _shown(joined[left_out:])
        if b"".join(shown).startswith(text):
            places = [0, *accumulate(map(len, shown))]
            return [text[places[start] : places[stop]] for start, stop in pairwise(ends)]
    return _found(text, raws)


def _shown(raw: bytes) -> list[bytes]:
    """What a text has for each of these bytes: where some make no character, the first has one in their place."""
    shown: list[bytes] = []
    while len(shown) < len(raw):
        at = len(shown)
        start = stop = len(raw)
        try:
            raw[at:].decode()
        except UnicodeDecodeError as error:
            start, stop = at + error.start, at + error.end
        shown += [bytes([byte]) for byte in raw[at:start]]
        shown += [_NO_CHARACTER, *[b""] * (stop - start - 1)] if stop > start else []
    return shown


def _found(text: bytes, raws: Sequence[bytes]) -> list[bytes]:
    """The same by looking for each token's bytes, from the beginning on, then from the end on."""
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
