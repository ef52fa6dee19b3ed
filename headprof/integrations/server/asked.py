"""What a request asks, as token ids and the way in which the answer's tokens are chosen."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headprof.compression.answering import Choosing
from headprof.errors import UsageError
from headprof.integrations.server.bodies import Asking, ChatBody, CompletionBody
from headprof.integrations.server.errors import ApiError, too_long
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder


@dataclass(frozen=True)
class Asked:
    """A prompt, and how it is to be answered.

    Attributes:
        ids: tokens of the prompt; those that follow the document, if there is one.
        choosing: how the tokens of the answer are chosen.
        stop: texts at which the answer ends.
        logprobs: how many of the likeliest tokens are told beside each; `None` for no log-probabilities.
    """

    ids: Sequence[int]
    choosing: Choosing
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class AskedReader:
    """Makes tokens of what requests ask, in whatever thread.

    A prompt about a document is asked as `headprof generate --cache` asks it, any other as `headprof generate` does;
    the prompt of a completion without a document is taken as it is written.

    Args:
        loaded: the model.
        usual_new_tokens: most tokens of an answer whose request does not say, as far as the context has room.
    """

    def __init__(self, loaded: LoadedModel, usual_new_tokens: int) -> None:
        self._name, self._most = loaded.name, loaded.max_positions
        self._usual = usual_new_tokens
        tokenizer = copy.deepcopy(loaded.tokenizer)  # one is used by one thread at a time
        self._lock = threading.Lock()
        self._chat, self._raw = PromptEncoder(tokenizer), PromptEncoder(tokenizer, raw=True)
        self._answers = b"".join(self._chat.texts.spelled(self._chat.reply_ids()))

    def read(self, body: Asking, seen: int) -> Asked:
        """What a body asks, about a document of `seen` tokens if it names one.

        Raises:
            ApiError: there is no room for it in the model's context, or a document cannot be asked like this.
        """
        with self._lock:
            ids, param = self._ids(body)
        if not ids:
            raise ApiError(400, f"There is nothing in {param}: give a text.", param=param, code="invalid_value")
        most = body.most_new_tokens or max(1, min(self._usual, self._most - seen - len(ids)))
        if seen + len(ids) + most > self._most:
            raise too_long(seen + len(ids), most, self._most, self._name, param)
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
        choosing = Choosing(most, body.temperature, body.top_p, seed)
        return Asked(ids, choosing, tuple(body.stop), body.wants_logprobs)

    def count(self, text: str) -> int:
        """Tokens of a document.

        Raises:
            ApiError: it is longer than the model's context.
        """
        with self._lock:
            self._check_length(text, "text")
            count = len(self._chat.document_ids(text))
        if count > self._most:
            raise ApiError(
                400,
                f"The document of {count} tokens exceeds the {self._most} that {self._name} can read: shorten it.",
                param="text",
                code="context_length_exceeded",
            )
        return count

    def spelled(self, ids: Sequence[int]) -> list[bytes]:
        """What each token is written with, as `TextEncoder.spelled` has it."""
        with self._lock:
            return self._chat.texts.spelled(ids)

    def is_answered(self, spelling: bytes) -> bool:
        """Whether tokens that are spelled so hold a question already, after which the chat template has an answer."""
        return self._answers != b"" and self._answers in spelling

    def _ids(self, body: Asking) -> tuple[list[int], str]:
        """Token ids, and the field that they come from."""
        if isinstance(body, CompletionBody):
            self._check_length(body.prompt, "prompt")
            encode: Callable[[str], list[int]] = self._chat.question_ids if body.document else self._raw.prompt_ids
            return encode(body.prompt), "prompt"
        assert isinstance(body, ChatBody)
        turns = [message.turn for message in body.messages]
        if len(turns) > self._most:  # each is at least a token, and all are laid out before any is counted
            raise ApiError(
                400,
                f"The {len(turns)} messages have more tokens than the {self._most} that {self._name} can read: leave "
                "some away.",
                param="messages",
                code="context_length_exceeded",
            )
        self._check_length("".join(text for _, text in turns), "messages")
        try:
            return (self._about_document(turns) if body.document else self._chat.chat_ids(turns)), "messages"
        except UsageError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error

    def _about_document(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of a conversation about a document, with which the user's first turn has begun already."""
        if [role for role, _ in turns] != [("user", "assistant")[number % 2] for number in range(len(turns))] or (
            turns[-1][0] != "user"
        ):
            raise UsageError(
                "A conversation about a document begins and ends with the user, who takes turns with the assistant: "
                "leave other messages away, and put what the system says into the document."
            )
        ids = self._chat.question_ids(turns[0][1])
        for (_, said), (_, question) in zip(turns[1::2], turns[2::2], strict=True):
            between = self._chat.next_turn_ids()
            ids = [*ids, *self._chat.texts.ids(said), *between, *self._chat.question_ids(question)]
        return ids

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text that is far too long before all of it is encoded."""
        if self._chat.texts.is_longer(text, self._most):
            raise ApiError(
                400,
                f"The text of {len(text)} characters has more tokens than the {self._most} that {self._name} can read: "
                "shorten it.",
                param=param,
                code="context_length_exceeded",
            )
