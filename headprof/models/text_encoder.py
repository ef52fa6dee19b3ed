"""A user's text as token ids, none of which is a control token: those are the chat template's alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from headprof.errors import UsageError

_PIECE = 4096  # characters
_SURELY = 1.1
_BYTE = "<0x"
"""What the name of a token begins with that stands for a single byte, where characters have names of their own."""

Characters = tuple[int, int]
"""`[start, stop)` in a text."""


class TextEncoder:
    """Encodes texts, mostly without the tokens that a tokenizer puts around them.

    What looks like a control token, such as `<|im_end|>`, is encoded as the characters it is written with, except where
    it comes from the chat template. A text without such a thing has the ids that the tokenizer gives it.

    Args:
        tokenizer: the model's.
        template: all that the chat template may write; tokens that it uses are control tokens, special or not, unless
            they are words or white space, of which any text is made.

    Attributes:
        gives_offsets: whether the tokenizer is a fast one, so that there is `with_offsets`.
        control_ids: the control tokens.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        self._tokenizer = tokenizer
        self.gives_offsets = bool(getattr(tokenizer, "is_fast", False))
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        found = {str(token): number for number, token in added if token.special or _is_marker(str(token), template)}
        self.control_ids = frozenset(found.values())
        # Of several that begin at one place, tokenizers take the longest.
        names = sorted(filter(None, found), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None

    def ids(self, text: str, template: Sequence[Characters] = ()) -> list[int]:
        """Token ids of a text, of which the characters in `template` come from there."""
        return [
            token for _, piece, is_control in self._pieces(text, template) for token in self._piece(piece, is_control)
        ]

    def whole(self, text: str) -> list[int]:
        """Token ids of a text that stands alone, with what the tokenizer puts around it."""
        return self._whole(text).input_ids

    def whole_with_offsets(self, text: str) -> tuple[list[int], list[Characters]]:
        """As `whole`, and the characters that each token stands for; none for what the tokenizer puts around it.

        Raises:
            UsageError: the tokenizer does not say.
        """
        self.require_offsets()
        encoded = self._whole(text, return_offsets_mapping=True)
        starts, stops = zip(*encoded.offset_mapping, strict=True) if encoded.input_ids else ((), ())
        # Tokens at the end that stand for nothing are said to be at 0, as if they came first.
        return encoded.input_ids, list(zip(accumulate(starts, max), accumulate(stops, max), strict=True))

    def _whole(self, text: str, **options: Any) -> Any:
        split = {"split_special_tokens": True} if self.has_control(text) else {}
        return self._encode(text, add_special_tokens=True, **split, **options)

    def ids_of_each(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, none of which comes from the template."""
        if any(map(self.has_control, texts)):
            return [self.ids(text) for text in texts]
        return self._encode(texts).input_ids

    def with_offsets(self, text: str, template: Sequence[Characters] = ()) -> tuple[list[int], list[Characters]]:
        """As `ids`, and the characters that each token stands for, which a fast tokenizer tells."""
        ids: list[int] = []
        offsets: list[Characters] = []
        for start, piece, is_control in self._pieces(text, template):
            if is_control:
                ids += (found := self._piece(piece, is_control))
                offsets += [(start, start + len(piece))] * len(found)
            else:
                encoded = self._encode(piece, return_offsets_mapping=True)
                ids += encoded.input_ids
                offsets += [(start + first, start + last) for first, last in encoded.offset_mapping]
        return ids, offsets

    def require_offsets(self) -> None:
        """Raise `UsageError` for a tokenizer that does not say which characters a token stands for."""
        if not self.gives_offsets:
            raise UsageError(
                "Which tokens a text is made of is told by fast tokenizers only, so none can be protected: leave "
                "--keep away, and pass --no-keep-system beside a --system, or convert the tokenizer to tokenizer.json."
            )

    def is_longer(self, text: str, tokens: int) -> bool:
        """Whether a text surely has more than so many tokens, found without encoding much more than these.

        A text is cut in pieces for that, where tokens may be parted: one that is little longer is not told from one
        that is not.
        """
        most = int(tokens * _SURELY) + _PIECE
        if len(text) <= most:  # encoded soon, however many tokens each character is
            return False
        counted = 0
        for start in range(0, len(text), _PIECE):
            counted += len(self.ids(text[start : start + _PIECE]))
            if counted > most:
                return True
        return False

    def has_control(self, text: str) -> bool:
        """Whether something in a text looks like a control token."""
        return self._control is not None and self._control.search(text) is not None

    def spelled(self, ids: Sequence[int]) -> list[bytes]:
        """What each token is written with: what a text comes to, joined, wherever the tokenizer parts it.

        Control tokens, and those that stand for single bytes, are spelled by their numbers, as no text is.
        """
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        return [
            b"\xff%d\xff" % token  # in no UTF-8
            if name is None or token in self.control_ids or name.startswith(_BYTE)
            else name.encode("utf-8", "surrogatepass")
            for token, name in zip(ids, names, strict=True)
        ]

    def _pieces(self, text: str, template: Sequence[Characters]) -> Iterator[tuple[int, str, bool]]:
        """The text cut around what only looks like a control token: where each piece begins, and whether it is that."""
        at = 0
        for match in self._control.finditer(text) if self._control else ():
            start, stop = match.span()
            if any(first <= start and stop <= last for first, last in template):
                continue
            if start > at:
                yield at, text[at:start], False
            yield start, text[start:stop], True
            at = stop
        if at < len(text) or not text:
            yield at, text[at:], False

    def _piece(self, text: str, is_control: bool) -> list[int]:
        if not is_control:
            return self._encode(text).input_ids
        ids = self._encode(text, split_special_tokens=True).input_ids
        if len(text) == 1 or not self.control_ids.intersection(ids):
            return ids
        return self._encode(text[0]).input_ids + self.ids(text[1:])  # one that is not special, and is not split

    def _encode(self, text: Any, **options: Any) -> Any:
        return self._tokenizer(text, **{"add_special_tokens": False, "verbose": False} | options)


def _is_marker(token: str, template: str) -> bool:
    bare = token.strip()
    return token in template and not (bare.isalnum() or bare == "")
