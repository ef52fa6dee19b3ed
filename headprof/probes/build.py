"""Build probes: needles hidden in filler text, with the exact token spans of needle, answer and distractors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from math import sqrt
from typing import Any

from headprof.errors import UsageError
from headprof.models.encoded import EncodedContext, EncodedQuestion, Span
from headprof.models.prompt_encoder import PromptEncoder
from headprof.models.text_encoder import Characters
from headprof.probes.families import choose_families
from headprof.probes.haystack import Haystack
from headprof.probes.layout import fit
from headprof.probes.needles import KINDS, Family, Needle
from headprof.probes.slots import SPLITS, Split

# Filler that must part two needles: about one sentence.
_FILLER_TOKENS_PER_NEEDLE = 24
_COST_SAMPLES = 8
_GOLDEN_RATIO = 0.6180339887498949
_PACK_AT_1K, _MAX_PACK = 12, 32


@dataclass(frozen=True)
class Probe:
    """One question about a context.

    Attributes:
        depth: share of the filler text that stands before the needle, 0 to 1.
        asked_ids: tokens after the shared context: question, end of turn, generation prompt.
        reply_ids: the given beginning of the reply.
        answer_ids: tokens that the model should then say.
        needle_span, answer_span, distractor_spans: token positions in the full prompt, all within the context.
        asked_places: where in the question each token of `asked_ids` stands, counted from its first character.
    """

    family: str
    kind: str
    depth: float
    asked_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    needle_span: Span
    answer_span: Span
    distractor_spans: tuple[Span, ...]
    question: str
    answer: str
    asked_places: tuple[Characters, ...] = field(default=(), repr=False)

    @property
    def question_ids(self) -> tuple[int, ...]:
        """Everything between the shared context and the answer."""
        return self.asked_ids + self.reply_ids


@dataclass(frozen=True)
class ProbeContext:
    """A context and the probes that share it: one prefill, and a short suffix for each question.

    `encoded` has the tokens before a question, the template's among them, and where in the text `body` they stand.
    """

    index: int
    body: str
    encoded: EncodedContext
    probes: tuple[Probe, ...]

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Token ids of all that comes before a question."""
        return self.encoded.ids


@dataclass(frozen=True)
class ProbeSettings:
    """What to build: `probes` in all, in contexts whose `lengths` (tokens, question and answer included) take turns.

    Attributes:
        families: names of the needle families to use (see `choose_families`); `None` for all but the non-literal ones.
        needles_per_context: probes that share one prefill; `None` to choose it from the length.
        depths_per_filler: consecutive contexts that share one filler text, with their needles deeper and deeper in it,
            so that each begins like the one before; more than one only with one needle a context.
        split: the half of the slot lists to draw from: "profile" and "eval" share no value.
    """

    probes: int
    lengths: tuple[int, ...] = (1024,)
    kinds: tuple[str, ...] = KINDS
    families: tuple[str, ...] | None = None
    needles_per_context: int | None = 8
    depths_per_filler: int = 1
    seed: int = 0
    split: Split = "profile"


def needles_for(length: int) -> int:
    """How many needles share a context of `length` tokens when nothing is said: 12 at 1k, with its root, at most 32.

    More needles divide the cost of the prefill by more, but stand closer together and make long suffixes.
    """
    return max(1, min(_MAX_PACK, round(_PACK_AT_1K * sqrt(length / 1024))))


def digest_of_texts(needles: list[Needle] | None, haystack: Haystack | None) -> str:
    """SHA-256 (hex) of what probes are made of, in order; `None` stands for the package's own."""
    given = repr((needles, None if haystack is None else haystack.given_text))
    return sha256(given.encode("utf-8", "backslashreplace")).hexdigest()


class ProbeBuilder:
    """Builds the contexts of `settings` one by one.

    Context `i` depends on `i`, on the number of probes it holds and on the other settings, but not on the number of
    probes in all: a run that is asked for more probes begins with the same contexts, and only the last one, if it was
    not full, differs.

    With `needles` (read from a file) these are used in place of families, one per context, since nothing says
    whether two of them contradict each other.

    Raises:
        UsageError: the settings ask for something that does not exist or does not fit, before any work is done.
        ProbeError: the tokenizer gives no character offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: ProbeSettings,
        *,
        max_positions: int,
        needles: list[Needle] | None = None,
        haystack: Haystack | None = None,
    ) -> None:
        _check_settings(settings, max_positions)
        self.settings = settings
        self.texts = "" if needles is None and haystack is None else digest_of_texts(needles, haystack)
        """SHA-256 (hex) of the needles and the haystack that were given; empty where both are the package's own."""
        self._encoder = PromptEncoder(tokenizer, spans=True)
        if needles is not None:
            self._sources = _by_kind(needles, settings.kinds)
        else:
            self._sources = _by_kind(choose_families(settings.families), settings.kinds)
        self._haystack = haystack or Haystack.composed()
        asked = 1 if needles is not None else settings.needles_per_context
        per_length = [needles_for(length) if asked is None else asked for length in settings.lengths]
        self._per_context = self._fitting(per_length, choose=asked is None)
        self._starts = [0, *accumulate(self._per_context)]
        self.group_size = settings.depths_per_filler if self._per_context == [1] * len(self._per_context) else 1
        """How many consecutive contexts share their filler."""

    def __len__(self) -> int:
        """Number of contexts."""
        cycles, rest = divmod(self.settings.probes, self._starts[-1])
        return cycles * len(self._per_context) + next(n for n, start in enumerate(self._starts) if start >= rest)

    def __iter__(self) -> Iterator[ProbeContext]:
        return (self.context(index) for index in range(len(self)))

    def count(self, index: int) -> int:
        """Number of probes in context `index`."""
        return self._start(index + 1) - self._start(index)

    def groups(self) -> list[range]:
        """The contexts, by the filler that they share; a group's contexts begin alike, each longer than the last."""
        return [range(at, min(at + self.group_size, len(self))) for at in range(0, len(self), self.group_size)]

    def context(self, index: int) -> ProbeContext:
        """Context number `index`, from 0.

        Raises:
            IndexError: there is no such context.
            ProbeError: the needles drawn do not fit into the length, or a slot list is used up.
        """
        needles, rng = self._draw_needles(index)
        return self._build(index, needles, self._depths(index, len(needles)), rng)

    def unpacked(self, index: int) -> list[ProbeContext]:
        """Context `index` taken apart: for each of its probes in turn, a context as long that hides its needle alone.

        The filler is the same, and so is the depth, to a sentence.
        """
        needles, rng = self._draw_needles(index)
        state = rng.getstate()
        contexts = []
        for needle, depth in zip(needles, self._depths(index, len(needles)), strict=True):
            rng.setstate(state)
            contexts.append(self._build(index, [needle], [depth], rng))
        return contexts

    def _build(self, index: int, needles: list[Needle], depths: list[float], rng: random.Random) -> ProbeContext:
        suffixes = [self._encoder.encode_question(n.question, n.answer_prefix, n.answer) for n in needles]
        room = self.length(index) - max(len(suffix) for suffix in suffixes)
        if self.group_size > 1:
            rng = self._rng("filler", index // self.group_size)
        texts = [needle.text for needle in needles]
        layout = fit(texts, depths, room, self._haystack.sentences(rng), self._encoder)
        probes = tuple(
            _make_probe(needle, suffix, depth, start, layout.encoded)
            for needle, suffix, depth, start in zip(needles, suffixes, layout.depths, layout.starts, strict=True)
        )
        return ProbeContext(index, layout.body, layout.encoded, probes)

    def _rng(self, *purpose: object) -> random.Random:
        return random.Random(f"{self.settings.seed}/{self.settings.split}/{'/'.join(map(str, purpose))}")

    def length(self, index: int) -> int:
        """Tokens of context `index` with a question and its answer, at most: lengths take turns over the groups."""
        return self.settings.lengths[index // self.group_size % len(self.settings.lengths)]

    def _start(self, index: int) -> int:
        """Number of the first probe of context `index`."""
        cycle, within = divmod(index, len(self._per_context))
        return min(cycle * self._starts[-1] + self._starts[within], self.settings.probes)

    def _draw_needles(self, index: int) -> tuple[list[Needle], random.Random]:
        """The needles of one context, in the order in which they will stand, and the generator for its filler.

        No two share a slot value.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"context {index} of {len(self)}")
        rng = self._rng("context", index)
        needles: list[Needle] = []
        taken: set[str] = set()
        for number in range(self._start(index), self._start(index + 1)):
            source, turn = self._source(number)
            if isinstance(source, Family):
                turn += self._rng("wording", source.name).randrange(len(source.variants))
                source = source.sample(rng, self.settings.split, taken, turn)
            needles.append(source)
            taken.update(source.values)
        return rng.sample(needles, len(needles)), rng

    def _source(self, number: int) -> tuple[Family | Needle, int]:
        """Where probe `number` comes from, and how often that was used before.

        Kinds alternate over the probes; within a kind each family has its turn before one has its next.
        """
        kinds = list(self._sources)
        kind = kinds[number % len(kinds)]
        sources = self._sources[kind]
        turn, within = divmod(number // len(kinds), len(sources))
        return sources[self._rng(kind, turn).sample(range(len(sources)), len(sources))[within]], turn

    def _depths(self, index: int, count: int) -> list[float]:
        """Depths in [0, 1], one from each of `count` equal strata; over the contexts each stratum is covered evenly.

        Contexts that share a filler share the strata too.
        """
        group, member = divmod(index, self.group_size)
        step = group // len(self.settings.lengths) * _GOLDEN_RATIO
        strata = max(count, self.group_size)
        first = member if self.group_size > 1 else 0
        return [
            (stratum + (self._rng("depth", stratum).random() + step) % 1.0) / strata
            for stratum in range(first, first + count)
        ]

    def _fitting(self, wanted: Sequence[int], choose: bool) -> list[int]:
        """How many needles each length's contexts hold: as many as are wanted, or, to `choose`, as fit.

        A needle is taken to be as long as the longest of a few samples of each family.
        """
        rng = self._rng("room")
        samples = [
            needle
            for source in (source for sources in self._sources.values() for source in sources)
            for needle in (
                [source.sample(rng) for _ in range(_COST_SAMPLES)] if isinstance(source, Family) else [source]
            )
        ]
        cost = max(self._encoder.count([needle.text for needle in samples])) + _FILLER_TOKENS_PER_NEEDLE
        suffix = max(len(self._encoder.encode_question(n.question, n.answer_prefix, n.answer)) for n in samples)
        overhead = len(self._encoder.encode_context("").ids) + suffix
        counts = []
        for length, count in zip(self.settings.lengths, wanted, strict=True):
            fitting = max(0, length - overhead) // cost
            needed = min(count, self.settings.probes)
            if fitting == 0:
                raise UsageError(
                    f"A length of {length} tokens is too short for one needle; use at least {overhead + cost}."
                )
            if fitting < needed and not choose:
                raise UsageError(
                    f"A length of {length} tokens is too short for {needed} needles per context; "
                    f"use at most {fitting}, or at least {overhead + cost * needed} tokens."
                )
            counts.append(min(count, fitting) if choose else count)
        return counts


def _make_probe(
    needle: Needle,
    suffix: EncodedQuestion,
    depth: float,
    start: int,
    encoded: EncodedContext,
) -> Probe:
    return Probe(
        family=needle.family,
        kind=needle.kind,
        depth=depth,
        asked_ids=suffix.asked,
        reply_ids=suffix.reply,
        answer_ids=suffix.answer,
        needle_span=encoded.span(start, start + len(needle.text)),
        answer_span=encoded.span(start + needle.answer_start, start + needle.answer_stop),
        distractor_spans=tuple(encoded.span(start + first, start + stop) for first, stop in needle.distractors),
        question=needle.question,
        answer=needle.answer,
        asked_places=suffix.places,
    )


def _check_settings(settings: ProbeSettings, max_positions: int) -> None:
    if settings.probes < 1:
        raise UsageError(f"Cannot build {settings.probes} probes; ask for at least 1.")
    if settings.needles_per_context is not None and settings.needles_per_context < 1:
        raise UsageError(f"Cannot put {settings.needles_per_context} needles into a context; ask for at least 1.")
    if settings.depths_per_filler < 1:
        raise UsageError(f"A filler text cannot serve {settings.depths_per_filler} contexts; use it for at least 1.")
    if settings.split not in SPLITS:
        raise UsageError(f"There is no split {settings.split!r}; use one of {', '.join(SPLITS)}.")
    wrong = [kind for kind in settings.kinds if kind not in KINDS]
    if wrong or not settings.kinds:
        raise UsageError(f"There is no probe kind {wrong[0] if wrong else ''!r}; use one of {', '.join(KINDS)}.")
    if not settings.lengths:
        raise UsageError("No context length is given; name at least one, such as 1024.")
    if max(settings.lengths) > max_positions:
        raise UsageError(
            f"A length of {max(settings.lengths)} tokens is more than the {max_positions} positions of the model; "
            f"use at most {max_positions}."
        )


def _by_kind(sources: Sequence[Family | Needle], kinds: Sequence[str]) -> dict[str, list[Family | Needle]]:
    """The sources of each kind asked for, kinds without any left out."""
    grouped = {kind: [source for source in sources if source.kind == kind] for kind in kinds}
    grouped = {kind: members for kind, members in grouped.items() if members}
    if not grouped:
        raise UsageError(
            f"None of the needles is of the kind {' or '.join(kinds)}; ask for another kind or other needles."
        )
    return grouped
