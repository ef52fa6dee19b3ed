"""Texts that come from files, fit to be shown: nothing in them moves a cursor, colors a line or ends a document."""

from __future__ import annotations

_KEPT = "\n\t"
# Controls of terminals, and marks that turn the direction of what is shown around them.
_HIDDEN = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN if chr(code) not in _KEPT}
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in _HIDDEN if code >= 0x7F}  # below, JSON itself has escapes


def printable(text: str) -> str:
    """The text, in which control characters, half characters and marks of direction are written as escapes.

    Line ends and tabs stay; no XML or HTML is invalid for what is left.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)


def printable_json(text: str) -> str:
    """JSON in which the same characters are written as escapes of JSON, with the same meaning."""
    return text if text.isascii() and "\x7f" not in text else text.translate(_JSON_ESCAPES)
