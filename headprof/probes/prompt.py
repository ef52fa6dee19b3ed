"""Prompts as token ids: the frame that a chat template puts around a context and a question, and exact token spans."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from headprof.errors import ProbeError
from headprof.models.chat import GAP, first_ids, template_parts

Span = tuple[int, int]
"""`[start, stop)` token positions in the full prompt."""

INSTRUCTION = "Read this text and answer the question that follows it."


@dataclass(frozen=True)
class EncodedContext:
    """Token ids of a context, and where in its body each token stands.

    Attributes:
        ids: token ids, template and instruction included.
        starts, stops: character offsets of each token, counted from the first character of the body.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]

    def span(self, start: int, stop: int) -> Span:
        """The tokens that overlap the characters `[start, stop)` of the body."""
        return bisect_right(self.stops, start), bisect_left(self.starts, stop)


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids that follow a context.

    Attributes:
        asked: the question, the end of the user's turn and the beginning of the model's.
        reply: the given beginning of the model's reply.
        answer: what the model should say then.
    """

    asked: tuple[int, ...]
    reply: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.asked) + len(self.reply) + len(self.answer)


class PromptFrame:
    """Turns a context and a question into token ids, with the tokenizer's chat template when it has one.

    Every question about one context continues the same context ids.

    Raises:
        ProbeError: the tokenizer is not a fast one, so that it gives no character offsets.
        ModelError: the chat template does not repeat the user's text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ProbeError(
                "Probes need a fast tokenizer, since exact spans come from its character offsets; "
                "load this one with use_fast=True or convert it to tokenizer.json."
            )
        self._tokenizer = tokenizer
        self._first_ids: tuple[int, ...] = ()
        if getattr(tokenizer, "chat_template", None):
            self._before, self._after = template_parts(tokenizer)
            self._ask = ""
        else:
            self._before, self._after, self._ask = "", "\nAnswer:", "Question: "
            self._first_ids = tuple(first_ids(tokenizer))

    def encode_context(self, body: str) -> EncodedContext:
        """Token ids of everything before the question."""
        head = f"{self._before}{INSTRUCTION}{GAP}"
        ids, offsets = self._encode(f"{head}{body}{GAP}")
        outside = (-len(head),) * len(self._first_ids)
        return EncodedContext(
            ids=(*self._first_ids, *ids),
            starts=(*outside, *(start - len(head) for start, _ in offsets)),
            stops=(*outside, *(stop - len(head) for _, stop in offsets)),
        )

    def encode_question(self, question: str, answer_prefix: str, answer: str) -> EncodedQuestion:
        """Token ids that follow the context.

        A blank before the answer belongs to the answer if the tokenizer makes one token of it and the first word.
        """
        asked = f"{GAP}{self._ask}{question}{self._after}"
        text = _append(_append(asked, answer_prefix), answer)
        answer_at = len(text) - len(answer)
        ids, offsets = self._encode(text)
        placed = [(token, stop) for token, (_, stop) in zip(ids, offsets, strict=True) if stop > len(GAP)]
        return EncodedQuestion(
            asked=tuple(token for token, stop in placed if stop <= len(asked)),
            reply=tuple(token for token, stop in placed if len(asked) < stop <= answer_at),
            answer=tuple(token for token, stop in placed if stop > answer_at),
        )

    def count(self, sentences: list[str]) -> list[int]:
        """Tokens that each sentence adds to a running text (to a token or so): its first word follows a blank, unless
        the sentence before it ends a paragraph."""
        previous = ["", *sentences[:-1]]
        texts = [s if p.endswith("\n") else f" {s}" for p, s in zip(previous, sentences, strict=True)]
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded.input_ids, encoded.offset_mapping


def _append(text: str, more: str) -> str:
    """Join with a blank, unless there is white space already or nothing to add."""
    return text + more if not more or text[-1:].isspace() else f"{text} {more}"
