"""A conversation about a compressed document: every turn goes on from the cache in which those before it are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.generation import Generation, generate_text
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import UsageError
from headprof.models.decoder import end_tokens
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder


class Conversation:
    """Turns about a document, all in one cache, which is continued in place.

    Between what the model has said and the next question stands what the chat template writes there; for a model
    without one, a blank line. Turns are compressed as whatever comes after a document is: by the plan's buffer.

    Args:
        loaded: the model that filled the cache.
        cache: of one document, as `compress_document` and `load_document` give it. A copy (`stack_caches([cache])`)
            leaves it as it is.
        backend, prefill_chunk, step: as for `headprof.compressed`.

    Raises:
        ModelError: the chat template cannot be used for several turns.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: HeadCache,
        *,
        backend: str = "auto",
        prefill_chunk: int | None = None,
        step: str = "auto",
    ):
        self.loaded, self.cache = loaded, cache
        self._how: dict[str, Any] = {"backend": backend, "prefill_chunk": prefill_chunk, "step": step}
        self._encoder = PromptEncoder(loaded.tokenizer)
        self._between = self._encoder.next_turn_ids()
        self._unread: list[int] = []  # what ends the last turn

    def ask(self, question: str, *, max_new_tokens: int = 128, **options: Any) -> Generation:
        """The next turn: a question and the answer to it, which is part of the conversation from now on.

        Args:
            question: the text.
            max_new_tokens: most tokens to write.
            options: `temperature`, `seed`, `on_text` of `generate_text`.

        Raises:
            UsageError: there is no room for this turn in the model's context; the conversation is as it was.
        """
        ids = self._fitting(question, max_new_tokens)
        self._end_turn()
        said: list[int] = []
        made = generate_text(
            self.loaded,
            torch.tensor([ids]),
            cache=self.cache,
            max_new_tokens=max_new_tokens,
            on_ids=said.extend,
            **self._how,
            **options,
        )
        self._unread = [*self._left_over(said, made.prompt_tokens), *self._between]
        return made

    def document(self) -> HeadCache:
        """The cache as that of a document: `save_document` keeps it, and questions about it are the next turn."""
        self._end_turn()
        return self.cache

    def _fitting(self, question: str, max_new_tokens: int) -> list[int]:
        """The question's tokens; raises `UsageError` where they, or the answer, would have no room."""
        most, used = self.loaded.max_positions, self.cache.get_seq_length() + len(self._unread)
        far = self._encoder.texts.is_longer(question, most)
        ids = [] if far else self._encoder.question_ids(question)
        if far or used + len(ids) + max_new_tokens > most:
            raise UsageError(
                f"A question of {len(question)} characters and {max_new_tokens} new tokens after the {used} that have "
                f"been read exceed the {most} that {self.loaded.name} can read: ask a shorter one, lower "
                "--max-new-tokens, or begin anew."
            )
        return ids

    def _left_over(self, said: Sequence[int], prompt_tokens: int) -> list[int]:
        """Tokens of an answer that the cache has not seen, but for one that ends it: the turn's own end follows."""
        unseen = prompt_tokens + len(said) - self.cache.get_seq_length()
        left = list(said[len(said) - unseen :])
        if left and left[-1] in end_tokens(self.loaded.model, self.loaded.tokenizer):
            left.pop()
        return left

    def _end_turn(self) -> None:
        """Have the model read what ends the last turn, so that the user's next one is open."""
        if self._unread:
            ids = torch.tensor([self._unread], device=self.loaded.device)
            with attending_ragged(self.loaded.model, **self._how):
                prefill(self.loaded.model, ids, self.cache)
            self._unread = []
