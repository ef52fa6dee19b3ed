"""The benchmarks' tasks as examples: rows from files in the hub's formats, prompts, cutting long documents."""

import gzip
import json
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import pandas
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.json_lines import write_jsonl
from support.question_files import write_question_files
from support.tiny_models import tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from headprof.errors import ModelError, UsageError
from headprof.evaluation.metrics import possible_labels
from headprof.evaluation.tasks import BENCHMARKS, TASKS, Example, TaskRequest, babilong, cut_middle, expand, longbench
from headprof.evaluation.tasks.babilong import config_of
from headprof.evaluation.tasks.example import keep_ends, split_template
from headprof.evaluation.tasks.sources import Source, find_files, parsed, read_rows
from headprof.models.text_encoder import TextEncoder
from headprof.utils.units import format_length

ROWS = 7
METRICS = {
    *(f"longbench.{name}" for name in ("qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "classification", "retrieval")),
    *(f"longbench.{name}" for name in ("retrieval_zh", "count", "code_sim")),
    *("babilong.label", "loogle.rouge_l", "loogle.cloze", "ruler.all", "ruler.any"),
}
NO_INPUT = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")


def longbench_row(task, number):
    return {
        "input": "" if task in NO_INPUT else f"Which one is {number}?",
        "context": f"Context {number} of {task}. " * 5,
        "answers": [f"answer {number}", f"other {number}"],
        "length": 25,
        "dataset": task,
        "language": "en",
        "all_classes": ["Date", "Place"] if task in ("trec", "lsht") else None,
        "_id": f"{number:04x}",
    }


def babilong_row(number):
    places = babilong.PLACES
    return {
        "input": f"A page of a book. Mary went to the {places[number % 6]}. Another page.",
        "question": "Where is Mary? ",
        "target": places[number % 6],
    }


def loogle_pair(task, number):
    if task == "shortdep_cloze":
        return {
            "Q": f"<mask-0> met <mask-1> on day {number}.",
            "S": "...",
            "A": {"<mask-0>": "Ann", "<mask-1>": "Bo's"},
        }
    return {"Q": f'What is "{number}"?', "S": ["..."], "A": f"It's {number}."}


def loogle_old_rows(task):
    """Three questions a document, the pairs printed by Python, as first published."""
    if task == "summarization":
        return [{"input": f"Paper {n}", "title": "t", "qa_pairs": "none", "output": f"Sum {n}"} for n in range(ROWS)]
    return [
        {
            "input": f"Document {n}",
            "title": "t",
            "qa_pairs": str([loogle_pair(task, 3 * n + pair) for pair in range(3)]),
            "output": "none",
        }
        for n in range(ROWS)
    ]


def loogle_new_rows(task):
    """One question a row, as on the hub now."""
    if task == "summarization":
        return [{"context": f"Paper {n}", "question": "", "answer": f"Sum {n}", "doc_id": n} for n in range(ROWS)]
    rows = []
    for number in range(3 * ROWS):
        pair = loogle_pair(task, number)
        answer = list(pair["A"].values()) if task == "shortdep_cloze" else pair["A"]
        rows.append(
            {"context": f"Document {number // 3}", "question": pair["Q"], "answer": answer, "evidence": ["..."]}
        )
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Every dataset in the hub's row formats, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("data")
    for task in longbench.METRICS_AND_LENGTHS:
        write_jsonl(folder / "longbench" / f"{task}.jsonl", [longbench_row(task, n) for n in range(ROWS)])
    for task in babilong.LABELS:
        for config in ("0k", "1k"):
            write_jsonl(folder / "babilong" / config / f"{task}.jsonl", [babilong_row(n) for n in range(ROWS)])
    for name in BENCHMARKS["loogle"]:
        task = name.partition("/")[2]
        write_jsonl(folder / "loogle" / "data" / f"{task}.jsonl", loogle_new_rows(task))
    write_question_files(folder / "ruler")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat=True)


def request(data_dir=None, limit=None, lengths=(1024,), tokenizer=None, seed=0, prompts=None):
    return TaskRequest(data_dir, limit, lengths, tokenizer, seed, prompts)


def examples(name, *arguments, **options):
    return list(TASKS[name].examples(request(*arguments, **options)))


# All tasks


@pytest.mark.parametrize("name", expand(list(BENCHMARKS)))
def test_every_task_gives_examples_from_a_local_folder(name, data_dir, tokenizer):
    lengths = (1500,) if name in ("ruler/vt", "ruler/cwe") else (1024,)
    found = examples(name, data_dir, limit=5, lengths=lengths, tokenizer=tokenizer)
    assert len(found) == 5
    assert len({example.name for example in found}) == 5
    assert found == examples(name, data_dir, limit=5, lengths=lengths, tokenizer=tokenizer)
    assert found[:2] == examples(name, data_dir, limit=2, lengths=lengths, tokenizer=tokenizer)
    for example in found:
        assert example.task == name
        assert example.group == (format_length(*lengths) if name.startswith(("babilong/", "ruler/")) else "")
        assert example.text == example.before + example.document + example.after + example.reply
        assert example.before
        assert example.document
        assert example.answers
        assert all(isinstance(answer, str) and answer for answer in example.answers)
        assert example.metric in METRICS
        assert example.metric.startswith(name.partition("/")[0])
        assert example.max_new_tokens > 0
        assert "{" not in example.before + example.after or "cloze" in name


def test_tasks_know_where_their_data_are_from():
    assert len(BENCHMARKS["longbench"]) == 21
    for task in TASKS.values():
        assert task.license
        generated = task.name.startswith("ruler/") and not task.name.startswith("ruler/qa_")
        assert bool(task.dataset) != generated


@pytest.mark.parametrize(
    ("name", "lengths", "groups"),
    [
        ("babilong/qa1", (0, 1024, 1000), ["0k", "0k", "1k", "1k"]),
        ("ruler/niah_single_2", (1000, 1024, 2048, 1024), ["1000", "1000", "1k", "1k", "2k", "2k"]),
    ],
)
def test_a_limit_counts_per_length(name, lengths, groups, data_dir, tokenizer):
    found = examples(name, data_dir, limit=2, lengths=lengths, tokenizer=tokenizer)
    assert [example.group for example in found] == groups
    assert len({example.name for example in found}) == len(found)


def test_without_lengths_prompts_have_a_thousand_tokens(data_dir, tokenizer):
    for name in ("babilong/qa1", "ruler/niah_single_2"):
        found = examples(name, data_dir, limit=1, lengths=(), tokenizer=tokenizer)
        assert [example.group for example in found] == ["1k"]


def test_a_limit_of_nothing_is_an_error():
    with pytest.raises(UsageError, match="limit of 0"):
        request(limit=0)


def test_expand():
    assert expand(["longbench/lcc", "babilong", "longbench/lcc"]) == [
        "longbench/lcc",
        *(f"babilong/qa{number}" for number in range(1, 6)),
    ]
    assert expand(["babilong/qa7"]) == ["babilong/qa7"]
    assert len(expand(list(BENCHMARKS))) == 21 + 5 + 4 + 13
    with pytest.raises(UsageError, match=r"no benchmark 'helm'.*longbench, babilong, loogle, ruler, ruler-generated"):
        expand(["helm"])
    with pytest.raises(UsageError, match=r"no task 'qa1' in longbench.*hotpotqa"):
        expand(["longbench/qa1"])


# LongBench

SINGLE_LINE = ("trec", "triviaqa", "samsum", "lsht")


@pytest.mark.parametrize("task", longbench.METRICS_AND_LENGTHS)
def test_longbench_puts_context_and_question_in_their_places(task, data_dir):
    second = examples(f"longbench/{task}", data_dir)[1]
    row = longbench_row(task, 1)
    assert second.name == "2:0001"
    assert second.document == row["context"]
    assert second.after.count(row["input"] or "\n") >= 1
    assert second.answers == ("answer 1", "other 1")
    assert second.classes == (("Date", "Place") if task in ("trec", "lsht") else ())
    assert second.first_line == (task in SINGLE_LINE)
    assert second.chat == (task not in (*SINGLE_LINE, "lcc", "repobench-p"))
    chinese = task in ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
    assert chinese == any("一" <= letter <= "鿿" for letter in second.before)
    assert second.metric.endswith("_zh") == (chinese and task != "lsht")


INPUTS = {
    **dict.fromkeys(("gov_report", "multi_news", "vcsum", "passage_count", "lcc"), ""),
    "trec": "Question: How far is it ?\nType:",
    "triviaqa": "Passage:\nSome text.\nQuestion:\nHow far is it?\nAnswer:",
    "samsum": "Dialogue: Ann: Hi\r\nBo: Ho\nSummary: ",
    "lsht": "新闻内容：一则新闻。\n类别：",
    "repobench-p": "def far(it):\n",
}
"""What the datasets' rows ask; of the other tasks a question in one line."""


@pytest.mark.parametrize("name", BENCHMARKS["longbench"])
def test_longbench_is_asked_as_kvpress_does_where_the_question_comes_later(name, tmp_path, tokenizer):
    """The instructions stand with the document, the question alone follows, and its cue begins the model's turn."""
    plain, data_dir, task = tiny_tokenizer(), tmp_path / "longbench", name.removeprefix("longbench/")
    rows = [longbench_row(task, number) | {"input": INPUTS.get(task, "How far is it?")} for number in range(3)]
    write_jsonl(data_dir / f"{task}.jsonl", rows)
    known = list(TASKS[name].examples(TaskRequest(data_dir, 3, (), tokenizer, 0)))
    later = list(TASKS[name].examples(TaskRequest(data_dir, 3, (), tokenizer, 0, question_known=False)))
    bare = list(TASKS[name].examples(TaskRequest(data_dir, 3, (), plain, 0, question_known=False)))
    for one, other, row, without in zip(known, later, rows, bare, strict=False):
        assert other.text == one.text == without.text
        assert (other.before, other.document) == (one.before, one.document)
        assert row["input"] in other.after + other.reply
        assert not row["input"] or row["input"] not in other.lead
        assert other.reply.rstrip().endswith((":", "：")) and "\n" not in other.reply.strip()
        assert (without.lead, without.after, without.reply) == (other.lead, other.after + other.reply, "")
        assert other.chat and other.max_new_tokens == one.max_new_tokens + 20
        assert (one.lead, one.reply) == ("", "")
        assert (other.metric, other.first_line, other.answers) == (one.metric, one.first_line, one.answers)
    if name in ("longbench/qasper", "longbench/hotpotqa", "longbench/qmsum"):
        assert all(len(example.lead) > 60 and example.after.startswith(("Question", "Query")) for example in later)


def test_a_question_that_ends_with_a_colon_is_no_cue(tmp_path):
    row = {"context": "A text.", "input": "What comes next:", "answers": ["x"]}
    write_jsonl(tmp_path / "longbench" / "qasper.jsonl", [row])
    (tmp_path / "prompts.json").write_text(json.dumps({"qasper": "Read. {context}\nNow answer.\n{input}"}))
    asked = TaskRequest(tmp_path, 1, (), tiny_tokenizer(chat=True), 0, tmp_path / "prompts.json", question_known=False)
    (example,) = TASKS["longbench/qasper"].examples(asked)
    assert (example.lead, example.after, example.reply) == ("\nNow answer.\n", "What comes next:", "")


def test_longbench_prompts_can_be_given(data_dir, tmp_path):
    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(
        json.dumps({"hotpotqa": "Q: {input} {x}\n{context}\nQ: {input}", "longbench/trec": "{context}{input}"})
    )
    example = examples("longbench/hotpotqa", data_dir, limit=1, prompts=prompts)[0]
    assert (example.before, example.after) == ("Q: Which one is 0? {x}\n", "\nQ: Which one is 0?")
    example = examples("longbench/trec", data_dir, limit=1, prompts=prompts)[0]
    assert (example.before, example.after) == ("", "Which one is 0?")
    ours = examples("longbench/lcc", data_dir, limit=1)
    assert examples("longbench/lcc", data_dir, limit=1, prompts=prompts) == ours


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "does not hold prompts"),
        ('{"hotpotqa": 3}', "does not hold prompts"),
        ('{"hotpot": "{context}"}', "no prompt of a LongBench task"),
        ('{"hotpotqa": "{input}"}', "prompt of hotpotqa in .* needs {context} exactly once"),
        ('{"hotpotqa": "{context} {context}"}', "exactly once"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(content, message, data_dir, tmp_path):
    prompts = tmp_path / "prompts.json"
    if content is not None:
        prompts.write_text(content)
    with pytest.raises(UsageError, match=message):
        examples("longbench/hotpotqa", data_dir, prompts=prompts)


def test_split_template():
    assert split_template("a{context}b", "It") == ("a", "b")


# BABILong


def test_no_label_is_mentioned_before_the_text(data_dir):
    """So that repeating a worked example, or the instructions, is never right."""
    for task in babilong.REASONING:  # the others may name yes and no
        labels = babilong.LABELS[task]
        example = examples(f"babilong/{task}", data_dir, limit=1)[0]
        assert example.classes == possible_labels(labels, example.after)
        assert not [label for label in labels if label.lower() in example.before.lower()]
        assert example.before.count("Example: ") == 2


def test_babilong_keeps_the_facts_and_the_question(data_dir):
    example = examples("babilong/qa1", data_dir, lengths=(0,))[3]
    row = babilong_row(3)
    assert (example.document, example.answers) == (row["input"], (row["target"],))
    assert example.after.endswith("Where is Mary?")
    assert (example.group, example.name) == ("0k", "0k:4")


@pytest.mark.parametrize(
    ("length", "config"),
    [(0, "0k"), (1000, "1k"), (1024, "1k"), (131072, "128k"), (128_000, "128k"), (2**20, "1M"), (10**6, "1M")],
)
def test_lengths_are_named_as_the_benchmark_does(length, config):
    assert config_of(length) == config


@pytest.mark.parametrize(
    ("task", "question", "target", "reference"),
    [
        ("qa1", "Where is Sandra? ", "office", "Sandra is in the office."),
        ("qa2", "Where is the milk?", "garden", "The milk is in the garden."),
        ("qa3", "Where was the milk before the hallway? ", "office", "Before the hallway, the milk was in the office."),
        ("qa1", "In which place is Sandra?", "office", "office"),
        ("qa4", "What is north of the garden?", "office", "office"),
        ("qa7", "How many objects is Mary carrying?", "two", "two"),
    ],
)
def test_babilongs_reference_has_the_form_that_is_asked_for(task, question, target, reference, tmp_path):
    row = {"input": "Sandra went to the office, Mary to the garden.", "question": question, "target": target}
    (tmp_path / "1k").mkdir()
    (tmp_path / "1k" / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = TASKS[f"babilong/{task}"].examples(TaskRequest(tmp_path, None, (1024,), None, 0))
    assert example.reference == reference and example.answers == (target,) and example.score(reference) == 1


def test_references_of_several_answers_hold_them_all():
    example = Example("t", "1", "", "", "", "", "", ("12", "7"), (), "ruler.all", 9, True)
    assert example.reference == "12, 7" and example.score(example.reference) == 1
    cloze = replace(example, answers=("Olga", "the Bakers"), metric="loogle.cloze")
    assert cloze.reference == '{"<mask-0>": "Olga", "<mask-1>": "the Bakers"}' and cloze.score(cloze.reference) == 1


def test_generation_may_end_where_nothing_more_counts():
    label = Example("t", "1", "", "", "", "", "", ("office",), ("office",), "babilong.label", 9, True, stops=(".",))
    assert label.is_complete("In the office. And") and not label.is_complete("In the office")
    line = replace(label, stops=("\n",), first_line=True, metric="longbench.qa_f1", answers=("a dog",))
    assert line.is_complete("\n a dog\nand") and not line.is_complete("\n\n a dog")
    assert line.score("\na dog\na cat") == 1


def test_other_babilong_tasks_ask_for_their_labels(tmp_path):
    for task, target in (("qa6", "yes"), ("qa8", "football,milk"), ("qa19", "n,w")):
        write_jsonl(tmp_path / "1k" / f"{task}.jsonl", [{**babilong_row(0), "target": target}])
        (example,) = examples(f"babilong/{task}", tmp_path)
        assert example.answers == (target,) and example.classes == babilong.LABELS[task]
        assert example.score(example.reference) == 1 and example.before.startswith("The text below is from a book")
    assert "each as the first letter of north, east, south or west" in example.before


def test_labels_are_needed_where_they_are_counted(tmp_path):
    row = {"context": "x", "input": "y", "answers": ["Date"], "all_classes": None}
    write_jsonl(tmp_path / "trec.jsonl", [row])
    with pytest.raises(UsageError, match=r"Row 1 of .* has no field 'all_classes' with texts"):
        examples("longbench/trec", tmp_path)


# LooGLE


@pytest.mark.parametrize("name", BENCHMARKS["loogle"])
def test_both_layouts_of_loogle_give_the_same_examples(name, data_dir, tmp_path):
    task = name.partition("/")[2]
    old = "longdep_summarization" if task == "summarization" else task
    write_jsonl(tmp_path / f"{old}.jsonl", loogle_old_rows(task))
    found = examples(name, tmp_path)
    assert found == examples(name, data_dir)
    assert len(found) == (ROWS if task == "summarization" else 3 * ROWS)
    assert examples(name, tmp_path, limit=4) == found[:4]


def test_loogle_questions_and_answers(data_dir):
    question = examples("loogle/shortdep_qa", data_dir)[4]
    assert (question.document, question.answers) == ("Document 1", ("It's 4.",))
    assert 'Question: What is "4"?' in question.after
    cloze = examples("loogle/shortdep_cloze", data_dir)[4]
    assert cloze.answers == ("Ann", "Bo's")
    assert "<mask-0> met <mask-1> on day 4." in cloze.after


@pytest.mark.parametrize(
    ("answer", "entities"),
    [
        ({"<mask-1>": "B", "<mask-0>": "A"}, ("A", "B")),
        ({"<mask-2>": "C", "<mask-0>": "A"}, ("A", "", "C")),
        ("{'<mask-0>': \"A's\"}", ("A's",)),
        ('["A", "B"]', ("A", "B")),
        ("A", ("A",)),
    ],
)
def test_masked_entities_stand_in_the_order_of_their_masks(answer, entities, tmp_path):
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"context": "c", "question": "q", "answer": answer}])
    assert examples("loogle/shortdep_cloze", tmp_path)[0].answers == entities


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"input": "d", "qa_pairs": "none"}, "qa_pairs"),
        ({"input": "d", "qa_pairs": [{"Q": "q"}]}, "qa_pairs"),
        ({"context": "d", "question": "q"}, "answer"),
        ({"question": "q", "answer": "a"}, "input"),
    ],
)
def test_loogle_rows_that_lack_a_field(row, field, tmp_path):
    write_jsonl(tmp_path / "longdep_qa.jsonl", [row])
    with pytest.raises(UsageError, match=rf"Row 1 of .*longdep_qa\.jsonl has no field '{field}'"):
        examples("loogle/longdep_qa", tmp_path)


# Rows from files

SOURCE = Source("someone/Things", "red", "test", ("data/red", "red"), "things", archive="data.zip")
THREE = [{"text": f"row {n} é", "list": [f"{n}", "it's"], "none": None} for n in range(3)]


def as_json_lines(path, rows):
    write_jsonl(path, rows)


def as_json(path, rows):
    path.write_text(json.dumps(rows))


def as_gzip(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def as_parquet(path, rows):
    pandas.DataFrame(rows).to_parquet(path)


def as_csv(path, rows):
    pandas.DataFrame(rows).to_csv(path, index=False)


def as_zip(path, rows):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data/red.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("red.jsonl", as_json_lines),
        ("data/red.jsonl", as_json_lines),
        ("things/red.json", as_json),
        ("Things/data/red.jsonl.gz", as_gzip),
        ("red.json.gz", as_gzip),
        ("red.parquet", as_parquet),
        ("red.csv", as_csv),
        ("red.csv.gz", as_csv),
        ("data.zip", as_zip),
        ("things/data.zip", as_zip),
        ("a[b] *?/red.jsonl", as_json_lines),
    ],
)
def test_every_format_gives_the_same_rows(name, write, tmp_path, capfd):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, THREE)
    rows = list(read_rows(SOURCE, path.parent if "*" in name else tmp_path))
    assert [row.text("text") for row in rows] == [row["text"] for row in THREE]
    assert [row.texts("list") for row in rows] == [tuple(row["list"]) for row in THREE]
    assert not any("none" in row or "other" in row for row in rows)
    assert [row.number for row in rows] == [1, 2, 3]
    assert {Path(row.where).name for row in rows} == {path.name}
    assert capfd.readouterr() == ("", "")


def test_shards_are_read_in_order(tmp_path):
    for number in (1, 0):
        as_parquet(tmp_path / f"red-0000{number}-of-00002.parquet", [{"text": f"shard {number}"}])
    assert [row.text("text") for row in read_rows(SOURCE, tmp_path)] == ["shard 0", "shard 1"]


def test_the_dataset_s_own_place_comes_first(tmp_path):
    inner = write_jsonl(tmp_path / "data" / "red.jsonl", THREE)
    write_jsonl(tmp_path / "red.jsonl", THREE)
    assert find_files(SOURCE, tmp_path) == [str(inner)]


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    """A broken row after the first megabytes does not disturb whoever wants the first few."""
    rows = [json.dumps({"text": "x" * 100_000}) + "\n" for _ in range(400)]
    (tmp_path / "red.jsonl").write_text("".join(rows) + "{\n")
    assert len(list(islice(read_rows(SOURCE, tmp_path), 5))) == 5
    with pytest.raises(UsageError, match=r"red\.jsonl cannot be read"):
        list(read_rows(SOURCE, tmp_path))


def test_datasets_speaks_again_afterwards(tmp_path):
    level, bars = datasets.logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()
    write_jsonl(tmp_path / "red.jsonl", THREE)
    next(read_rows(SOURCE, tmp_path))  # not read to its end
    assert datasets.logging.get_verbosity() == level
    assert datasets.utils.are_progress_bars_disabled() == bars


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, r"has no red\.jsonl .* of someone/Things"),
        ("red.jsonl", b"", r"red\.jsonl holds no rows"),
        ("red.jsonl", b'{"text": "x"}\n{"text":\n', r"red\.jsonl cannot be read"),
        ("red.jsonl", b"caf\xe9", r"red\.jsonl cannot be read"),
        ("red.parquet", b"PAR1 or not", r"red\.parquet cannot be read"),
        ("red.json.gz", b"not packed", r"red\.json\.gz cannot be read"),
        ("data.zip", b"not packed", r"data\.zip cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, capfd):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(read_rows(SOURCE, tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no folder .*nowhere to read someone/Things from.*--data-dir"):
        list(read_rows(SOURCE, tmp_path / "nowhere"))


@pytest.mark.parametrize("value", [None, "absent", ["a"], {"b": 1}, True])
def test_a_row_without_a_text_is_named(value, tmp_path):
    row = {"other": 1} if value == "absent" else {"text": value}
    write_jsonl(tmp_path / "red.jsonl", [{"text": "fine", "other": 1}, row] if value in (None, "absent") else [row])
    with pytest.raises(UsageError, match=r"Row [12] of .*red\.jsonl has no field 'text' with a text"):
        [row.text("text") for row in read_rows(SOURCE, tmp_path)]


@pytest.mark.parametrize("value", [None, [], [["a"]], {"a": "b"}])
def test_a_row_without_texts_is_named(value, tmp_path):
    write_jsonl(tmp_path / "red.jsonl", [{"text": "x", "list": value}])
    with pytest.raises(UsageError, match=r"Row 1 of .*red\.jsonl has no field 'list' with texts"):
        next(read_rows(SOURCE, tmp_path)).texts("list")


def test_a_longbench_row_without_its_context(data_dir, tmp_path):
    rows = [longbench_row("trec", n) for n in range(3)]
    del rows[2]["context"]
    write_jsonl(tmp_path / "trec.jsonl", rows)
    with pytest.raises(UsageError, match=r"Row 3 of .*trec\.jsonl has no field 'context'"):
        examples("longbench/trec", tmp_path)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"b's\"]", ["a", "b's"]),
        ("{'a': 1}", {"a": 1}),
        ("[1] is a reference", "[1] is a reference"),
        ("['a' 'b'", "['a' 'b'"),
        ("plain", "plain"),
        (7, 7),
    ],
)
def test_lists_written_as_texts(value, meaning):
    assert parsed(value) == meaning


# Rows from the hub


@pytest.fixture
def asked(monkeypatch):
    """Online as far as the hub's client knows; the requests that would be made are listed, and all fail."""
    urls = []

    def fail(url, **options):
        urls.append(url)
        raise ConnectionError("Name or service not known. And more.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return urls


def reachable(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **options: None)


@pytest.mark.parametrize("name", ["longbench/hotpotqa", "babilong/qa2", "loogle/summarization"])
def test_without_a_network_one_sentence_after_one_request(name, asked, capfd):
    with pytest.raises(UsageError) as caught:
        examples(name)
    dataset = TASKS[name].dataset
    assert str(caught.value) == (
        f"The dataset {dataset} cannot be had from the hub (Name or service not known); try later, or pass a folder "
        "with its files with --data-dir."
    )
    assert asked == [f"https://huggingface.co/datasets/{dataset}/resolve/main/README.md"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["longbench/hotpotqa", "babilong/qa2", "loogle/summarization"])
def test_hf_hub_offline_is_respected(name, asked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE keeps it from being downloaded.*--data-dir"):
        examples(name)
    assert asked == []


def test_configuration_and_split_are_asked_of_the_hub(asked, monkeypatch):
    calls = []

    def load(path, config, *, split):
        calls.append((path, config, split, datasets.config.HF_HUB_OFFLINE))
        return [babilong_row(0)]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert len(examples("babilong/qa2", lengths=(2048,))) == 1  # from the cache, since the hub cannot be reached
    reachable(monkeypatch)
    assert len(examples("babilong/qa2", lengths=(2048,))) == 1
    assert calls == [
        ("RMT-team/babilong-100examples", "2k", "qa2", True),
        ("RMT-team/babilong-100examples", "2k", "qa2", False),
    ]
    assert not datasets.config.HF_HUB_OFFLINE


def test_another_name_where_the_hub_does_not_know_the_first(asked, monkeypatch):
    calls = []

    def card(url, **options):
        if "babilong-100examples" in url:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", card)
    monkeypatch.setattr("datasets.load_dataset", lambda path, *_, **__: calls.append(path) or [babilong_row(0)])
    assert len(examples("babilong/qa2")) == 1 and calls == ["RMT-team/babilong"]


def test_what_datasets_has_cached_needs_no_hub(asked, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", loogle_new_rows("longdep_qa"))
    made = tmp_path / "made"
    datasets.load_dataset("json", "longdep_qa", data_files={"test": str(file)}, cache_dir=str(made))
    built = next(path.parent for path in made.rglob("dataset_info.json"))
    cached = tmp_path / "cache" / "bigai-nlco___loo_gle" / "longdep_qa" / "0.0.0" / ("ab" * 20)
    cached.parent.mkdir(parents=True)
    built.rename(cached)
    (cached / "json-test.arrow").rename(cached / "loo_gle-test.arrow")
    info = json.loads((cached / "dataset_info.json").read_text())
    info |= {"dataset_name": "loo_gle", "config_name": "longdep_qa"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert [example.answers for example in examples("loogle/longdep_qa", limit=2)] == [("It's 0.",), ("It's 1.",)]
    assert len(asked) == 1


@pytest.mark.parametrize("online", [False, True])
def test_longbench_is_read_from_its_archive(online, asked, monkeypatch, tmp_path):
    """Its repository has a script, which `datasets` no longer runs, and the rows in a zip file."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("data/lcc.jsonl", json.dumps(longbench_row("lcc", 0)))
    calls = []

    def download(repo, name, *, repo_type, local_files_only):
        calls.append((repo, name, repo_type, local_files_only))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if online:
        reachable(monkeypatch)
    assert [example.name for example in examples("longbench/lcc")] == ["1:0000"]
    assert calls == [("THUDM/LongBench", "data.zip", "dataset", not online)]
    with pytest.raises(UsageError, match=r"data\.zip cannot be read"):  # which holds no such task
        examples("longbench/trec")


@pytest.mark.parametrize(
    ("error", "message"),
    [("GatedRepoError", "is gated: accept its license"), ("RepositoryNotFoundError", "The hub has no dataset")],
)
def test_what_the_hub_refuses(error, message, asked, monkeypatch):
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)

    def refuse(url, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(UsageError, match=f"{message}.*--data-dir"):
        examples("loogle/longdep_qa")


# Cutting documents

PLAIN = tiny_tokenizer()
# Letters of one to four bytes, each of which the tiny tokenizer may split.
MIXED = st.text(st.sampled_from("ab .\nthe keeper éß 你好世界 😀🧪"), max_size=80)


def tokens(text):
    return PLAIN(text, add_special_tokens=False).input_ids


def twin_of_keep_ends(text, kept):
    """The bytes of the tokens that stay, without the bytes of broken characters."""
    byte_of = {letter: byte for byte, letter in _byte_letters()}
    pieces = [bytes(byte_of[letter] for letter in piece) for piece in PLAIN.convert_ids_to_tokens(tokens(text))]
    last = kept // 2
    head, tail = b"".join(pieces[: kept - last]), b"".join(pieces[len(pieces) - last :])
    return text if kept >= len(pieces) else head.decode(errors="ignore") + tail.decode(errors="ignore")


def _byte_letters():
    """GPT-2's visible letter for each byte, found by asking the pre-tokenizer."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    pairs = [(byte, chr(byte)) for byte in visible] + [(byte, chr(256 + n)) for n, byte in enumerate(hidden)]
    assert sorted(ByteLevel.alphabet()) == sorted(letter for _, letter in pairs)
    return pairs


@settings(max_examples=200, deadline=None)
@given(MIXED, st.integers(0, 90))
def test_the_ends_that_are_kept_are_those_of_the_twin(text, kept):
    assert keep_ends(text, TextEncoder(PLAIN), kept) == twin_of_keep_ends(text, kept)


def test_no_character_is_broken():
    text = "😀" * 30
    assert len(tokens(text)) > 60  # each one is several tokens
    for kept in range(20, 60):
        assert set(keep_ends(text, TextEncoder(PLAIN), kept)) == {"😀"}


def example_of(document, before="Read this: ", after="\nWhat is it?", reply="It is"):
    return Example("t/x", "1", "", before, document, after, reply, ("a",), (), "ruler.all", 8, chat=True)


@settings(max_examples=100, deadline=None)
@given(MIXED, MIXED, st.integers(30, 150), st.integers(0, 9))
def test_a_cut_prompt_fits_and_keeps_what_it_can(start, end, room, overhead):
    example = example_of(start + "🧪 middle 🧪" * 9 + end)
    cut = cut_middle(example, TextEncoder(PLAIN), room + overhead, overhead)
    size = len(tokens(cut.text))
    assert size <= room
    assert replace(cut, document=example.document) == example
    if len(tokens(example.text)) <= room:
        assert cut == example
    else:
        assert size >= room - 16  # broken characters, and tokens that join where the halves meet
        shared = len(cut.document)
        halves = [(cut.document[:at], cut.document[at:]) for at in range(shared + 1)]
        assert any(example.document.startswith(head) and example.document.endswith(tail) for head, tail in halves)


def test_a_prompt_that_fits_stays_as_it_is():
    example = example_of("A short document.")
    size = len(tokens(example.text))
    assert cut_middle(example, TextEncoder(PLAIN), size) is example
    assert cut_middle(example, TextEncoder(PLAIN), size + 5, 5) is example
    assert cut_middle(example, TextEncoder(PLAIN), size + 4, 5) != example


def test_as_much_of_the_end_as_of_the_beginning_is_kept():
    words = [f"w{number:03d} " for number in range(200)]
    cut = cut_middle(example_of("".join(words)), TextEncoder(PLAIN), 300)
    left = cut.document.split()
    beginning = [word for word in left if word in {f"w{n:03d}" for n in range(100)}]
    ending = [word for word in left if word in {f"w{n:03d}" for n in range(100, 200)}]
    assert abs(len(beginning) - len(ending)) <= 2
    assert beginning[0] == "w000"
    assert ending[-1] == "w199"


def test_a_document_can_be_left_out_but_a_question_cannot():
    example = example_of("A document of some length.")
    bare = len(tokens(replace(example, document="").text))
    assert cut_middle(example, TextEncoder(PLAIN), bare).document == ""
    with pytest.raises(UsageError, match="example 1 of t/x alone do not fit into"):
        cut_middle(example, TextEncoder(PLAIN), bare - 1)


def test_a_tokenizer_without_offsets_cannot_cut():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return PLAIN(text, **options)

    with pytest.raises(ModelError, match="fast tokenizer"):
        cut_middle(example_of("word " * 99), TextEncoder(Slow()), 60)
