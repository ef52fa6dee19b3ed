"""The task `multi`: many questions about one document, all asked of one compressed cache."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from support.commands import headprof
from support.tiny_models import load_tiny, save_tiny
from test_evaluation import candidates_for

from headprof.errors import InterruptedRun, UsageError
from headprof.evaluation.asker import Asker
from headprof.evaluation.multi import FEWEST, MOST, FirstQuestions, MultiDocuments
from headprof.evaluation.questions import ProbeQuestions
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.results import ALL_RIGHT, Answer, tabulate
from headprof.evaluation.run import EvalRun, MultiTask
from headprof.probes.families import load_families

LENGTH = 1400
MULTI = EvalRequest(("multi",), ("full", "snapkv", "kvzip"), ("24",), 11, (LENGTH,), question_known=False)


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture(scope="module")
def alone(loaded, tmp_path_factory):
    """What an uninterrupted run finds, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return EvalRun(loaded, None, MULTI, output=folder).evaluate(), folder


def test_documents_have_questions_of_both_kinds_about_one_text(loaded):
    documents = MultiDocuments(loaded, 25, (LENGTH, 2 * LENGTH), None, 1000)
    kinds = {family.name: family.kind for family in load_families()}
    sizes = [len(document) for document in documents]
    assert sum(sizes) >= 25 > sum(sizes[:-1]) and all(FEWEST <= size <= MOST for size in sizes)
    assert [document[0].group for document in documents][:2] == ["1400", "2800"]
    for number, document in enumerate(documents):
        assert len({question.document_ids for question in document}) == 1
        assert len({question.asked_ids for question in document}) == len(document)
        counts = Counter(kinds[question.family] for question in document)
        assert abs(counts["retrieval"] - counts["reasoning"]) <= 1
        assert [question.name for question in document] == [f"{number}.{own}" for own in range(len(document))]
        length = len(document[0].document_ids) + max(
            len(each.asked_ids + each.reply_ids + each.reference_ids) for each in document
        )
        assert 0.9 * (1 + number % 2) * LENGTH < length <= (1 + number % 2) * LENGTH
    more = MultiDocuments(loaded, 60, (LENGTH, 2 * LENGTH), None, 1000)
    assert [*more][: len(documents)] == [*documents] and [*FirstQuestions(more)] == [each[0] for each in more]
    with pytest.raises(IndexError):
        documents[len(documents)]


def test_short_documents_have_fewer_questions_and_too_short_ones_are_refused(loaded):
    assert len(MultiDocuments(loaded, 1, (1100,), None, 0)[0]) < len(MultiDocuments(loaded, 1, (2400,), None, 0)[0])
    with pytest.raises(UsageError, match=f"too short for {FEWEST} needles"):
        MultiDocuments(loaded, 1, (400,), None, 0)


def test_answers_are_those_of_each_question_of_a_prefill_of_its_own(loaded):
    """The twin reads and compresses the document again for each question."""
    document = MultiDocuments(loaded, 1, (LENGTH,), None, 7)[0]
    candidates = candidates_for(loaded, ("full", ""), ("snapkv", "24"), ("h2o", "24"), ("h2o", "48"))
    together = Asker(loaded, candidates, question_known=False).ask(*document)
    twin = Asker(loaded, candidates, question_known=False)
    apart = [answer for question in document for answer in twin.ask(question)]
    assert [replace(each, divergence=None) for each in together] == [replace(each, divergence=None) for each in apart]
    assert [each.divergence for each in together] == pytest.approx([each.divergence for each in apart], abs=1e-6)
    asker = Asker(loaded, candidates, question_known=False)
    asker.ask(*document)
    assert (asker.sharing.questions, twin.sharing.questions) == (1, len(document))
    with pytest.raises(ValueError, match="for one question"):
        Asker(loaded, candidates).ask(*document)


def made(document, number, score, method="snapkv", budget="24", task="multi"):
    return Answer(task, f"{document}.{number}", "1k", method, budget, score, 0.5, 1.0, "", 100, 200, 0.5, "any")


def test_a_document_is_right_if_all_its_questions_are():
    scores = {0: (1.0, 1.0), 1: (1.0, 0.0), 2: (0.0, 0.0)}
    answers = [made(document, n, score) for document, own in scores.items() for n, score in enumerate(own)]
    answers += [made(document, n, 1.0, "full", "") for document in scores for n in range(2)]
    cells = {(cell.task, cell.method): cell for cell in tabulate(answers)}
    assert len(cells) == 4
    part, whole = cells["multi", "snapkv"], cells[ALL_RIGHT, "snapkv"]
    assert (part.score, part.questions, part.divergence) == (0.5, 6, 0.5)
    assert (whole.score, whole.questions, whole.divergence) == (pytest.approx(1 / 3), 3, None)
    assert cells[ALL_RIGHT, "full"].score == 1.0
    assert [cell.task for cell in tabulate([made(0, 0, 1.0, task="niah")])] == ["niah"]


def test_a_run_is_the_same_after_an_interruption(alone, loaded, monkeypatch, tmp_path):
    found, folder = alone
    run, numbers = MultiTask.run, []

    def watched(task, number):
        if numbers == [0]:
            raise KeyboardInterrupt
        numbers.append(number)
        return run(task, number)

    monkeypatch.setattr(MultiTask, "run", watched)
    with pytest.raises(InterruptedRun):
        EvalRun(loaded, None, MULTI, output=tmp_path).evaluate()
    numbers.clear()
    monkeypatch.setattr(MultiTask, "run", lambda task, number: (numbers.append(number), run(task, number))[1])
    resumed = EvalRun(loaded, None, MULTI, output=tmp_path, resume=True).evaluate()
    assert numbers == [1] and resumed.answers == found.answers and resumed.cells == found.cells
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "answers.jsonl").read_text()
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()[1:]]
    assert [(row["task"], row["number"]) for row in rows] == [("multi", 0), ("multi", 1)]
    assert found.about["questions"] == {"multi": 2}
    more = EvalRun(loaded, None, replace(MULTI, probes=21), output=tmp_path, resume=True)
    numbers.clear()
    assert len(more.evaluate().answers) > len(found.answers) and 0 not in numbers


def test_answers_of_other_candidates_are_not_taken(alone, loaded, tmp_path):
    _, folder = alone
    first, *rows = (folder / "answers.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    row["answers"].pop()
    (tmp_path / "answers.jsonl").write_text(f"{first}\n{json.dumps(row)}\n")
    with pytest.raises(UsageError, match="not of this run's"):
        EvalRun(loaded, None, MULTI, output=tmp_path, resume=True).evaluate()


def test_its_needles_are_of_the_half_that_no_profile_is_made_from(loaded):
    own = ProbeQuestions(loaded, "niah", 1, (LENGTH,), None, 1000)
    with pytest.raises(UsageError, match="add --query-agnostic"):
        replace(MULTI, question_known=True).check()
    assert not replace(MULTI, tasks=("multi", "niah")).check() and own[0].task == "niah"
    assert replace(MULTI, tasks=("multi", "niah"), probes=11).probes_of("multi", (LENGTH,)) == 6


def test_on_the_command_line(tmp_path):
    save_tiny(tmp_path / "tiny", "llama", chat=True)
    options = ("eval", "--model", "tiny", "--tasks", "multi", "--methods", "snapkv", "--budgets", "24,48")
    options = (*options, "--lengths", "1400", "--probes", "6", "-o", "out")
    refused = headprof(tmp_path, *options)
    assert refused.returncode == 2 and "add --query-agnostic" in refused.stderr and not (tmp_path / "out").exists()
    done = headprof(tmp_path, *options, "--query-agnostic")
    assert done.returncode == 0, done.stderr
    assert "multi, 1400" in done.stdout and "multi, all right, 1400, 1 documents" in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {cell["task"] for cell in found["cells"]} == {"multi", ALL_RIGHT}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "multi, all right" in page and (tmp_path / "out" / "scores.png").exists()
    again = headprof(tmp_path, *options, "--query-agnostic", "--resume")
    assert "Nothing was left to ask" in again.stderr and again.stdout == done.stdout
