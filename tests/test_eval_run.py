"""Runs of `headprof eval`: interrupted ones that go on, their journal, several processes, mistakes before any work."""

import errno
import json
import os
import re
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
from support.commands import invoke as headprof
from support.forked import SILENT, processes
from support.hub_data import write_hub_data
from support.profiles import random_profile
from support.tiny_models import load_tiny, save_tiny, tiny_tokenizer

from headprof.errors import HeadprofError, InterruptedRun, ModelError, UsageError
from headprof.evaluation import chinese_words, journal
from headprof.evaluation.asker import Asker
from headprof.evaluation.journal import Journal
from headprof.evaluation.request import PRESETS, EvalRequest, find_preset
from headprof.evaluation.run import EvalRun, PerplexityTask, QuestionTask
from headprof.utils.files import append_text
from headprof.utils.resuming import KeptResults
from headprof.utils.team import Team

LENGTH = 300
PROBES = EvalRequest(("niah", "reasoning"), ("full", "snapkv"), ("8",), probes=6, lengths=(LENGTH,))


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


def other_tokenizer():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template += "{# another one #}"
    return tokenizer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The benchmarks' files, and texts for perplexity in `texts`."""
    return write_hub_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"On day {number} the keeper counted boats, nets and gulls. " * 30)
    return folder


@pytest.fixture(scope="module")
def alone(loaded, tmp_path_factory):
    """What an uninterrupted run finds, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return EvalRun(loaded, None, PROBES, output=folder).evaluate(), folder


@dataclass
class Asked:
    """The questions that are asked, by kind of task and number; from number `stop_at` on, Ctrl-C comes first."""

    numbers: list[tuple[str, int]] = field(default_factory=list)
    stop_at: int | None = None

    def watch(self, monkeypatch, kind):
        run = kind.run

        def watched(task, number):
            if len(self.numbers) == self.stop_at:
                raise KeyboardInterrupt
            name = task.questions[number].task if isinstance(task, QuestionTask) else "perplexity"
            self.numbers.append((name, number))
            return run(task, number)

        monkeypatch.setattr(kind, "run", watched)


@pytest.fixture
def asked(monkeypatch):
    asked = Asked()
    for kind in (QuestionTask, PerplexityTask):
        asked.watch(monkeypatch, kind)
    return asked


def interrupted(loaded, request, output, asked, after):
    """A run that is stopped after so many questions; returns what it says."""
    asked.numbers.clear()
    asked.stop_at = after
    with pytest.raises(InterruptedRun) as caught:
        EvalRun(loaded, None, request, output=output).evaluate()
    asked.stop_at = None
    asked.numbers.clear()
    return str(caught.value)


# Interrupted and resumed


@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_run_asks_what_is_missing_and_finds_the_same(after, alone, loaded, asked, tmp_path):
    uninterrupted, folder = alone
    said = interrupted(loaded, PROBES, tmp_path, asked, after)
    assert said == (
        f"Interrupted: the answers to {after} questions are kept in {tmp_path / 'answers.jsonl'}; give the same "
        "command with --resume to go on."
    )
    run = EvalRun(loaded, None, PROBES, output=tmp_path, resume=True)
    assert run.kept.count_on_disk() == after
    found = run.evaluate()
    questions = [(task, number) for task in ("niah", "reasoning") for number in range(3)]
    assert asked.numbers == questions[after:]
    assert found.answers == uninterrupted.answers
    assert found.cells == uninterrupted.cells
    assert found.about["sharing"]["questions"] == 6 - after
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "answers.jsonl").read_text()
    asked.numbers.clear()
    assert EvalRun(loaded, None, PROBES, output=tmp_path, resume=True).evaluate().answers == uninterrupted.answers
    assert asked.numbers == []


def test_an_interrupt_within_a_question_keeps_the_ones_before(alone, loaded, monkeypatch, tmp_path):
    ask, calls = Asker.ask, []

    def third_time_never(self, question, **options):
        calls.append(question)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, question, **options)

    monkeypatch.setattr(Asker, "ask", third_time_never)
    with pytest.raises(InterruptedRun, match="answers to 2 questions are kept"):
        EvalRun(loaded, None, PROBES, output=tmp_path).evaluate()
    assert EvalRun(loaded, None, PROBES, output=tmp_path, resume=True).evaluate().answers == alone[0].answers


def test_an_interrupt_while_progress_is_shown(alone, loaded, tmp_path):
    progress = []

    def stop(task, done, total):
        progress.append((task, done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="answers to 4 questions are kept"):
        EvalRun(loaded, None, PROBES, output=tmp_path, on_progress=stop).evaluate()
    assert progress == [("niah", 0, 6), ("niah", 1, 6), ("niah", 2, 6), ("reasoning", 3, 6), ("reasoning", 4, 6)]
    run = EvalRun(loaded, None, PROBES, output=tmp_path, resume=True, on_progress=lambda *now: progress.append(now))
    assert run.evaluate().answers == alone[0].answers
    assert progress[5:] == [("reasoning", 4, 6), ("reasoning", 5, 6), ("reasoning", 6, 6)]


def test_without_anything_kept_an_interrupt_says_so(loaded, asked, tmp_path):
    for output, after in ((tmp_path, 0), (None, 2)):
        assert interrupted(loaded, PROBES, output, asked, after) == "Interrupted before anything was kept."


def test_without_resume_a_run_starts_anew(alone, loaded, asked, tmp_path):
    interrupted(loaded, PROBES, tmp_path, asked, 2)
    assert EvalRun(loaded, None, PROBES, output=tmp_path).evaluate().answers == alone[0].answers
    assert len(asked.numbers) == 6


def test_more_probes_and_tasks_are_asked_in_addition(alone, loaded, asked, tmp_path):
    """Number `i` of a task is the same question however many are asked."""
    few = replace(PROBES, tasks=("niah",), probes=2)
    EvalRun(loaded, None, few, output=tmp_path).evaluate()
    for request, new in (
        (replace(PROBES, limit=1), [("reasoning", 0)]),
        (replace(PROBES, limit=2), [("reasoning", 1)]),
        (PROBES, [("niah", 2), ("reasoning", 2)]),
    ):
        asked.numbers.clear()
        found = EvalRun(loaded, None, request, output=tmp_path, resume=True).evaluate()
        assert asked.numbers == new
    assert found.answers == alone[0].answers
    fewer = EvalRun(loaded, None, few, output=tmp_path, resume=True).evaluate()
    assert fewer.answers == [each for each in found.answers if each.task == "niah" and each.question in "01"]


@pytest.mark.parametrize(
    ("task", "lengths"),
    [
        ("loogle/shortdep_cloze", None),
        ("babilong/qa1", (0, 1024)),
        ("ruler/frequent_words", (600, 700)),
    ],
)
def test_a_raised_limit_asks_the_new_questions_alone(task, lengths, loaded, data_dir, asked, tmp_path):
    request = EvalRequest((task,), ("full",), ("8",), lengths=lengths, data_dir=data_dir)
    whole = EvalRun(loaded, None, replace(request, limit=2)).evaluate()
    EvalRun(loaded, None, replace(request, limit=1), output=tmp_path).evaluate()
    asked.numbers.clear()
    found = EvalRun(loaded, None, replace(request, limit=2), output=tmp_path, resume=True).evaluate()
    assert len(asked.numbers) == len(lengths or (1024,))
    assert found.answers == whole.answers


def test_perplexity_beside_other_tasks(loaded, texts, asked, tmp_path):
    request = replace(PROBES, tasks=("niah", "perplexity"), probes=2, data_dir=texts, continuation=40, documents=3)
    whole = EvalRun(loaded, None, request).evaluate()
    assert [(loss.document, loss.method) for loss in whole.losses] == [
        (number, method) for number in range(3) for method in ("full", "snapkv")
    ]
    assert [loss.name for loss in whole.losses[::2]] == ["0.txt", "1.txt", "2.txt"]
    assert {cell.task for cell in whole.cells} == {"niah"} and len(whole.perplexities) == 2
    assert "the answers to 3 questions are kept" in interrupted(loaded, request, tmp_path, asked, 3)
    found = EvalRun(loaded, None, request, output=tmp_path, resume=True).evaluate()
    assert asked.numbers == [("perplexity", 1), ("perplexity", 2)]
    assert (found.answers, found.losses) == (whole.answers, whole.losses)
    assert (found.cells, found.perplexities) == (whole.cells, whole.perplexities)


# The journal


@pytest.mark.parametrize("cut", [1, 40])
def test_a_half_written_line_is_asked_again(cut, alone, loaded, asked, tmp_path):
    text = (alone[1] / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text(text[:-cut])
    assert EvalRun(loaded, None, PROBES, output=tmp_path, resume=True).evaluate().answers == alone[0].answers
    assert asked.numbers == [("reasoning", 2)]
    assert (tmp_path / "answers.jsonl").read_text() == text


def test_answers_of_before_are_kept_once_more(tmp_path):
    file = tmp_path / "answers.jsonl"
    for seed in (1, 2, 3):
        KeptResults({"seed": seed}, Journal(file)).start(False, Team())
    assert json.loads(file.read_text())["run"] == {"seed": 3}
    assert json.loads((tmp_path / "answers.previous.jsonl").read_text())["run"] == {"seed": 2}


def test_a_line_that_ends_within_a_letter_is_left_out(loaded, alone, tmp_path):
    answer = replace(alone[0].answers[0], text="码头\u2028\r\n\x85 \ufffd 🧪")
    file = tmp_path / "answers.jsonl"
    kept = KeptResults({"seed": 1}, Journal(file))
    kept.start(False, Team())
    kept.add({("niah", 0): [answer]})
    kept.add({("niah", 1): [answer]})
    whole = file.read_bytes()
    for end in range(len(whole) - len(whole.splitlines()[-1]), len(whole)):
        file.write_bytes(whole[:end])
        read = KeptResults({"seed": 1}, Journal(file))
        read.load()
        assert read.results == {("niah", 0): [answer]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("budgets", {"budgets": ("9",)}),
        ("seed", {"seed": 7}),
        ("methods", {"methods": ("full", "knorm")}),
        ("lengths", {"lengths": (LENGTH, 400)}),
        ("question known", {"question_known": False}),
        ("options", {"options": {"pooling": "mean"}}),
        ("decoding", {"decoding": {"buffer": 9}}),
        ("dtype", {}),
        ("weights", {}),
        ("tokenizer", {}),
        ("model", {}),
        ("fingerprint", {}),
    ],
)
def test_another_runs_answers_are_refused(name, change, alone, loaded, asked):
    model = {
        "dtype": lambda: load_tiny(dtype=torch.bfloat16),
        "weights": lambda: load_tiny(seed=1),
        "tokenizer": lambda: replace(loaded, tokenizer=other_tokenizer()),
        "model": lambda: replace(loaded, name="other"),
        "fingerprint": lambda: load_tiny(layers=1),
    }.get(name, lambda: loaded)()
    before = (alone[1] / "answers.jsonl").read_bytes()
    run = EvalRun(model, None, replace(PROBES, **change), output=alone[1], resume=True)
    with pytest.raises(UsageError) as caught:
        run.evaluate()
    assert str(caught.value) == (
        f"The answers in {alone[1] / 'answers.jsonl'} are of another model or other settings ({name}): give the same "
        "options again, choose another folder with -o, or run without --resume to start anew."
    )
    assert run.kept.count_on_disk() == 0
    assert asked.numbers == []
    assert (alone[1] / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("task", ["longbench/narrativeqa", "perplexity"])
def test_answers_to_other_data_are_refused(task, loaded, asked, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = [{"context": f"On day {day} it rained. " * 30, "input": "When?", "answers": [f"day {day}"]} for day in "123"]
    file = data / "narrativeqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = EvalRequest(
        (task,), ("full",), ("8",), lengths=(60,), continuation=20, data_dir=data, documents=2, limit=2
    )
    EvalRun(loaded, None, request, output=output).evaluate()
    before = (output / "answers.jsonl").read_bytes()
    rows[2]["context"] += "And after."  # of which nothing was asked
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked.numbers.clear()
    found = EvalRun(loaded, None, request, output=output, resume=True).evaluate()
    assert asked.numbers == [] and (output / "answers.jsonl").read_bytes() == before
    rows[1]["context"] = rows[1]["context"].replace("rained", "snowed")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=f"The data of {task} is not that of the answers in .* run without --resume"):
        EvalRun(loaded, None, request, output=output, resume=True).evaluate()
    assert (output / "answers.jsonl").read_bytes() == before
    assert EvalRun(loaded, None, request, output=output).evaluate() != found


def test_answers_that_name_no_data_are_of_another_run_not_damaged(loaded, data_dir, tmp_path):
    request = EvalRequest(("longbench/hotpotqa",), ("full",), ("8",), data_dir=data_dir, limit=1)
    EvalRun(loaded, None, request, output=tmp_path).evaluate()
    head, line = (tmp_path / "answers.jsonl").read_text().splitlines()
    row = {name: value for name, value in json.loads(line).items() if name != "data"}
    (tmp_path / "answers.jsonl").write_text(f"{head}\n{json.dumps(row)}\n")
    with pytest.raises(UsageError, match="The data of longbench/hotpotqa is not that of the answers"):
        EvalRun(loaded, None, request, output=tmp_path, resume=True).evaluate()


def test_what_was_asked_of_other_tasks_keeps_its_data(loaded, data_dir, tmp_path):
    both = EvalRequest(("longbench/hotpotqa", "niah"), ("full",), ("8",), probes=1, data_dir=data_dir, limit=1)
    EvalRun(loaded, None, both, output=tmp_path).evaluate()
    before = (tmp_path / "answers.jsonl").read_bytes()
    EvalRun(loaded, None, replace(both, tasks=("niah",)), output=tmp_path, resume=True).evaluate()
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_answers_under_another_profile_are_refused(loaded, tmp_path):
    request = replace(PROBES, tasks=("niah",), methods=("headkv",), probes=1)
    EvalRun(loaded, random_profile(loaded.model), request, output=tmp_path).evaluate()
    with pytest.raises(UsageError, match=r"other settings \(profile\)"):
        EvalRun(loaded, random_profile(loaded.model, seed=1), request, output=tmp_path, resume=True).evaluate()


def spoiled(lines, how):
    row = json.loads(lines[2])
    return {
        "a line that is no JSON": [*lines[:2], "{oops\n", *lines[3:]],
        "a line without results": [*lines, '{"task": "niah", "number": 9}\n'],
        "a field that is missing": [*lines, json.dumps(row | {"answers": [{"task": "niah"}]}) + "\n"],
        "a line that is no object": [*lines, "[1, 2]\n"],
        "no first line": lines[1:],
        "nothing": [],
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "a line that is no JSON",
        "a line without results",
        "a field that is missing",
        "a line that is no object",
        "no first line",
        "nothing",
    ],
)
def test_a_damaged_journal_is_refused(how, alone, loaded, asked, tmp_path):
    lines = (alone[1] / "answers.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(spoiled(lines, how)))
    before = path.read_bytes()
    run = EvalRun(loaded, None, PROBES, output=tmp_path, resume=True)
    with pytest.raises(UsageError) as caught:
        run.evaluate()
    assert str(caught.value) == f"The answers in {path} are damaged: delete that file, or run without --resume."
    assert run.kept.count_on_disk() == 0
    assert path.read_bytes() == before and asked.numbers == []


def test_a_full_disk_ends_in_a_sentence_and_what_is_kept_goes_on(alone, loaded, asked, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_written(path, text):
        if len(asked.numbers) == 3:
            monkeypatch.setattr(os, "fsync", full)
            text = text[: len(text) // 2]
        append_text(path, text)

    path = tmp_path / "answers.jsonl"
    with monkeypatch.context():
        monkeypatch.setattr(journal, "append_text", half_written)
        with pytest.raises(HeadprofError, match=f"no space left .* {re.escape(str(path))}"):
            EvalRun(loaded, None, PROBES, output=tmp_path).evaluate()
    monkeypatch.undo()
    assert not path.read_text().endswith("\n")
    run = EvalRun(loaded, None, PROBES, output=tmp_path, resume=True)
    assert run.kept.count_on_disk() == 2
    assert run.evaluate().answers == alone[0].answers


# Mistakes, before any question is asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("chess",)}, r"There is no task 'chess': .*"),
        ({"tasks": ("babilong/qa99",)}, r"There is no task 'qa99' in babilong: choose among qa1, qa2, .*\."),
        ({"tasks": ("perplexity",)}, r"Perplexity needs texts: .* with --data-dir\."),
        ({"tasks": ("babilong",), "families": ("city",)}, r"Families are those of .*nonliteral and multi: .*"),
        ({"methods": ("magic",)}, r"There is no method 'magic': .*"),
        ({"budgets": ("8", "lots")}, r"A budget of 'lots' cannot be read: .*"),
    ],
)
def test_a_request_that_cannot_be_served(change, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        replace(PROBES, **change).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (200, 300)}, "one length"),
        ({"continuation": LENGTH}, "leave none to compress"),
        ({"documents": 9}, "Only 3 texts"),
        ({"lengths": (2000,)}, "No text has the 2000 tokens"),
        ({"data_dir": None}, "needs texts"),
    ],
)
def test_perplexity_that_cannot_be_had(change, message, loaded, texts, tmp_path):
    request = replace(PROBES, tasks=("perplexity",), data_dir=texts, continuation=40)
    with pytest.raises(UsageError, match=message):
        replaced = replace(request, **change)
        replaced.check()
        EvalRun(loaded, None, replaced, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["niah", "ruler/frequent_words", "loogle/shortdep_qa", "perplexity"])
@pytest.mark.parametrize("budget", ["1", "100B"])
def test_a_budget_below_what_heads_keep(task, budget, loaded, texts, data_dir, asked, tmp_path):
    folder = texts if task == "perplexity" else data_dir
    request = replace(PROBES, tasks=(task,), budgets=("8", budget), data_dir=folder, continuation=40, documents=2)
    request = replace(request, lengths=(500,), limit=1)
    request.check()
    with pytest.raises(UsageError, match=r"[Bb]udget"):
        EvalRun(loaded, None, request, output=tmp_path / "out")
    assert asked.numbers == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [0, 3])
def test_a_share_of_the_shortest_prompt_is_checked_before_any_work(row, loaded, tmp_path, asked):
    rows = [{"context": "A long text. " * 60, "input": "Who?", "answers": ["x"], "length": 4} for _ in range(4)]
    rows[row]["context"] = "Short."
    folder = tmp_path / "longbench"
    folder.mkdir()
    (folder / "narrativeqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = replace(PROBES, tasks=("longbench/narrativeqa",), lengths=None, budgets=("1%",), data_dir=tmp_path)
    with pytest.raises(
        UsageError, match=r"^The shortest text of longbench/narrativeqa to be compressed has \d+ tokens: A "
    ):
        EvalRun(loaded, None, request, output=tmp_path / "out")
    assert asked.numbers == [] and not (tmp_path / "out").exists()
    EvalRun(loaded, None, replace(request, budgets=("90%",)))


def test_a_share_counts_what_is_compressed_without_the_question(loaded):
    request = replace(PROBES, budgets=("1%",), question_known=False)  # 3 of the 300 tokens of the whole prompts
    with pytest.raises(
        UsageError, match=r"^The shortest text of niah to be compressed has 2\d\d tokens: A budget of 2 "
    ):
        EvalRun(loaded, None, request)
    EvalRun(loaded, None, replace(request, question_known=True))


def test_equal_budgets_are_run_once(loaded):
    run = EvalRun(loaded, None, replace(PROBES, budgets=("8", "08", "16", "8")))
    assert [candidate.budget for candidate in run.asker.candidates] == ["", "8", "16"]


@pytest.mark.parametrize("row", [0, 2])
def test_a_question_that_does_not_fit_is_found_before_any_work(row, loaded, asked, tmp_path):
    rows = [{"context": "A long text. " * 60, "input": "Who?", "answers": ["x"]} for _ in range(3)]
    rows[row]["input"] = "Who, then, was it? " * 200
    (tmp_path / "narrativeqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = EvalRequest(("longbench/narrativeqa",), ("full",), ("8",), data_dir=tmp_path, max_prompt=600)
    with pytest.raises(UsageError, match=f"the question of example {row + 1} .* do not fit into 600"):
        EvalRun(loaded, None, request)
    assert asked.numbers == []


def test_a_package_that_is_missing_is_missed_before_any_work(loaded, data_dir, asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr(chinese_words, "_tokenizer", chinese_words._tokenizer.__wrapped__)
    request = EvalRequest(("longbench/narrativeqa", "longbench/vcsum"), ("full",), ("8",), data_dir=data_dir, limit=1)
    with pytest.raises(UsageError, match=r"pip install headprof\[eval\]"):
        EvalRun(loaded, None, request)
    assert asked.numbers == []


@pytest.mark.parametrize("task", ["niah", "perplexity"])
def test_a_model_that_overflows_is_said_to(task, texts, tmp_path):
    loaded = load_tiny(dtype=torch.float16)
    loaded.model.lm_head.weight.data *= 1e5
    request = replace(PROBES, tasks=(task,), data_dir=texts, continuation=40, documents=2)
    with pytest.raises(ModelError, match=r"overflow in float16, so .* pass --dtype float32"):
        EvalRun(loaded, None, request, output=tmp_path).evaluate()


@pytest.mark.parametrize(
    ("answers", "known"), [(["", "x"], True), ([""], False), ([" "], False)], ids=["one blank", "blank", "space"]
)
def test_a_blank_right_answer(answers, known, loaded, tmp_path):
    row = {"context": "A long text. " * 30, "input": "Who?", "answers": answers}
    (tmp_path / "narrativeqa.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    request = EvalRequest(("longbench/narrativeqa",), ("full", "snapkv"), ("8",), data_dir=tmp_path)
    found = EvalRun(loaded, None, request).evaluate()
    assert [answer.divergence is not None for answer in found.answers] == 4 * [known]
    assert [cell.divergence_interval is not None for cell in found.cells] == 2 * [known]


def test_presets():
    assert find_preset("quick") is PRESETS["quick"]
    with pytest.raises(UsageError, match="no preset 'slow': choose one of quick, standard, thorough"):
        find_preset("slow")
    for preset in PRESETS.values():
        assert preset.methods == (
            *("full", "snapkv", "headkv", "headkv-r2", "ems", "headkv-ems"),
            *("tova", "pyramidkv", "adakv", "h2o", "streamingllm", "knorm"),
        )  # a method more in the table is none more here: the answers of every run name their methods
        assert EvalRequest(preset.tasks, preset.methods, preset.budgets, lengths=preset.lengths).check()


# The command

COMMAND = ["eval", "--model", "tiny", "--device", "cpu", "--methods", "snapkv", "--budgets", "8", "--lengths", "300"]
TWO_TASKS = [*COMMAND, "--tasks", "niah,reasoning", "--probes", "6"]
ONE_PROBE = [*COMMAND, "--tasks", "niah", "--probes", "1"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny", chat=True)
    return folder


@pytest.fixture
def place(model_folder, monkeypatch):
    """The folder that commands run in, one thread each; they draw nothing, which would take seconds."""
    monkeypatch.setattr("headprof.plots.results_folder.drawings", lambda found: {})  # which would take seconds
    monkeypatch.setattr("headprof.plots.results_folder.write_report", lambda found, path: path)
    monkeypatch.chdir(model_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model_folder
    torch.set_num_threads(threads)


def said(ended):
    return " ".join(ended.stderr.split())


def methods_in(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return [[(answer["method"], answer["divergence"]) for answer in row["answers"]] for row in rows]


def test_the_full_cache_is_compared_with_unless_it_is_left_out(place):
    for more in (["--without-full"], ["--without-full", "--methods", "full,snapkv"]):
        ended = headprof(*ONE_PROBE, *more, "-o", "without")
        assert ended.exit_code == 0, ended.output
        assert methods_in(place / "without" / "answers.jsonl") == [[("snapkv", None)]]
    ended = headprof(*ONE_PROBE, "-o", "with")
    assert ended.exit_code == 0, ended.output
    ((full, snapkv),) = methods_in(place / "with" / "answers.jsonl")
    assert full == ("full", 0) and snapkv[0] == "snapkv" and snapkv[1] > 0


def test_ctrl_c_and_resume_on_the_command_line(place, asked):
    asked.stop_at = 2
    ended = headprof(*TWO_TASKS, "-o", "stopped")
    assert ended.exit_code == 130
    assert said(ended).startswith("Error: Interrupted: the answers to 2 questions are kept in stopped/answers.jsonl;")
    assert [file.name for file in (place / "stopped").iterdir()] == ["answers.jsonl"]
    asked.stop_at = None
    for asked_in_all in (6, 6):
        ended = headprof(*TWO_TASKS, "-o", "stopped", "--resume")
        assert ended.exit_code == 0, ended.output
        assert len(asked.numbers) == asked_in_all
    assert "Nothing was left to ask." in said(ended)
    ended = headprof(*TWO_TASKS, "-o", "stopped", "--probes", "2")
    assert "with --resume, 6 questions would be taken from stopped" in said(ended)


def test_a_budget_below_what_heads_keep_is_one_sentence(place):
    ended = headprof(*ONE_PROBE, "--budgets", "1", "-o", "small")
    assert ended.exit_code == 2 and said(ended).startswith("Error: A budget of 1 tokens is below the ")
    assert not (place / "small").exists()


def test_a_file_in_place_of_the_folder_for_results(place):
    (place / "file").write_text("x")
    ended = headprof(*ONE_PROBE, "-o", "file")
    assert ended.exit_code == 1 and "one of its folders is a file" in said(ended)


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_name_that_is_too_long(place, resume):
    ended = headprof(*ONE_PROBE, *resume, "-o", "a" * 300)
    assert ended.exit_code == 1 and re.search(r"is too long for this disk: choose .* with -o\.", said(ended))


def test_a_name_that_is_no_text(place):
    name = os.fsdecode(b"odd-\xff")
    assert headprof(*ONE_PROBE, "-o", name).exit_code == 2 and not (place / name).exists()
    assert headprof(*ONE_PROBE, "--observe", name, "-o", "odd").exit_code == 2


def test_several_lengths_where_one_is_wanted(place):
    ended = headprof(*ONE_PROBE, "--max-prompt", "1k,2k", "-o", "nothing")
    assert ended.exit_code == 2 and "'1k,2k' are several lengths where one is wanted" in said(ended)


def test_leaving_out_the_only_method_is_refused(place):
    ended = headprof(*ONE_PROBE, "--methods", "full", "--without-full", "-o", "nothing")
    assert ended.exit_code == 2 and said(ended).startswith("Error: ")
    assert not (place / "nothing").exists()


# Several processes


def test_two_processes_find_what_one_finds(place):
    results = ("answers.csv", "cells.csv")
    assert headprof(*TWO_TASKS, "-o", "one").exit_code == 0
    first, second = processes(2, *TWO_TASKS, "-o", "two")
    assert first.exit_code == 0 and first.stdout.count("snapkv") and second == SILENT
    # Two more probes, each by whoever is free, and of those kept not one again.
    assert headprof(*TWO_TASKS, "--probes", "4", "-o", "more").exit_code == 0
    first, second = processes(2, *TWO_TASKS, "--resume", "-o", "more")
    assert first.exit_code == 0 and "2 prompts were read" in first.stderr and second == SILENT
    for folder in ("two", "more"):
        for name in results:
            assert (place / folder / name).read_text() == (place / "one" / name).read_text()


def test_two_processes_stop_at_the_same_mistake(place):
    assert headprof(*ONE_PROBE, "-o", "kept").exit_code == 0
    for ended in processes(2, *ONE_PROBE, "--seed", "7", "--resume", "-o", "kept"):
        assert (ended.exit_code, ended.stdout) == (2, "") and "other settings (seed)" in ended.stderr
