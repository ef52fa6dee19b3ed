"""The text of new tokens, handed on while they come."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

_UNFINISHED = "\ufffd"
"""What a tokenizer shows for a character of which the last bytes are missing."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that is a byte: a row of them is decoded as a whole, and differently when one of them fits nowhere."""


class TimedStreamer(BaseStreamer):
    """Hands text on as it becomes final, and remembers when tokens came.

    All pieces together are what the tokenizer makes of all new tokens at once, special ones left out. A token is
    decoded together with those before it, since tokenizers drop the blank that a text begins with; where they clean up
    blanks before punctuation too, the last word is held back.

    Args:
        tokenizer: the model's.
        on_text: called with each piece, which may be empty.

    Attributes:
        token_times: when each new token came, as `time.perf_counter`.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.token_times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._special = frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._before, self._read = 0, 0  # tokens that are done with; those that have been decoded
        self._handed_on = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, which comes first, and then each new token, int64 `[1]`."""
        if self._prompt:
            self._prompt = False
            return
        self.token_times.append(time.perf_counter())
        self._ids += value.flatten().tolist()
        self._hand_on(self._word_before_last() if self._cleans_up else self._newest())

    def end(self) -> None:
        """Hand on what was held back."""
        self._hand_on(self.text[len(self._handed_on) :])

    @property
    def holds_words_back(self) -> bool:
        """Whether a piece may end within a token."""
        return self._cleans_up

    @property
    def new_ids(self) -> tuple[int, ...]:
        """All new tokens."""
        return tuple(self._ids)

    @property
    def text(self) -> str:
        """What the tokenizer makes of all new tokens."""
        return self._decode(0, len(self._ids))

    def _newest(self) -> str:
        """What the newest tokens add to the text; nothing while a character or a row of single bytes is unfinished."""
        name = self._tokenizer.convert_ids_to_tokens(self._ids[-1])
        if name is None or self._ids[-1] in self._special:  # which is left out, and may stand inside a row of bytes
            return ""
        if _BYTE.fullmatch(name):
            return ""
        known, whole = self._decode(self._before, self._read), self._decode(self._before, len(self._ids))
        if whole.endswith(_UNFINISHED) or len(whole) <= len(known) or not whole.startswith(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _word_before_last(self) -> str:
        text = self.text.rstrip()
        return text[len(self._handed_on) : len(text) - len(text.split()[-1]) if text else 0].rstrip()

    def _hand_on(self, text: str) -> None:
        self._handed_on += text
        self._on_text(text)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)
