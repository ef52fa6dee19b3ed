"""What of an evaluation's texts every head keeps: looked for by patterns before the first question is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headprof.compression.keeping import matched_tokens
from headprof.compression.pattern_search import shown
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.models.encoded import EncodedContext, located
from headprof.models.text_encoder import TextEncoder


@dataclass(frozen=True)
class LocatedText:
    """A text that is read, and where in it its tokens stand.

    Attributes:
        text: as patterns are looked for in it.
        tokens: its own, and others around it that stand outside.
        first: number of the first of these among all tokens that are read.
    """

    text: str
    tokens: EncodedContext
    first: int = 0


class KeptTokens:
    """Finds what patterns match, and remembers which of them match anything at all.

    Args:
        keep: the patterns, as `compress_document` takes them.
    """

    def __init__(self, keep: Sequence[str] = ()):
        self.keep = tuple(keep)
        self._unmatched = dict.fromkeys(self.keep)

    def find(self, texts: Iterable[LocatedText], stop: int) -> ProtectedTokens | None:
        """All tokens before number `stop` that a match overlaps; `None` if there are none.

        Raises:
            UsageError: a search takes too long.
        """
        spans = []
        for each in texts:
            for pattern in self.keep if each.first < stop else ():
                for start, end in matched_tokens([pattern], each.tokens, each.text):
                    span = each.first + start, min(each.first + end, stop)
                    if span[0] < span[1]:
                        spans.append(span)
                        self._unmatched.pop(pattern, None)
        return ProtectedTokens.of(spans)

    def find_at_start(self, encoder: TextEncoder, text: str, stop: int) -> ProtectedTokens | None:
        """The same of a text that stands alone, as `TextEncoder.whole` encodes it; of the rest nothing is looked at.

        Raises:
            UsageError: a search takes too long, or the tokenizer does not say where its tokens stand.
        """
        if not self.keep:
            return None
        ids, places = encoder.whole_with_offsets(text)
        tokens = located(tuple(ids[:stop]), tuple(places[:stop]))
        return self.find([LocatedText(text[: max(tokens.stops, default=0)], tokens)], stop)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise `UsageError` if a pattern has matched nothing of what is compressed in these tasks."""
        for pattern in self._unmatched:
            *others, last = tasks
            named = f"{', '.join(others)} and {last}" if others else last
            raise UsageError(
                f"There is no match for --keep {shown(pattern)} in what is compressed of {named}: give a text as it "
                "stands there, or leave it away."
            )
