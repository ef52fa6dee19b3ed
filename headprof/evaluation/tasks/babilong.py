"""BABILong (Kuratov et al., NeurIPS 2024): facts of the bAbI tasks scattered in the text of books.

Tasks `qa1` to `qa5` are the "reasoning in a haystack" of the HeadKV paper. Instructions and worked examples are this
project's own; the examples use people, places and things that occur in none of the data, so that none is a right
answer. The benchmark's labels decide what counts as an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice

from headprof.evaluation.metrics import LABEL_ENDS, possible_labels
from headprof.evaluation.tasks.example import DEFAULT_LENGTHS, Example, Task, TaskRequest
from headprof.evaluation.tasks.prompts import own_prompts
from headprof.evaluation.tasks.sources import Source, read_rows

DATASET = "RMT-team/babilong-100examples"
OTHER_NAME = "RMT-team/babilong"
LICENSE = "Apache-2.0; its facts are bAbI's (BSD), its filler PG-19's books, which are in the public domain"
MAX_NEW_TOKENS = 20

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
    **dict.fromkeys(("qa11", "qa12", "qa13"), PLACES),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    **dict.fromkeys(("qa17", "qa18"), ("no", "yes")),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""What may be answered to the questions of a task."""
REASONING = ("qa1", "qa2", "qa3", "qa4", "qa5")
"""The tasks that the HeadKV paper takes."""


def config_of(length: int) -> str:
    """What the benchmark calls a length in tokens, counted in 1024s or in 1000s: `"0k"`, `"4k"`, `"1M"`."""
    thousands = length // 1000 if length % 1000 == 0 else round(length / 1024)
    millions = {1000: "1M", 1024: "1M", 10_000: "10M", 10_240: "10M"}
    return millions.get(thousands, f"{thousands}k")


def examples(name: str, request: TaskRequest) -> Iterator[Example]:
    """The examples of task `name` (`"qa1"`), length by length.

    Raises:
        UsageError: the rows cannot be had, or lack a field.
    """
    for config in dict.fromkeys(map(config_of, request.lengths or DEFAULT_LENGTHS)):
        yield from _of_length(name, config, request)


def _of_length(name: str, config: str, request: TaskRequest) -> Iterator[Example]:
    files = (f"data/{name}/{config}", f"{name}/{config}", f"{config}/{name}")
    source = Source(DATASET, config, name, files, "babilong", other_name=OTHER_NAME)
    before = _instructions(name)
    for row in islice(read_rows(source, request.data_dir), request.limit):
        yield Example(
            task=f"babilong/{name}",
            name=f"{config}:{row.number}",
            group=config,
            before=f"{before}\n\nText: ",
            document=row.text("input"),
            after=f"\n\nQuestion: {row.text('question').strip()}",
            reply="",
            answers=(row.text("target"),),
            written=_written(name, row.text("question"), row.text("target")),
            classes=possible_labels(LABELS[name], row.text("question")),
            metric="babilong.label",
            max_new_tokens=MAX_NEW_TOKENS,
            chat=True,
            stops=LABEL_ENDS,
        )


def _instructions(name: str) -> str:
    prompt = own_prompts("babilong")["other"] | own_prompts("babilong").get(name, {})
    worked = [
        f"Example: {example['text']}\nQuestion: {example['question']}\nAnswer: {example['answer']}"
        for example in prompt["examples"]
    ]
    return "\n\n".join([prompt["instruction"], *worked, prompt["format"]])


def _written(name: str, question: str, target: str) -> str:
    """The right answer as the instructions ask for it: a sentence, or the label alone."""
    sentence = own_prompts("babilong").get(name, {}).get("sentence")
    asked = re.match(sentence["question"], question.strip()) if sentence else None
    return sentence["answer"].format(*asked.groups(), target=target) if asked else target


TASKS = tuple(Task(f"babilong/{name}", DATASET, LICENSE, partial(examples, name)) for name in LABELS)
