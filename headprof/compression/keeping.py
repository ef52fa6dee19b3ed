"""What of a user's texts every head is to keep, as token positions: a system message, and what patterns match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headprof.compression.pattern_search import check_pattern, find_matches, shown
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.models.encoded import EncodedContext, Span
from headprof.models.prompt_encoder import PromptEncoder


def check_patterns(keep: Sequence[str]) -> None:
    """
    Raises:
        UsageError: these are no list of patterns, or one of them cannot be read.
    """
    if isinstance(keep, str):
        raise UsageError(f"What is kept is a list of patterns: give keep=[{keep!r}].")
    for pattern in keep:
        check_pattern(pattern)


def matched_tokens(keep: Sequence[str], context: EncodedContext, body: str) -> list[Span]:
    """The tokens that each match of the patterns in a text overlaps.

    Args:
        keep: patterns (see `find_matches`).
        context: the text's tokens, and where they stand.
        body: the text.
    """
    return [context.span(*match) for pattern in keep for match in find_matches(pattern, body)]


@dataclass(frozen=True)
class Keeping:
    """What of a prompt no method may evict.

    Attributes:
        keep: patterns (see `find_matches`); all tokens that a match overlaps are kept.
        system: a system message; `None` for the chat template's own, which is not the user's and not kept.
        keep_system: whether the tokens of that message are kept.
    """

    keep: Sequence[str] = ()
    system: str | None = None
    keep_system: bool = True

    @property
    def protects(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self.keep) or (self.keep_system and self.system is not None)

    def check(self, *texts: str | None) -> None:
        """Find mistakes that need no model.

        Args:
            texts: those that the user has given beside the system message.

        Raises:
            UsageError: the system message is empty, or a pattern cannot be read or matches nothing.
        """
        check_patterns(self.keep)
        if self.system is not None and not self.system.strip():
            raise UsageError('The system message is empty: give one with --system "...".')
        given = [text for text in (self.system, *texts) if text]
        for pattern in self.keep:
            if not any(find_matches(pattern, text) for text in given):
                raise UsageError(
                    f"There is no match for --keep {shown(pattern)} in what is to be read: give a text as it stands "
                    "there, or leave it away."
                )

    def encoder(self, tokenizer: object) -> PromptEncoder:
        """The encoder of prompts with this system message.

        Raises:
            UsageError: there is no place for a system message.
        """
        return PromptEncoder(tokenizer, system=self.system)

    def document(self, encoder: PromptEncoder, document: str) -> tuple[list[int], ProtectedTokens | None]:
        """Token ids of everything before the question about a document, and which are kept."""
        if not self.protects:
            return encoder.document_ids(document), None
        context = encoder.encode_document(document)
        return list(context.ids), ProtectedTokens.of([*self._system(context), *self._matches(context, document)])

    def prompt(
        self, encoder: PromptEncoder, document: str | None, prompt: str
    ) -> tuple[list[int], ProtectedTokens | None]:
        """Token ids of a prompt, with the document before it if there is one, and which are kept."""
        if not self.protects:
            if not document:
                return encoder.prompt_ids(prompt), None
            return encoder.document_ids(document) + encoder.question_ids(prompt), None
        start = encoder.encode_document(document) if document else encoder.encode_prompt(prompt)
        spans = [*self._system(start), *self._matches(start, document or prompt)]
        ids = list(start.ids)
        if document:
            asked, before = encoder.encode_asked(prompt), len(ids)
            spans += [(before + first, before + stop) for first, stop in self._matches(asked, prompt)]
            ids += asked.ids
        return ids, ProtectedTokens.of(spans)

    def _matches(self, context: EncodedContext, body: str) -> list[tuple[int, int]]:
        return matched_tokens(self.keep, context, body)

    def _system(self, context: EncodedContext) -> list[tuple[int, int]]:
        """What is kept of the system message."""
        if self.system is None or context.system is None:
            return []
        if self.keep_system:
            return [context.span(*context.system)]
        start = context.system[0]
        found = [match for pattern in self.keep for match in find_matches(pattern, self.system)]
        return [context.span(start + first, start + stop) for first, stop in found]
