"""Words of Chinese, as LongBench finds them: by jieba, an optional package."""

from __future__ import annotations

import logging
import string
import warnings
from functools import cache
from typing import Any

from headprof.errors import UsageError

_FULL_WIDTH = 0xFEE0  # from an ASCII character to its full-width form
# LongBench's list lacks the opening 《 as well as 〈, 〉 and the full-width stop: where they are words, they count.
_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "".join(chr(ord(mark) + _FULL_WIDTH) for mark in string.punctuation if mark != ".")
    + "､、。｡〃》「」｢｣『』【】〔〕〖〗〘〙〚〛｟｠〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)


def segment(text: str) -> list[str]:
    """The words of a text, punctuation and spaces among them.

    Raises:
        UsageError: jieba is not installed.
    """
    return _tokenizer().lcut(text)


def plain_words(text: str) -> list[str]:
    """The words in lower case, without punctuation and spaces; raises `UsageError` as `segment`."""
    plain = ("".join(word.lower().translate(_PUNCTUATION).split()) for word in segment(text))
    return [word for word in plain if word]


@cache
def _tokenizer() -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what newer Pythons dislike in it
            import jieba
    except ImportError:
        raise UsageError(
            "Answers in Chinese are split into words by jieba, which is not installed: pip install headprof[eval]."
        ) from None
    jieba.setLogLevel(logging.WARNING)  # it reports at length how it loads its dictionary
    return jieba.Tokenizer()
