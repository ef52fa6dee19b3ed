"""Which tokens of a vocabulary are special, and which are nothing but punctuation."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from headprof.models.text_encoder import TextEncoder

OTHER, PUNCTUATION, SPECIAL = 0, 1, 2
"""The kinds, as `TokenKinds.of_ids` gives them."""


@dataclass(frozen=True)
class TokenKinds:
    """Which token ids are of which kind.

    Attributes:
        special: tokens that the tokenizer calls special, and those that only its chat template writes.
        punctuation: others whose text is punctuation alone, blanks aside (Unicode's categories P).
    """

    special: frozenset[int]
    punctuation: frozenset[int]

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> TokenKinds:
        """Those of a model's tokenizer, looked up once."""
        return _kinds_of(tokenizer)

    def of_ids(self, ids: Tensor) -> Tensor:
        """The kind of each of these tokens, int8 of the same shape; nothing waits for the device."""
        table = _table(self, ids.device)
        return table[ids.clamp(0, len(table) - 1)]


@lru_cache(maxsize=4)
def _kinds_of(tokenizer: Any) -> TokenKinds:
    template = tokenizer.chat_template
    written = "".join(template.values()) if isinstance(template, dict) else template or ""
    special = TextEncoder(tokenizer, written).control_ids | set(tokenizer.all_special_ids)
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    candidates = [each for each, name in names.items() if each not in special and not _has_letter(name)]
    texts = tokenizer.batch_decode([[each] for each in candidates], clean_up_tokenization_spaces=False)
    found = (each for each, text in zip(candidates, texts, strict=True) if _is_punctuation(text))
    return TokenKinds(frozenset(special), frozenset(found))


def _has_letter(name: str) -> bool:
    """Whether a token's name has a letter or digit of ASCII; what stands for blanks and bytes has none."""
    return any(character.isascii() and character.isalnum() for character in name)


def _is_punctuation(text: str) -> bool:
    bare = text.strip()
    return bool(bare) and all(unicodedata.category(character).startswith("P") for character in bare)


@lru_cache(maxsize=16)
def _table(kinds: TokenKinds, device: torch.device) -> Tensor:
    """The kind of each id up to one beyond the largest that has one, int8."""
    with torch.inference_mode(mode=False):
        table = torch.zeros(max((0, *kinds.special, *kinds.punctuation)) + 2, dtype=torch.int8)
        table[sorted(kinds.punctuation)] = PUNCTUATION
        table[sorted(kinds.special)] = SPECIAL
        return table.to(device, non_blocking=True)
