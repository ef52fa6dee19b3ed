"""What bytes a token stands for, of which a text's characters may need several."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BLANK, _BYTE = "\u2581", re.compile(r"<0x([0-9A-F]{2})>")
"""How vocabularies of characters write a blank, and single bytes."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""How vocabularies of bytes write them, each as a character that can be seen."""
_SPACE = "\u0120"


class TokenBytes:
    """The bytes of tokens, as far as their names tell them; special tokens have none, nor ids without a name.

    Texts may have fewer: tokenizers leave the blank away with which a text begins, or those before punctuation.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self._special |= {number for number, token in added if token.special}
        self._added = {number: str(token) for number, token in added}
        self._of_bytes = _is_of_bytes(tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether texts are shown without it."""
        return token in self._special or not self.name(token)

    def name(self, token: int) -> str:
        """How the vocabulary writes it; nothing where it ends before, as some do before the model's."""
        return self._tokenizer.convert_ids_to_tokens(token) or ""

    def of(self, token: int) -> bytes:
        """The bytes that it stands for."""
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        name = self.name(token)
        if self._of_bytes and all(character in BYTE_OF for character in name):
            return bytes(BYTE_OF[character] for character in name)
        if found := _BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        return name.replace(_BLANK, " ").encode("utf-8", "replace")


def _is_of_bytes(tokenizer: Any) -> bool:
    """Whether its vocabulary is one of bytes: the character that stands for a blank is shown as one."""
    number = tokenizer.get_vocab().get(_SPACE)
    return number is not None and tokenizer.decode([number]) != _SPACE
