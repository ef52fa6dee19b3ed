"""Texts as token ids, with the place in them where each token stands."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from headprof.models.text_encoder import Characters

Span = tuple[int, int]
"""`[start, stop)` token positions in the full prompt."""


@dataclass(frozen=True)
class EncodedContext:
    """Token ids of a context, and where in its body each token stands.

    Attributes:
        ids: token ids, template and instruction included.
        starts, stops: character offsets of each token, counted from the first character of the body.
        system: where the user's own system message stands, which is before the body; `None` if there is none.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    system: Characters | None = None

    def span(self, start: int, stop: int) -> Span:
        """The tokens that overlap the characters `[start, stop)` of the body."""
        return bisect_right(self.stops, start), bisect_left(self.starts, stop)


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids that follow a context or document.

    Attributes:
        asked: the question, the end of the user's turn and the beginning of the model's.
        reply: the given beginning of the model's reply.
        answer: what the model should say then.
        places: where in the question each token of `asked` stands, counted from its first character; empty where the
            tokenizer does not say.
    """

    asked: tuple[int, ...]
    reply: tuple[int, ...]
    answer: tuple[int, ...]
    places: tuple[Characters, ...] = field(default=(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.asked) + len(self.reply) + len(self.answer)


def located(ids: tuple[int, ...], places: tuple[Characters, ...]) -> EncodedContext:
    """Tokens of a text, and where in it each of them stands."""
    return EncodedContext(ids, tuple(start for start, _ in places), tuple(stop for _, stop in places))
