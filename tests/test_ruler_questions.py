"""RULER's question answering: the passages and questions of files as they were published, checked by reading them."""

import random
import re

import pytest
from support.commands import invoke
from support.question_files import CONTEXTS, ROWS, hotpotqa, squad, write_question_files
from support.tiny_models import tiny_tokenizer

from headprof.errors import UsageError
from headprof.evaluation.tasks import BENCHMARKS, TASKS, TaskRequest, expand
from headprof.evaluation.tasks.ruler import prompt_tokens
from headprof.evaluation.tasks.ruler_questions import QUESTION_SETS, parse_hotpotqa, parse_squad

NAMES = list(QUESTION_SETS)
TOKENIZERS = {"plain": tiny_tokenizer(), "chat": tiny_tokenizer(chat=True)}
FILES = {"qa_1": "dev-v2.0.json", "qa_2": "hotpot_dev_distractor_v1.json"}
PASSAGE = re.compile(r"Passage (\d+):\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_question_files(tmp_path_factory.mktemp("questions"))


def examples(name, folder, *, limit=4, lengths=(1500,), tokenizer="chat", seed=0):
    request = TaskRequest(folder, limit, lengths, TOKENIZERS[tokenizer], seed)
    return list(TASKS[f"ruler/{name}"].examples(request))


def passages(example):
    """The document's passages, once their numbers have been checked."""
    _, *parts = PASSAGE.split(example.document)
    assert parts[::2] == [str(number) for number in range(1, len(parts) // 2 + 1)]
    return [part.removesuffix("\n\n") for part in parts[1::2]]


def published(name):
    """Questions in order by the slow way: `[(question, answers, needed passages, near passages)]`, and all passages."""
    found, everything = [], []
    if name == "qa_1":
        for article in squad()["data"]:
            contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
            everything += contexts
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    if not asked["is_impossible"]:
                        answers = [answer["text"] for answer in asked["answers"]]
                        near = [context for context in contexts if context != paragraph["context"]]
                        found.append((asked["question"], answers, [paragraph["context"]], near))
    else:
        for row in hotpotqa():
            texts = {title: title + "\n" + "".join(sentences) for title, sentences in row["context"]}
            everything += texts.values()
            needed = {title for title, _ in row["supporting_facts"]}
            near = [text for title, text in texts.items() if title not in needed]
            found.append((row["question"], [row["answer"]], [texts[title] for title in needed], near))
    return found, everything


@pytest.mark.parametrize("name", NAMES)
def test_the_questions_of_the_file_are_asked_in_its_order(name, folder):
    slow, everything = published(name)
    for example, (question, answers, needed, near) in zip(examples(name, folder, limit=8), slow, strict=False):
        assert example.after.endswith(f"Question: {question}")
        assert question not in example.before + example.document
        assert set(example.answers) == set(answers)
        assert len(set(example.answers)) == len(example.answers)
        shown = passages(example)
        assert set(needed) <= set(shown)
        assert any(answer in passage for passage in needed for answer in answers)
        whole = [passage for passage in shown if passage in everything]
        assert len(whole) >= len(shown) - 1 > len(needed)  # one may be cut short
        cut = [passage for passage in shown if passage not in everything]
        assert all(any(" ".join(each.split()).startswith(passage) for each in everything) for passage in cut)
        assert len(set(shown)) == len(shown)
        others = [passage for passage in shown if passage not in needed]
        assert len(others) <= len(near) or set(near) <= set(shown)  # those of the same article or row come first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_prompts_take_the_length_or_up_to_2_percent_less(name, tokenizer, folder):
    for length in (1024, 1500, 3000):
        for example in examples(name, folder, lengths=(length,), tokenizer=tokenizer):
            parts = (example.before, example.document, example.after, example.reply)
            assert 0.98 * length <= prompt_tokens(*parts, TOKENIZERS[tokenizer]) + 32 <= length
            assert example.max_new_tokens == 32 and example.metric == "ruler.any"


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_the_seed_and_their_number_alone(name, folder):
    few, many = examples(name, folder, limit=2), examples(name, folder, limit=4)
    assert many[:2] == few == examples(name, folder, limit=2, lengths=(2048, 1500))[2:]
    other = examples(name, folder, seed=1)
    assert [example.after for example in other] == [example.after for example in many]
    assert all(one.document != another.document for one, another in zip(many, other, strict=True))


def test_passages_are_spread_over_the_document(folder):
    places = [passages(example) for example in examples("qa_1", folder, limit=30)]
    needed = [entry[2][0] for entry in published("qa_1")[0]]
    depths = [shown.index(passage) / (len(shown) - 1) for shown, passage in zip(places, needed, strict=False)]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_any_answer_is_enough(folder):
    example = examples("qa_1", folder, limit=1)[0]
    assert example.score(f"It is {example.answers[0].upper()}.") == 1
    assert example.score("Nobody.") == 0


def test_no_more_examples_than_questions(folder):
    assert len(examples("qa_2", folder, limit=100)) == ROWS


def test_both_versions_of_squad():
    old, new = parse_squad(squad(version=1)), parse_squad(squad(version=2))
    assert old == new


def test_questions_know_what_stands_beside_them():
    found = parse_hotpotqa(hotpotqa())
    for asked in found.questions:
        assert len(asked.passages) == 2 and len(asked.near) == CONTEXTS - 2
        assert not set(asked.passages) & set(asked.near)
    grown = found.puzzle(0, random.Random(0))
    assert grown.document(grown.most) == grown.document(grown.most + 1)
    assert grown.document(grown.most) != grown.document(grown.most - 1)


def test_a_set_that_is_too_small_for_a_length(folder):
    with pytest.raises(UsageError, match="ruler/qa_2 have too few passages for prompts of 60000 tokens"):
        examples("qa_2", folder, lengths=(60000,), limit=1)


def test_a_length_that_is_too_short(folder):
    with pytest.raises(UsageError, match=r"length of 100 tokens is too short for ruler/qa_1: use at least \d+"):
        examples("qa_1", folder, lengths=(100,), limit=1)


BROKEN = [
    ("qa_1", "{", "cannot be read as JSON"),
    ("qa_1", "[]", r"not in the form in which SQuAD was published \(the file has no 'data'\)"),
    ("qa_1", '{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\]\.paragraphs has no 'context'"),
    ("qa_1", '{"data": [{"paragraphs": [{"context": "A.", "qas": [{"answers": []}]}]}]}', "has no 'question'"),
    ("qa_1", '{"data": []}', "it has no question with an answer"),
    ("qa_2", "x" * 9, "cannot be read as JSON"),
    ("qa_2", '{"data": []}', r"not in the form in which HotpotQA was published \(the file is no list\)"),
    ("qa_2", '[{"question": "Who?"}]', "row 0 has no 'answer'"),
    (
        "qa_2",
        '[{"question": "Who?", "answer": "A", "supporting_facts": [["T", 0]], "context": [["U", ["x"]]]}]',
        "row 0 has no answer, or none of its supporting facts",
    ),
    (
        "qa_2",
        '[{"question": "Who?", "answer": "A", "supporting_facts": [["T", 0]], "context": [["T", "x"]]}]',
        "row 0 has a context that is not",
    ),
    ("qa_2", "[]", "it has no question with an answer"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_files_in_another_form(name, content, message, tmp_path):
    (tmp_path / FILES[name]).write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        examples(name, tmp_path)
    assert str(caught.value).endswith(f"download it again from {QUESTION_SETS[name].url}.")


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / FILES["qa_1"]).write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="UTF-8"):
        examples("qa_1", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_data_one_sentence_and_nothing_is_left(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "eval",
        "--model",
        str(tiny_folder),
        "--tasks",
        f"ruler/{name}",
        "--budgets",
        "16",
        "--methods",
        "snapkv",
    ]
    for more in ([], ["--data-dir", str(tmp_path)]):
        ended = invoke(*command, "--methods", "snapkv", "--limit", "1", *more, "-o", "results")
        assert (ended.exit_code, ended.stdout) == (2, "")
        sentence = " ".join(ended.stderr.split())
        assert FILES[name] in sentence and QUESTION_SETS[name].url in sentence
        assert sentence.endswith("or ask for ruler-generated, the eleven tasks that need no data.")
        assert not list(tmp_path.iterdir())


def test_the_thirteen_tasks():
    niah = [*(f"niah_single_{n}" for n in (1, 2, 3)), *(f"niah_multikey_{n}" for n in (1, 2, 3))]
    names = [*niah, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert expand(["ruler"]) == list(BENCHMARKS["ruler"]) == [f"ruler/{name}" for name in names]
    assert expand(["ruler-generated"]) == [f"ruler/{name}" for name in names[:11]]


def test_a_subfolder_may_hold_the_files(tmp_path):
    write_question_files(tmp_path / "ruler")
    (tmp_path / "ruler" / "dev-v2.0.json").rename(tmp_path / "ruler" / "squad.json")
    question, answers, *_ = published("qa_1")[0][0]
    example = examples("qa_1", tmp_path)[0]
    assert example.after.endswith(question) and set(example.answers) == set(answers)
