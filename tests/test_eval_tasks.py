"""`headprof eval` over every task of every benchmark, from files in the hub's formats; and without a network."""

import json
from collections import Counter
from math import isfinite

import pytest
from huggingface_hub import constants
from support.commands import invoke
from support.hub_data import BABILONG, LONGBENCH, LOOGLE, write_hub_data
from support.profiles import random_profile
from support.tiny_models import load_tiny

from headprof.evaluation import questions
from headprof.evaluation.questions import Grading
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.run import EvalRun
from headprof.evaluation.tasks import BENCHMARKS, TASKS
from headprof.models.prompt_encoder import PromptEncoder

METHODS = ("full", "snapkv", "headkv-r2")
MAX_PROMPT = 600  # which the instructions of BABILong nearly fill, in the tiny tokenizer's short tokens
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_hub_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


@pytest.fixture
def short_answers(monkeypatch):
    """Generation ends after a few tokens, so that all tasks take seconds; nothing else changes."""
    monkeypatch.setattr(questions, "Grading", lambda score, done, most: Grading(score, done, min(most, NEW_TOKENS)))


def test_every_task_of_the_benchmarks_has_rows():
    assert BENCHMARKS["longbench"] == tuple(f"longbench/{task}" for task in LONGBENCH)
    assert {name for name in TASKS if name.startswith("babilong/")} == {f"babilong/{task}" for task in BABILONG}
    assert BENCHMARKS["loogle"] == tuple(f"loogle/{task}" for task in LOOGLE)


@pytest.mark.parametrize(
    ("names", "limit", "lengths"),
    [
        (("longbench",), 5, (1024,)),
        (("babilong",), 5, (0, 1024)),  # qa1 to qa5
        (tuple(f"babilong/{task}" for task in BABILONG[5:]), 1, (1024,)),
        (("loogle",), 5, (1024,)),
        (("ruler",), 2, (2048,)),
    ],
    ids=["longbench", "babilong", "babilong qa6 to qa20", "loogle", "ruler"],
)
def test_every_task_end_to_end(names, limit, lengths, loaded, data_dir, short_answers):
    """All tasks there are; of those that a benchmark's name stands for, several questions each."""
    max_prompt = 1500 if names == ("ruler",) else MAX_PROMPT  # two of its tasks begin with a worked example
    request = EvalRequest(
        names, METHODS, ("16",), lengths=lengths, limit=limit, max_prompt=max_prompt, data_dir=data_dir
    )
    assert request.check()
    answers = EvalRun(loaded, random_profile(loaded.model), request).evaluate().answers

    groups = {"babilong": ["0k", "1k"][-len(lengths) :], "ruler": ["2k"]}.get(names[0].partition("/")[0], [""])
    assert Counter((answer.task, answer.group, answer.method) for answer in answers) == {
        (task, group, method): limit for task in request.all_tasks for group in groups for method in METHODS
    }
    assert set(Counter((answer.task, answer.question, answer.method) for answer in answers).values()) == {1}

    encoder = PromptEncoder(loaded.tokenizer)
    for task in request.all_tasks:
        examples = {example.name: example for example in TASKS[task].examples(request.task_request(loaded))}
        for answer in (answer for answer in answers if answer.task == task):
            example = examples[answer.question]
            assert answer.score == example.score(answer.text)
            assert 0 <= answer.score <= 1
            assert isfinite(answer.divergence) and answer.divergence >= 0
            assert 0 <= answer.agreement <= 1
            # The last token of a prompt is read after the compression if no reply is begun.
            prompt = answer.prompt_tokens + max(1, len(encoder.encode_end(example.after, example.reply, "").reply))
            assert max_prompt - 16 < prompt <= max_prompt < len(loaded.tokenizer(example.text).input_ids)
            if answer.method == "full":
                assert (answer.divergence, answer.agreement) == (0, 1)
    assert all(answer.divergence > 0 for answer in answers if answer.method == "snapkv")
    assert len({answer.text for answer in answers}) > len(answers) / 10  # something is said


def test_benchmarks_on_the_command_line(data_dir, tiny, tiny_folder, tmp_path, short_answers, monkeypatch):
    monkeypatch.setattr("headprof.plots.results_folder.drawings", lambda found: {})  # which would take seconds
    monkeypatch.setattr("headprof.plots.results_folder.write_report", lambda found, path: path)
    random_profile(tiny.model).save(tmp_path / "tiny.safetensors")
    command = ["eval", "--model", str(tiny_folder), "--profile", str(tmp_path / "tiny.safetensors")]
    command += ["--tasks", "longbench/trec,longbench/lcc,babilong/qa1,loogle,ruler/niah_single_1,ruler/qa_2"]
    command += ["--lengths", "1k"]
    command += ["--data-dir", str(data_dir), "--limit", "2", "--max-prompt", str(MAX_PROMPT)]
    command += ["--methods", "snapkv,headkv-r2", "--budgets", "16", "--json", "-o", str(tmp_path / "results")]
    ended = invoke(*command)
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["about"]["questions"] == {
        "longbench/trec": 2,
        "longbench/lcc": 2,
        "babilong/qa1": 2,
        **{f"loogle/{task}": 2 for task in LOOGLE},
        "ruler/niah_single_1": 2,
        "ruler/qa_2": 2,
    }
    cells = {(cell["task"], cell["group"], cell["method"]): cell["questions"] for cell in found["cells"]}
    for method in METHODS:
        assert cells["longbench", "", method] == 4 and cells["loogle", "", method] == 2 * len(LOOGLE)
        assert cells["babilong/qa1", "1k", method] == cells["ruler/niah_single_1", "1k", method] == 2
        assert cells["ruler", "1k", method] == 4
    journal = (tmp_path / "results" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(journal) == 1 + sum(found["about"]["questions"].values())


# Without a network

OUTSIDE = {
    "longbench/hotpotqa": "THUDM/LongBench",
    "babilong/qa2": "RMT-team/babilong-100examples",
    "loogle/shortdep_qa": "bigai-nlco/LooGLE",
}


@pytest.fixture(params=["HF_HUB_OFFLINE=1", "HF_ENDPOINT=http://127.0.0.1:9"])
def cut_off(request, monkeypatch, tmp_path):
    """What these variables do; the hub's client has read them at import. Nothing listens on port 9."""
    offline = request.param.startswith("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:9{template}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return "HF_HUB_OFFLINE keeps it from being downloaded" if offline else "cannot be had from the hub"


@pytest.mark.parametrize("task", OUTSIDE)
def test_without_a_network_one_sentence_and_nothing_is_left(task, cut_off, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", "--model", str(tiny_folder), "--tasks", task, "--methods", "snapkv", "--budgets", "16"]
    ended = invoke(*command, "-o", "results")
    assert (ended.exit_code, ended.stdout) == (2, "")
    sentence = " ".join(ended.stderr.split())
    assert sentence.startswith(f"Error: The dataset {OUTSIDE[task]} ")
    assert cut_off in sentence
    assert sentence.endswith("with --data-dir.")
    assert ". " not in sentence
    assert list(tmp_path.iterdir()) == []  # not even the folder of the results
