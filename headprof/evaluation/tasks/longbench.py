"""LongBench (Bai et al., ACL 2024): 21 tasks in English and Chinese, in six categories.

Metrics, lengths of the answers, which tasks go without a chat template and where context and input stand are the
benchmark's. The wording of the prompts is this project's own, close in content and in the answer it asks for: results
compare methods with each other, not with published figures. For those, give the benchmark's own
`dataset2prompt.json` as `TaskRequest.prompts`.

Where the question is not part of what is compressed, prompts are split and asked as kvpress does: instructions between
document and question are compressed with the document, what the answer follows ("Answer:") begins the model's turn, all
tasks have the chat template, and answers may have `MORE_TOKENS` more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from headprof.errors import UsageError
from headprof.evaluation.tasks.example import Example, Task, TaskRequest, split_template
from headprof.evaluation.tasks.prompts import own_prompts
from headprof.evaluation.tasks.sources import Row, Source, read_rows
from headprof.utils.files import read_text

DATASET = "THUDM/LongBench"
LICENSE = "MIT for the benchmark; each task's texts keep the license of the dataset they come from"

METRICS_AND_LENGTHS = {
    "narrativeqa": ("qa_f1", 128),
    "qasper": ("qa_f1", 128),
    "multifieldqa_en": ("qa_f1", 64),
    "multifieldqa_zh": ("qa_f1_zh", 64),
    "hotpotqa": ("qa_f1", 32),
    "2wikimqa": ("qa_f1", 32),
    "musique": ("qa_f1", 32),
    "dureader": ("rouge_l_zh", 128),
    "gov_report": ("rouge_l", 512),
    "qmsum": ("rouge_l", 512),
    "multi_news": ("rouge_l", 512),
    "vcsum": ("rouge_l_zh", 512),
    "trec": ("classification", 64),
    "triviaqa": ("qa_f1", 32),
    "samsum": ("rouge_l", 128),
    "lsht": ("classification", 64),
    "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32),
    "passage_retrieval_zh": ("retrieval_zh", 32),
    "lcc": ("code_sim", 64),
    "repobench-p": ("code_sim", 64),
}
"""Metric of each task, and how many tokens are generated."""
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")
"""Tasks whose context is solved examples: models go on with further ones, so only the first line counts."""
CODE = ("lcc", "repobench-p")
MORE_TOKENS = 20
_COLONS = (":", "：")


def examples(name: str, request: TaskRequest) -> Iterator[Example]:
    """The examples of task `name`, without the prefix.

    Raises:
        UsageError: the rows cannot be had, or lack a field, or the file with prompts cannot be used.
    """
    before, after = split_template(*_template(name, request.prompts))
    source = Source(DATASET, name, "test", (f"data/{name}", f"{name}/test", name), "longbench", archive="data.zip")
    metric, max_new_tokens = METRICS_AND_LENGTHS[name]
    apart = not request.question_known
    templated = bool(getattr(request.tokenizer, "chat_template", None))
    for row in read_rows(source, request.data_dir):
        question = row.text("input") if "input" in row else ""  # which summaries do not have
        whole = "", after.replace("{input}", question), ""
        lead, asked, reply = _apart(after, question, templated) if apart else whole
        yield Example(
            task=f"longbench/{name}",
            name=_name(row),
            group="",
            before=before.replace("{input}", question),
            document=row.text("context"),
            lead=lead,
            after=asked,
            reply=reply,
            answers=row.texts("answers"),
            classes=row.texts("all_classes") if metric == "classification" or "all_classes" in row else (),
            metric=f"longbench.{metric}",
            max_new_tokens=max_new_tokens + MORE_TOKENS * apart,
            chat=apart or name not in FEW_SHOT + CODE,
            first_line=name in FEW_SHOT,
            stops=("\n",) if name in FEW_SHOT else (),
        )
        if row.number == request.limit:
            return


def _apart(template: str, question: str, templated: bool) -> tuple[str, str, str]:
    """What follows the document: what is compressed with it, what is asked, and the beginning of the reply.

    The question begins with the line that holds `{input}`, or after the line breaks behind the document if none does.
    The last line begins the reply if it ends with a colon and there is a chat template; else it ends what is asked.
    """
    if "{input}" in template:
        start = template.rfind("\n", 0, template.index("{input}")) + 1
    else:
        start = len(template) - len(template.lstrip("\n"))
    asked = template[start:].replace("{input}", question)
    last = asked.rstrip().rfind("\n") + 1
    if templated and asked.rstrip().endswith(_COLONS) and (last or "{input}" not in template):
        return template[:start], asked[:last], asked[last:]
    return template[:start], asked, ""


def _name(row: Row) -> str:
    return f"{row.number}:{row.text('_id')}" if "_id" in row else str(row.number)


def _template(name: str, prompts: Path | None) -> tuple[str, str]:
    """The template of a task, and what to call it in messages; a task that the user's file lacks keeps ours."""
    given = _read_prompts(prompts) if prompts is not None else {}
    if name in given:
        return given[name], f"The prompt of {name} in {prompts}"
    return own_prompts("longbench")[name], f"The prompt of {name}"


def _read_prompts(path: Path) -> dict[str, str]:
    try:
        prompts = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"The prompts in {path} cannot be read ({error}): give a JSON file {{task: template}}."
        ) from None
    if not isinstance(prompts, dict) or not all(isinstance(template, str) for template in prompts.values()):
        raise UsageError(f"{path} does not hold prompts: write one JSON object {{task: template}}.")
    prompts = {task.removeprefix("longbench/"): template for task, template in prompts.items()}
    unknown = [task for task in prompts if task not in METRICS_AND_LENGTHS]
    if len(unknown) == len(prompts):
        raise UsageError(f"{path} has no prompt of a LongBench task: name them hotpotqa, trec and so on.")
    return prompts


TASKS = tuple(Task(f"longbench/{name}", DATASET, LICENSE, partial(examples, name)) for name in METRICS_AND_LENGTHS)
