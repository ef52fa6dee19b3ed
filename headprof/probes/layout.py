"""Lay out a context: needles at their depths, in as much filler text as a number of tokens holds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from headprof.errors import ProbeError
from headprof.models.encoded import EncodedContext
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.haystack import join_sentences

_COUNT_BLOCK = 64
_MAX_FITTINGS = 6
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Layout:
    """A finished context.

    Attributes:
        body: its text.
        encoded: its tokens.
        depths: share of the filler that stands before each needle, 0 to 1.
        starts: character of the context's body at which each needle begins.
    """

    body: str
    encoded: EncodedContext
    depths: list[float]
    starts: list[int]


def fit(
    texts: Sequence[str], depths: Sequence[float], room: int, filler: Iterator[str], encoder: PromptEncoder
) -> Layout:
    """Put needle `texts` at ascending `depths` in [0, 1] into a context of at most `room` tokens.

    The context is at most about 2 % shorter than `room`.

    Raises:
        ProbeError: the needles alone take more than `room` tokens.
    """
    source = _CountedSentences(filler, encoder)
    filler_room = room - len(encoder.encode_context("").ids) - sum(encoder.count(list(texts)))
    best: Layout | None = None
    for _ in range(_MAX_FITTINGS):
        layout = _lay_out(texts, depths, source.fill(filler_room), encoder)
        spare = room - len(layout.encoded.ids)
        if spare >= 0 and (best is None or len(layout.encoded.ids) > len(best.encoded.ids)):
            best = layout
        if 0 <= spare <= room * _TOLERANCE / 2:
            break
        # A margin, since another choice of sentences may again take more than its count.
        filler_room += spare if spare > 0 else spare - round(room * _TOLERANCE / 4)
    if best is None:
        raise ProbeError(
            f"{len(texts)} needles do not fit into {room} tokens of context; "
            "use fewer needles per context or more tokens."
        )
    return best


class _CountedSentences:
    """Filler sentences with their token counts, read once and kept."""

    def __init__(self, sentences: Iterator[str], encoder: PromptEncoder) -> None:
        self._sentences = sentences
        self._encoder = encoder
        self._counted: list[tuple[str, int]] = []

    def fill(self, room: int) -> list[tuple[str, int]]:
        """The first sentences that together fit into `room` tokens; of the next one as many words as still fit."""
        chosen: list[tuple[str, int]] = []
        while self._at(len(chosen))[1] <= room:
            chosen.append(self._at(len(chosen)))
            room -= chosen[-1][1]
        return chosen + self._cut(self._at(len(chosen))[0], room)

    def _cut(self, sentence: str, room: int) -> list[tuple[str, int]]:
        words = sentence.split()
        pieces = [" ".join(words[:stop]).rstrip(",;:.") + "." for stop in range(len(words) - 1, 0, -1)]
        counted = zip(pieces, self._encoder.count(pieces), strict=True)
        return [piece for piece in counted if piece[1] <= room][:1]

    def _at(self, position: int) -> tuple[str, int]:
        if position == len(self._counted):
            block = list(islice(self._sentences, _COUNT_BLOCK))
            self._counted += zip(block, self._encoder.count(block), strict=True)
        return self._counted[position]


def _lay_out(
    texts: Sequence[str], depths: Sequence[float], filler: Sequence[tuple[str, int]], encoder: PromptEncoder
) -> Layout:
    before = [0, *accumulate(count for _, count in filler)]
    boundaries = _boundaries(before, depths)
    sentences = [sentence for sentence, _ in filler]
    needle_at = []
    for shift, (text, boundary) in enumerate(zip(texts, boundaries, strict=True)):
        needle_at.append(boundary + shift)
        sentences.insert(boundary + shift, text)
    body, starts = join_sentences(sentences)
    total = max(1, before[-1])
    depths_reached = [before[boundary] / total for boundary in boundaries]
    return Layout(body, encoder.encode_context(body), depths_reached, [starts[at] for at in needle_at])


def _boundaries(before: Sequence[int], depths: Sequence[float]) -> list[int]:
    """The sentence boundary nearest to each of the ascending `depths`, each used once, so that no two needles touch.

    `before[b]` is the number of filler tokens before boundary `b`. Boundaries repeat only if there are too few.
    """
    last = len(before) - 1
    chosen: list[int] = []
    for number, depth in enumerate(depths):
        target = depth * before[-1]
        nearest = bisect_left(before, target)
        if nearest > 0 and target - before[nearest - 1] < before[nearest] - target:
            nearest -= 1
        lowest = chosen[-1] + 1 if chosen else 0
        highest = last - (len(depths) - 1 - number)
        chosen.append(max(0, min(max(nearest, lowest), highest)))
    return chosen
