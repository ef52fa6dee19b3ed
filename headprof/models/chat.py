"""Where a model's chat format puts the user's text, so that a context and a later question can be encoded apart."""

from __future__ import annotations

from typing import Any

from headprof.errors import ModelError

GAP = "\n\n"
"""Between a document and a question about it."""

OBSERVATION = (
    "Who, what, where, when, which, how many, how much? Give the name, the place, the number, the code, the date."
)
"""What stands in for the question while a document is compressed, when the question is not known yet."""

_MARK = "HEADPROF-CONTENT"
# Templates that print today's date or open a thinking block would make the prompt differ from day to day, or part the
# question from its answer; templates that know neither ignore both.
_TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "01 Jan 2025", "enable_thinking": False}


def template_parts(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and after the user's text, generation prompt included.

    Raises:
        ModelError: the chat template does not repeat the user's text.
    """
    messages = [{"role": "user", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS)
    if rendered.count(_MARK) != 1:
        raise ModelError(
            "The tokenizer's chat template does not repeat the user's text exactly once; "
            "set tokenizer.chat_template to None to ask without it."
        )
    before, after = rendered.split(_MARK)
    return before, after


def first_ids(tokenizer: Any) -> list[int]:
    """The token that a text without a chat template begins with, if the tokenizer puts one there."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


class ChatFormat:
    """Encodes what a user says, as a whole or as a document and, later, questions about it.

    Args:
        tokenizer: the model's.
        template: whether its chat template is used, if it has one.

    Raises:
        ModelError: the chat template does not repeat the user's text.
    """

    def __init__(self, tokenizer: Any, template: bool = True) -> None:
        self._tokenizer = tokenizer
        if template and getattr(tokenizer, "chat_template", None):
            self._before, self._after = template_parts(tokenizer)
            self._first: list[int] = []
        else:
            self._before, self._after = "", ""
            self._first = first_ids(tokenizer)

    def document_ids(self, document: str, gap: str = GAP) -> list[int]:
        """Token ids of everything before the question about a document; `gap` parts the two."""
        return self._first + self._encode(f"{self._before}{document}{gap}")

    def question_ids(self, question: str) -> list[int]:
        """Token ids that follow a document, up to where the model answers."""
        return self._encode(f"{question}{self._after}")

    def reply_ids(self, reply: str) -> list[int]:
        """Token ids of what the model says, or of its beginning."""
        return self._encode(reply)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt without a document."""
        return self._first + self._encode(f"{self._before}{prompt}{self._after}")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
