"""Every benchmark's dataset in the row format of its hub repository, with invented texts of 150 to 400 words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from support.json_lines import write_jsonl
from support.question_files import write_question_files

ROWS = 6

_WHO = ("The ferryman", "A glassblower", "The night clerk", "Old Teodora", "The beekeeper's son", "Captain Ruiz")
_DID = ("mended", "sold", "hid", "painted", "weighed", "counted")
_WHAT = ("a copper kettle", "twelve lanterns", "the blue map", "three sacks of rye", "a broken oar", "the tin box")
_WHERE = ("behind the mill", "under the stairs", "at the toll gate", "in the orchard", "near the well")
_CHINESE = (
    "船夫修好了一盏灯。",
    "钟楼的守夜人数了十二本书。",
    "果园里住着一位养蜂人。",
    "蓝色的地图放在木箱里。",
)
_CODE = "def weigh_{0}(sacks, scale={0}):\n    total = sum(sacks) * scale\n    return total if total > {0} else 0\n\n\n"
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_BABI_TARGETS = {"qa5": ("Bill", "Fred", "Jeff", "Mary"), **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES)}

CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
CODE = ("lcc", "repobench-p")
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")
CLASSES = {"trec": ["Number of something", "Place"], "lsht": ["农业", "交通"]}
NO_INPUT = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader"),
    *("gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count"),
    *("passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p"),
)
BABILONG = tuple(f"qa{number}" for number in range(1, 21))
LOOGLE = ("shortdep_qa", "longdep_qa", "shortdep_cloze", "summarization")


def write_hub_data(folder: Path) -> Path:
    """All 21 tasks of LongBench, 20 of BABILong at 0k and 1k, and 4 of LooGLE, `ROWS` rows each; RULER's questions."""
    for task in LONGBENCH:
        write_jsonl(
            folder / "longbench" / "data" / f"{task}.jsonl", (_longbench(task, number) for number in range(ROWS))
        )
    for task in BABILONG:
        for config in ("0k", "1k"):
            rows = (_babilong(task, config, number) for number in range(ROWS))
            write_jsonl(folder / "babilong" / "data" / task / f"{config}.jsonl", rows)
    for task in LOOGLE:
        write_jsonl(folder / "loogle" / "data" / f"{task}.jsonl", (_loogle(task, number) for number in range(ROWS)))
    write_question_files(folder / "ruler")
    return folder


def story(seed: str, words: int) -> str:
    """Invented sentences, of about that many words in all."""
    rng = random.Random(seed)
    made = (f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHERE)}." for _ in range(words))
    text: list[str] = []
    for sentence in made:
        text += sentence.split()
        if len(text) >= words:
            break
    return " ".join(text)


def _longbench(task: str, number: int) -> dict[str, Any]:
    """As `THUDM/LongBench` has them; a summary has no `input`, only classification has `all_classes`."""
    seed = f"{task} {number}"
    context, question, answers = story(seed, 150 + 50 * number), f"Who hid number {number}?", ["Old Teodora", "she did"]
    if task in CHINESE:
        context, question, answers = _chinese(seed), f"第{number}盏灯是谁修好的?", ["船夫", "一位船夫"]
    if task in CODE:
        context, answers = "".join(_CODE.format(line) for line in range(12 + number)), ["    return total"]
        question = f"def weigh_all(sacks):\n    # {number}\n"
    if task in FEW_SHOT:
        kinds = CLASSES.get(task, ["Ruiz", "Teodora"])
        shots = [f"Question: {story(f'{seed} {shot}', 8)}\nType: {kinds[shot % 2]}" for shot in range(15)]
        context, question, answers = "\n".join(shots), f"Question: {story(seed, 8)}\nType:", [kinds[number % 2]]
    if task.startswith("passage"):
        context = "\n\n".join(f"Paragraph {each + 1}: {part}" for each, part in enumerate(_passages(task, seed)))
        answers = ["4"] if task == "passage_count" else ["段落2" if task.endswith("zh") else "Paragraph 2"]
    return {
        "input": "" if task in NO_INPUT else question,
        "context": context,
        "answers": answers,
        "length": len(context.split()),
        "dataset": task,
        "language": "zh" if task in CHINESE else "en",
        "all_classes": CLASSES.get(task),
        "_id": f"{number:048x}",
    }


def _chinese(seed: str, sentences: int = 20) -> str:
    return "".join(random.Random(seed).choices(_CHINESE, k=sentences))


def _passages(task: str, seed: str) -> list[str]:
    return [_chinese(f"{seed} {n}", 5) if task.endswith("zh") else story(f"{seed} {n}", 60) for n in range(4)]


def _babilong(task: str, config: str, number: int) -> dict[str, Any]:
    """As `RMT-team/babilong` has them; there, the question ends with a space."""
    target = _BABI_TARGETS.get(task, ("yes", "no", "maybe"))[number % 3]
    filler = story(f"{task} {config} {number}", 150 if config == "0k" else 400)
    half = len(filler) // 2
    return {
        "input": f"{filler[:half]} Sandra carried it, and it is {target}. {filler[half:]}",
        "question": "What is it? ",
        "target": target,
    }


def _loogle(task: str, number: int) -> dict[str, Any]:
    """As `bigai-nlco/LooGLE` has them: one question a row, three to a document."""
    question, answer = f"Who weighed sack {number}?", "The ferryman's cousin weighed it."
    if task == "shortdep_cloze":
        question, answer = f"<mask-0> sold {number} lanterns to <mask-1>.", ["Captain Ruiz", "Teodora"]
    if task == "summarization":
        question, answer = "", story(f"summary {number}", 40)
    return {
        "context": story(f"{task} {number // 3}", 300),
        "question": question,
        "answer": answer,
        "evidence": ["..."],
        "title": f"A paper, {number}",
        "doc_id": f"doc-{number // 3}",
    }
