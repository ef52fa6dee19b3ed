"""Responses in OpenAI's form: whole, and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headprof.integrations.server.errors import ApiError
from headprof.integrations.server.jobs import Done, Piece, TokenChance, TokenLogprob

LAST = b"data: [DONE]\n\n"
"""What ends a stream."""


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def error_event(error: ApiError) -> bytes:
    """What a stream says when it cannot go on."""
    return event(error.body)


def usage(done: Done) -> dict[str, Any]:
    """What an answer took, in tokens."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.new_tokens,
        "total_tokens": done.prompt_tokens + done.new_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


@dataclass
class Reply:
    """What is the same in all that is said of an answer.

    Attributes:
        model: its name.
        with_usage: whether a stream ends with what the answer took.
        logprobs: whether log-probabilities are told.
        document: name of the saved document that it started from; `None` for none.
    """

    model: str
    with_usage: bool = False
    logprobs: bool = False
    document: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    prefix = ""
    whole_kind = ""
    chunk_kind = ""

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """A response that is not streamed."""
        text = "".join(piece.text for piece in pieces)
        told = [each for piece in pieces for each in piece.logprobs]
        choice = self._choice(self._text(text), told, done.reason)
        return self._framed(self.whole_kind, [choice]) | {"usage": usage(done)}

    def first(self) -> list[bytes]:
        """What a stream begins with."""
        return []

    def piece(self, piece: Piece) -> bytes:
        """A piece of the text."""
        return self._chunk([self._choice(self._delta(piece.text), piece.logprobs, None)])

    def last(self, done: Done) -> list[bytes]:
        """What a stream ends with."""
        chunks = [self._chunk([self._choice(self._delta(""), (), done.reason)])]
        if self.with_usage:
            chunks.append(event(self._framed(self.chunk_kind, []) | {"usage": usage(done)}))
        return [*chunks, LAST]

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event(self._framed(self.chunk_kind, choices) | ({"usage": None} if self.with_usage else {}))

    def _framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({} if self.document is None else {"document": self.document}),
        }

    def _choice(self, said: dict[str, Any], told: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        logprobs = self._told(told) if self.logprobs else None
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}

    def _text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _told(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[bytes]:
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, (), None)])]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _told(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._token(each.own) | {"top_logprobs": [self._token(other) for other in each.likeliest]} for each in told
        ]
        return {"content": content, "refusal": None}

    @staticmethod
    def _token(chance: TokenChance) -> dict[str, Any]:
        written = None if chance.written is None else list(chance.written)
        return {"token": chance.text, "logprob": chance.logprob, "bytes": written}


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _text

    def _told(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [each.own.text for each in told],
            "token_logprobs": [each.own.logprob for each in told],
            "top_logprobs": [{other.text: other.logprob for other in each.likeliest} for each in told],
            "text_offset": [each.offset for each in told],
        }
