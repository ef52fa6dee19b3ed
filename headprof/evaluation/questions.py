"""Questions as token ids, from this project's probes and from the examples of other benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from headprof.errors import UsageError
from headprof.evaluation.kept_tokens import LocatedText
from headprof.evaluation.results import PROBE_TASKS
from headprof.evaluation.tasks import Example, cut_middle
from headprof.models.encoded import located
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import Probe, ProbeBuilder, ProbeContext, ProbeSettings
from headprof.probes.families import NONLITERAL, load_nonliteral
from headprof.utils.units import format_length


@dataclass(frozen=True)
class Grading:
    """How a generated answer is scored.

    Attributes:
        score: what a text is worth, 0 to 1.
        is_complete: whether nothing that comes after a text counts.
        max_new_tokens: tokens to generate at most.
    """

    score: Callable[[str], float]
    is_complete: Callable[[str], bool]
    max_new_tokens: int


@dataclass(frozen=True)
class Question:
    """A document and a question about it.

    Attributes:
        task, name, group, depth, family: as in `Answer`, where the name is called `question`.
        document_ids: everything before the question, chat template included.
        asked_ids: the question, up to where the model answers.
        reply_ids: the given beginning of the model's reply; may be empty.
        reference_ids: a right answer, at least one token, as many as the model may generate.
        grading: of what the model generates; `None` if the reference is fed instead, and right when each of its tokens
            is the model's arg-max.
        texts: what `document_ids` and `asked_ids` are made of, as far as it is not the chat template's; empty where
            that was not asked for.
    """

    task: str
    name: str
    group: str
    document_ids: tuple[int, ...]
    asked_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    grading: Grading | None = None
    depth: float | None = None
    family: str = ""
    texts: tuple[LocatedText, ...] = ()


def of_probe(task: str, name: str, length: int, context: ProbeContext, probe: Probe) -> Question:
    """What a probe asks about its context, whose prompt was to have so many tokens."""
    return Question(
        task=task,
        name=name,
        group=format_length(length),
        document_ids=context.context_ids,
        asked_ids=probe.asked_ids,
        reply_ids=probe.reply_ids,
        reference_ids=probe.answer_ids,
        depth=probe.depth,
        family=probe.family,
        texts=(
            LocatedText(context.body, context.encoded),
            LocatedText(probe.question, located(probe.asked_ids, probe.asked_places), len(context.context_ids)),
        ),
    )


class ProbeQuestions(Sequence[Question]):
    """Needle probes that no profile was made from: names and values of the held-out half, one needle a context.

    Args:
        loaded: the model.
        task: `"niah"`, `"reasoning"`, or `"nonliteral"` for the retrieval probes whose question shares no word with the
            needle.
        number: how many; the lengths take turns.
        lengths: of the prompts, in tokens.
        families: names of those to ask; all of the task's own when there are none.
        seed: of the probes.

    Raises:
        UsageError: the settings ask for something that does not exist or does not fit.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: str,
        number: int,
        lengths: tuple[int, ...],
        families: tuple[str, ...] | None,
        seed: int,
    ):
        self.task = task
        self.lengths = lengths
        settings = ProbeSettings(
            probes=number,
            lengths=lengths,
            kinds=(PROBE_TASKS[task],),
            families=_nonliteral(families) if task == NONLITERAL else families,
            needles_per_context=1,
            seed=seed,
            split="eval",
        )
        self._builder = ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)

    def __len__(self) -> int:
        return len(self._builder)

    def __getitem__(self, index):
        context = self._builder.context(index)
        probe = context.probes[0]
        return of_probe(self.task, str(index), self.lengths[index % len(self.lengths)], context, probe)

    def digest(self, index: int) -> str:
        """Empty: probes follow from their settings."""
        return ""


def _nonliteral(families: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of the families named that are non-literal; all when there are none.

    Raises:
        UsageError: none of them is.
    """
    own = tuple(family.name for family in load_nonliteral())
    chosen = tuple(name for name in own if families is None or name in families or NONLITERAL in families)
    if not chosen:
        raise UsageError(f"None of these families is of {NONLITERAL}: use some of {', '.join(own)}.")
    return chosen


class ExampleQuestions(Sequence[Question]):
    """The examples of a benchmark's task.

    Args:
        loaded: the model.
        examples: of one task.
        max_prompt: tokens of a prompt; what is longer is cut in the middle. None for as many as the model can read.
        locates: whether questions have `texts`.

    Raises:
        UsageError: from the items: instructions and question alone are too long, or they are to have `texts` and the
            tokenizer does not say where its tokens stand.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        max_prompt: int | None = None,
        locates: bool = False,
    ):
        self._loaded = loaded
        self._examples = examples
        self._max_prompt = max_prompt
        self._locates = locates

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        encoder = self._encoder(self._examples[index])
        example = self._cut(self._examples[index], encoder)
        start = example.before + example.document + example.lead
        end = encoder.encode_end(example.after, example.reply, example.reference)
        document_ids = tuple(encoder.start_ids(start))
        texts: tuple[LocatedText, ...] = ()
        if self._locates:
            asked = LocatedText(example.after, located(end.asked, end.places), len(document_ids))
            texts = (LocatedText(start, encoder.encode_start(start)), asked)
        return Question(
            task=example.task,
            name=example.name,
            group=example.group,
            document_ids=document_ids,
            asked_ids=end.asked,
            reply_ids=end.reply,
            reference_ids=end.answer[: example.max_new_tokens],
            grading=Grading(example.score, example.is_complete, example.max_new_tokens),
            texts=texts,
        )

    def _encoder(self, example: Example) -> PromptEncoder:
        return PromptEncoder(self._loaded.tokenizer, raw=not example.chat)

    def _cut(self, example: Example, encoder: PromptEncoder) -> Example:
        """The example as it is fed, with as much of its document as fits."""
        loaded = self._loaded
        after, reply = encoder.cued(example.after, example.reply)
        room = loaded.max_positions - example.max_new_tokens
        most = min(room, self._max_prompt or room)
        return cut_middle(replace(example, after=after, reply=reply), encoder.texts, most, encoder.overhead)

    def check(self) -> None:
        """Find out before any work what would stop it.

        Raises:
            UsageError: instructions and question of an example alone are too long, or a package for its metric is
                not installed.
        """
        for example in self._examples:
            self._cut(replace(example, document=""), self._encoder(example))
        self._examples[0].score("x")

    def digest(self, index: int) -> str:
        """Of the example, whole and uncut."""
        return digest_of(self._examples[index])


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a value's `repr`."""
    return sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()
