"""Who judges a document while there is no question about it: tokens after it that observe it and are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from headprof.compression.methods.method import Method
from headprof.compression.plan import CompressionPlan
from headprof.compression.segments import require_positions
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import OBSERVATION, PromptEncoder


@dataclass(frozen=True)
class Observers:
    """Tokens that observe a document.

    Attributes:
        ids: their token ids.
        segments: how many are in each segment, where they are in several that do not see one another; else empty.
    """

    ids: tuple[int, ...]
    segments: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def longest(self) -> int:
        """Tokens for which the model's context must have room after the document."""
        return max(self.segments, default=len(self.ids))


def repeats(method: Method, observe: str | None) -> bool:
    """Whether a document is judged by its own repetition: if its method asks for that, and the user for no text."""
    return observe is None and method.importance.asks_for_repetition


def document_observers(
    loaded: LoadedModel, encoder: PromptEncoder, document_ids: Sequence[int], plan: CompressionPlan, observe: str | None
) -> Observers:
    """What observes a document: its repetition, a text in the question's place, or nothing for who asks no queries.

    Args:
        loaded: the model.
        encoder: of its texts.
        document_ids: the document's tokens.
        plan: how it is to be compressed.
        observe: the text; `None` for what the method asks for, empty for none.

    Raises:
        UsageError: the model's context is too short for the repetition, or a text is given to a method that asks no
            queries.
        ModelError: the model cannot read segments.
    """
    method = plan.method
    if repeats(method, observe):
        return repeating_observers(loaded, encoder, document_ids, method)
    if not method.asks_queries:
        if observe:
            raise UsageError(f"The method {plan.name!r} asks no queries, so no text can judge: leave --observe away.")
        return Observers(())
    return Observers(tuple(text_observers(encoder, observe)))


def text_observers(encoder: PromptEncoder, observe: str | None) -> list[int]:
    """Token ids of a text in the question's place.

    Args:
        encoder: of the model's texts.
        observe: the text; `None` for `OBSERVATION`, empty for none.
    """
    text = OBSERVATION if observe is None else observe
    return encoder.question_ids(text) if text else []


def repeating_observers(
    loaded: LoadedModel, encoder: PromptEncoder, document_ids: Sequence[int], method: Method
) -> Observers:
    """The demand to repeat a document and its repetition, in segments if it is longer than the method's `segment`.

    Raises:
        UsageError: the model's context is too short for it.
        ModelError: the model cannot read segments.
    """
    tokens, segment = len(document_ids), method.importance.segment or len(document_ids)
    parts = encoder.repetition_parts(document_ids, segment)
    lengths = tuple(len(part) for part in parts)
    observers = Observers(tuple(token for part in parts for token in part), lengths if len(parts) > 1 else ())
    if tokens + observers.longest > loaded.max_positions:
        raise UsageError(
            f"The document of {tokens} tokens cannot be repeated within the {loaded.max_positions} that {loaded.name} "
            f"can read: {_mend(loaded, encoder, document_ids, method)}choose another method, or give a text that "
            "judges in place of the repetition with --observe."
        )
    if observers.segments:
        require_positions(loaded.model)
    return observers


def _mend(loaded: LoadedModel, encoder: PromptEncoder, document_ids: Sequence[int], method: Method) -> str:
    """How the document can be repeated after all: in smaller segments, else if it is shorter."""
    tokens, segment = len(document_ids), method.importance.segment
    repeated, (first, later) = len(encoder.repeated_ids(document_ids)), encoder.demand_lengths()
    demand = max(first, later)
    room = loaded.max_positions - tokens - demand
    if segment is not None and demand <= room < segment:
        return f"repeat it in smaller segments (--set segment={room}), "

    def fits(cut: int) -> bool:
        left = max(1, repeated - cut)
        parts = 1 if segment is None else -(-left // segment)
        return tokens - cut + (first if parts == 1 else demand) + -(-left // parts) <= loaded.max_positions

    return f"shorten it by {next(filter(fits, count(1)))} tokens, "
