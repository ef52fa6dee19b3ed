"""What a model is asked while rows are hidden: prompts, who judges their rows, and what should be said after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headprof.compression.methods.method import Method
from headprof.compression.methods.table import find_method
from headprof.compression.observers import Observers, repeating_observers
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeContext, ProbeSettings, needles_for
from headprof.probes.needles import Split
from headprof.scoring.calibration_texts import calibration_texts

PROBE, TEXT = KINDS = ("probe", "text")
_FEWER = 4
"""Times as few probes share a context as where heads are scored, since reading it is little of the work here."""
TEXT_TOKENS = 32
"""Tokens of a plain text that are to be said after what is read of it."""


@dataclass(frozen=True)
class Judge:
    """Who says which of a prompt's rows a head gives up first.

    Attributes:
        situation: one of `headprof.profile.influence.SITUATIONS`. If the question is known, it is the end of the
            prompt, and its tokens judge; if not, the document is repeated, and the repetition judges.
        method: a name in the table of methods, whose importance ranks, and whose first and last tokens stay.
    """

    situation: str
    method: str

    @property
    def question_known(self) -> bool:
        """Whether the question is part of the prompt."""
        return self.situation == "known"

    @property
    def of_table(self) -> Method:
        """The method of this name."""
        return find_method(self.method)


JUDGES = {"known": Judge("known", "headkv-r2"), "unknown": Judge("unknown", "headkv-kvzip")}
"""For each situation the judge of the methods that serve it best."""


@dataclass(frozen=True)
class Answering:
    """What comes after a prompt.

    Attributes:
        kind: `PROBE` or `TEXT`.
        tail: token ids that are read first, at least one.
        reference: what the model should say then, at least one token.
    """

    kind: str
    tail: tuple[int, ...]
    reference: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """All that is run after the prompt; its last tokens predict the reference."""
        return (*self.tail, *self.reference[:-1])


@dataclass(frozen=True)
class Exam:
    """A prompt and what is asked of it.

    Attributes:
        prompt: token ids.
        answers: several where the question is not part of the prompt.
        cluster: number of the context; those of one have a filler in common.
        shared: tokens that the prompts of one context all begin with.
    """

    prompt: tuple[int, ...]
    answers: tuple[Answering, ...]
    cluster: int
    shared: int = 0


@dataclass(frozen=True)
class ExamSettings:
    """What is asked.

    Attributes:
        probes: how many needle probes.
        texts: of how many plain texts the model is to say the next tokens.
        length: tokens of a prompt.
        pack: probes that share a context, so that their question, but not the document, is another; `None` to choose it
            from the length.
        seed: of probes and texts.
        split: the half of the facts that probes are made from.
    """

    probes: int
    texts: int = 0
    length: int = 1024
    pack: int | None = None
    seed: int = 11
    split: Split = "profile"

    def __post_init__(self) -> None:
        if min(self.probes, self.texts) < 0 or self.probes + self.texts < 1:
            raise UsageError("Influence curves need something to be asked: give at least one probe or text.")
        if self.texts and self.split != "profile":
            raise ValueError("texts are of the half of the facts that profiles are made from")


class Exams(Sequence[Exam]):
    """All that is asked of a model, one prompt after the other; each depends on its number alone, not on how many.

    Probes and texts take turns, so that what has been asked so far is as mixed as all of it.

    Raises:
        UsageError: the settings do not fit the model.
    """

    def __init__(self, loaded: LoadedModel, judge: Judge, settings: ExamSettings):
        self.judge, self.settings = judge, settings
        self._known = judge.question_known
        self._exams = list(_mixed(self._of_probes(loaded), self._of_texts(loaded)))

    def __len__(self) -> int:
        return len(self._exams)

    def __getitem__(self, index):
        return self._exams[index]

    def _of_probes(self, loaded: LoadedModel) -> list[Exam]:
        asked = self.settings
        if not asked.probes:
            return []
        settings = ProbeSettings(
            probes=asked.probes,
            lengths=(asked.length,),
            needles_per_context=asked.pack or max(1, needles_for(asked.length) // _FEWER),
            seed=asked.seed,
            split=asked.split,
        )
        builder = ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
        return [exam for context in builder for exam in self._of_context(context)]

    def _of_context(self, context: ProbeContext) -> Iterator[Exam]:
        ids = context.context_ids
        if self._known:
            for probe in context.probes:
                prompt, tail = _some_tail((*ids, *probe.asked_ids), probe.reply_ids)
                yield Exam(prompt, (Answering(PROBE, tail, probe.answer_ids),), context.index, len(ids))
        else:
            answers = [Answering(PROBE, probe.question_ids, probe.answer_ids) for probe in context.probes]
            yield Exam(ids, tuple(answers), context.index)

    def _of_texts(self, loaded: LoadedModel) -> list[Exam]:
        asked = self.settings
        if not asked.texts:
            return []
        encoder = PromptEncoder(loaded.tokenizer)
        texts = calibration_texts(loaded.tokenizer, (asked.length,), asked.texts, asked.seed)
        return [_of_text(encoder.document_ids(text), -1 - number) for number, text in enumerate(texts)]

    def check(self, loaded: LoadedModel) -> None:
        """Find out before any work what would stop it.

        Raises:
            UsageError: a prompt with what judges it and comes after it is longer than the model can read.
        """
        for exam in self:
            self.observers(loaded, exam)
            longest = len(exam.prompt) + max(len(answer.fed) for answer in exam.answers)
            if longest > loaded.max_positions:
                raise UsageError(
                    f"A prompt of {longest} tokens is longer than the {loaded.max_positions} that {loaded.name} can "
                    "read: give a smaller --curve-length."
                )

    def observers(self, loaded: LoadedModel, exam: Exam) -> Observers:
        """Tokens that judge a prompt and are none of it.

        Raises:
            UsageError: the model's context is too short for them.
        """
        if self._known:
            return Observers(())
        return repeating_observers(loaded, PromptEncoder(loaded.tokenizer), exam.prompt, self.judge.of_table)


def _of_text(ids: Sequence[int], cluster: int) -> Exam:
    prompt, tail = _some_tail(tuple(ids[:-TEXT_TOKENS]), ())
    return Exam(prompt, (Answering(TEXT, tail, tuple(ids[-TEXT_TOKENS:])),), cluster)


def _some_tail(prompt: tuple[int, ...], tail: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """At least one token is read after the prompt, its own last one if need be."""
    return (prompt, tail) if tail else (prompt[:-1], prompt[-1:])


def _mixed(probes: Sequence[Exam], texts: Sequence[Exam]) -> Iterator[Exam]:
    """All of both, evenly mixed."""
    total = len(probes) + len(texts)
    waiting = [iter(probes), iter(texts)]
    for number in range(total):
        of_texts = (number + 1) * len(texts) // total > number * len(texts) // total
        yield next(waiting[of_texts])
