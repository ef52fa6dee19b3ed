"""One question of a benchmark as a prompt, and what a benchmark's tasks are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headprof.errors import ModelError, UsageError
from headprof.evaluation.metrics import METRICS, first_line
from headprof.models.text_encoder import TextEncoder

DEFAULT_LENGTHS = (1024,)


@dataclass(frozen=True)
class Example:
    """A prompt and what should be answered.

    The user's text is `before + document + lead + after`, nothing between them; `reply` begins the answer.

    Attributes:
        task: `"longbench/hotpotqa"`.
        name: unique within the task, and the same in every run over the same data.
        group: what results are grouped by beside the task: the length of BABILong's and RULER's prompts, such as
            `"1k"`; else empty.
        before: instructions ahead of the document.
        document: the long part, which may be cut in the middle, and which is compressed with `before` and `lead` alone
            when the question is not known yet.
        after: the question, and instructions behind the document.
        reply: the given beginning of the model's reply; may be empty.
        answers: what counts as right: any one of them, or for `ruler.all` all of them; for `loogle.cloze` number `n`
            is what `<mask-n>` stands for, empty where there is no such mask.
        classes: the labels among which the answer is; for tasks that have such.
        metric: what the prediction is scored by, a name in `METRICS`.
        max_new_tokens: tokens to generate.
        chat: whether the chat template goes around the prompt.
        first_line: whether only the prediction's first line counts.
        stops: texts at which generation may end, since nothing from there on counts.
        written: a right answer in the form that is asked for, where `answers` has it in another.
        lead: instructions behind the document that are compressed with it.
    """

    task: str
    name: str
    group: str
    before: str
    document: str
    after: str
    reply: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str
    max_new_tokens: int
    chat: bool
    first_line: bool = False
    stops: tuple[str, ...] = ()
    written: str = ""
    lead: str = field(default="", repr=False)  # so that digests of examples without one stay as they were

    @property
    def reference(self) -> str:
        """The right answer as a model would write it: the first that is not blank, or all where all are wanted."""
        if self.written:
            return self.written
        if self.metric == "ruler.all":
            return ", ".join(self.answers)
        if self.metric == "loogle.cloze":
            return json.dumps({f"<mask-{n}>": answer for n, answer in enumerate(self.answers)}, ensure_ascii=False)
        return next((answer for answer in self.answers if answer.strip()), "")

    def score(self, prediction: str) -> float:
        """What a generated text is worth by the task's metric, 0 to 1."""
        counted = first_line(prediction) if self.first_line else prediction
        return METRICS[self.metric](counted, self.answers, self.classes)

    def is_complete(self, prediction: str) -> bool:
        """Whether nothing that is generated after this text counts."""
        text = prediction.lstrip("\n")
        return any(stop in text for stop in self.stops)

    @property
    def text(self) -> str:
        """The whole prompt but for the chat template."""
        return self.before + self.document + self.lead + self.after + self.reply


@dataclass(frozen=True)
class TaskRequest:
    """What to make examples from.

    Attributes:
        data_dir: the datasets' own files; `None` to take them from the hub.
        limit: how many examples at most of a task, and of each length if it has several: the first ones.
        lengths: of BABILong's and RULER's prompts, in tokens; `DEFAULT_LENGTHS` if empty.
        tokenizer: counts RULER's tokens.
        seed: of what is generated.
        max_positions: longest sequence that the model was made for; `None` to take any.
        prompts: a JSON file `{task: template}` whose templates, with `{context}` and `{input}`, replace LongBench's.
        question_known: whether the question is part of what is compressed.
    """

    data_dir: Path | None
    limit: int | None
    lengths: tuple[int, ...]
    tokenizer: Any
    seed: int
    prompts: Path | None = None
    max_positions: int | None = None
    question_known: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"A limit of {self.limit} examples leaves nothing to do: give at least 1.")


@dataclass(frozen=True)
class Task:
    """A task of a benchmark.

    Attributes:
        name: `"longbench/hotpotqa"`.
        dataset: its id on the hub; empty if it is generated.
        license: what the data may be used under.
        examples: makes the examples, one by one; raises `UsageError` when the data cannot be had.
    """

    name: str
    dataset: str
    license: str
    examples: Callable[[TaskRequest], Iterator[Example]]


def split_template(template: str, where: str) -> tuple[str, str]:
    """What a prompt template says before and after its `{context}`.

    Raises:
        UsageError: it does not have exactly one `{context}`; `where` names it.
    """
    if template.count("{context}") != 1:
        raise UsageError(f"{where} needs {{context}} exactly once, where the document goes: put it there.")
    before, after = template.split("{context}")
    return before, after


def cut_middle(example: Example, texts: TextEncoder, max_tokens: int, overhead: int = 0) -> Example:
    """Leave out the middle of the document if the prompt is too long, as LongBench does with the whole prompt.

    As many tokens are kept of the document's beginning as of its end; instructions and question stay whole.

    Args:
        example: the prompt.
        texts: encodes with a fast tokenizer.
        max_tokens: how many there may be in all.
        overhead: how many of them are taken by what is not in `example.text`: the chat template, the generated tokens.

    Raises:
        UsageError: instructions and question alone are too long.
        ModelError: the tokenizer gives no character offsets.
    """
    room = max_tokens - overhead
    excess = len(texts.ids(example.text)) - room
    if excess <= 0:
        return example
    kept = len(texts.ids(example.document))
    while kept > 0:
        kept = max(0, kept - excess)
        cut = replace(example, document=keep_ends(example.document, texts, kept))
        excess = len(texts.ids(cut.text)) - room  # tokens may join differently where the halves meet
        if excess <= 0:
            return cut
    raise UsageError(
        f"The instructions and the question of example {example.name} of {example.task} alone do not fit into "
        f"{max_tokens} tokens, {overhead} of which are taken: raise the maximum, or leave this task out."
    )


def keep_ends(text: str, texts: TextEncoder, tokens: int) -> str:
    """The first and the last half of `tokens` tokens of a text that has more.

    The text is cut between characters: one whose tokens are only partly kept is left out.

    Raises:
        ModelError: the tokenizer gives no character offsets.
    """
    if not texts.gives_offsets:
        raise ModelError(
            "Documents are cut by a fast tokenizer's character offsets, which this one does not give; load it with "
            "use_fast=True or convert it to tokenizer.json."
        )
    _, offsets = texts.with_offsets(text)
    last = tokens // 2
    first = tokens - last
    if tokens >= len(offsets):
        return text
    head = text[: offsets[first][0]]  # up to where the first token that is left out begins
    resume = len(offsets) - last
    tail = text[max(offsets[resume][0], offsets[resume - 1][1]) :] if last else ""
    return head + tail
