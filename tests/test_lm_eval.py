"""The model type `headprof` of the lm-evaluation-harness."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.profiles import random_profile, random_surrogate
from support.prompts import random_ids
from support.tiny_models import TEXT, save_tiny, tiny_model, tiny_tokenizer

import headprof
import headprof.integrations.lm_eval as adapter
from headprof.cli import lm_eval as command
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import ProfileError, UsageError
from headprof.integrations.lm_eval import HeadprofLM
from headprof.models.checkpoint import Source
from headprof.models.embedded import EMBEDDED

METHODS = ("snapkv", "headkv-r2", "ems", "adakv", "h2o", "streamingllm:sinks=2")


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=3)


@pytest.fixture(scope="module")
def profile(model) -> headprof.HeadProfile:
    return random_profile(model, seed=1)


@pytest.fixture(scope="module")
def surrogate(model):
    return random_surrogate(model, seed=1)


def harness(model, **options) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tiny_tokenizer(), **options)


@pytest.fixture
def made(model, profile, surrogate):
    def make(**options) -> HeadprofLM:
        given = {"profile": profile, "surrogate": surrogate, "method": "snapkv"}
        return HeadprofLM(model, tokenizer=tiny_tokenizer(), **given | options)

    return make


def tokens(count: int, seed: int) -> list[int]:
    return random_ids(1, count, seed)[0].tolist()


def some_requests() -> list:
    """Contexts shared and not, long and short, some alike but for their last token; the order is no grouping's."""
    long, other, short = tokens(60, 1), tokens(45, 2), tokens(6, 3)
    contexts = [long, short, other, long, [5], [*long[:-1], 7], long, other, short]
    return [
        ((f"context {number}", f"continuation {number}"), context, tokens(1 + 3 * number % 8, 10 + number))
        for number, context in enumerate(contexts)
    ]


def likelihood_twin(model, plan, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request, token by token over a cache of its own."""
    cache = HeadCache(plan)
    total, greedy = 0.0, True
    with attending_ragged(model), torch.no_grad():
        if len(context) > 1:
            prefill(model, torch.tensor([context[:-1]]), cache)
        fed = context[-1]
        for token in continuation:
            log_probs = model(torch.tensor([[fed]]), past_key_values=cache).logits[0, -1].double().log_softmax(-1)
            total, greedy = total + float(log_probs[token]), greedy and int(log_probs.argmax()) == token
            fed = token
    return total, greedy


def assert_same(found: list, expected: list) -> None:
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_loglikelihoods_equal_those_of_one_request_at_a_time(made, model, profile, surrogate, method, batch_size):
    requests = some_requests()
    plan = headprof.make_plan(model, profile, method=method, budget=10, buffer=None, surrogate=surrogate)
    expected = [likelihood_twin(model, plan, context, continuation) for _, context, continuation in requests]
    found = made(method=method, budget=10, batch_size=batch_size)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_same(found, expected)


def test_a_greedy_continuation_is_known_as_one(made, model, profile):
    lm, context = made(budget=10), tokens(60, 1)
    cache, written = HeadCache(lm.plan), []
    with attending_ragged(model), torch.no_grad():
        prefill(model, torch.tensor([context[:-1]]), cache)
        fed = context[-1]
        for _ in range(4):
            fed = int(model(torch.tensor([[fed]]), past_key_values=cache).logits[0, -1].argmax())
            written.append(fed)
    wrong_end = [*written[:-1], written[-1] ^ 1]
    greedy = lm._loglikelihood_tokens([(None, context, written), (None, context, wrong_end)], disable_tqdm=True)
    assert [answer[1] for answer in greedy] == [True, False]


@pytest.mark.parametrize("compress_all", [False, True])
@pytest.mark.parametrize("method", ["snapkv", "headkv-r2", "ems"])
@pytest.mark.parametrize("max_length", [None, 24])
def test_contexts_within_the_budget_are_scored_as_by_the_harness(
    made, model, monkeypatch, method, max_length, compress_all
):
    """Also when they go through our cache, and when the beginnings of contexts are cut off."""
    if compress_all:
        monkeypatch.setattr(HeadprofLM, "_loses", lambda self, prompt_length: prompt_length > 0)
    requests = some_requests()
    expected = harness(model, max_length=max_length)._loglikelihood_tokens(requests, disable_tqdm=True)
    lm = made(method=method, budget=64, max_length=max_length)
    assert_same(lm._loglikelihood_tokens(requests, disable_tqdm=True), expected)


def test_a_small_budget_changes_what_exceeds_it_and_nothing_else(made, model):
    requests = some_requests()
    full = harness(model)._loglikelihood_tokens(requests, disable_tqdm=True)
    small = made(budget=10)._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, _), (expected, _), (found, _) in zip(requests, full, small, strict=True):
        assert (abs(expected - found) > 1e-2) == (len(context) > 10)


def test_full_is_the_harness_itself(made, model):
    requests = some_requests()
    expected = harness(model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert made(method="full")._loglikelihood_tokens(requests, disable_tqdm=True) == expected


def test_a_shared_context_is_read_once(made, model, monkeypatch):
    lengths: list[int] = []
    monkeypatch.setattr(
        adapter, "prefill", lambda model, ids, cache: (lengths.append(ids.shape[1]), prefill(model, ids, cache))[1]
    )
    made(budget=10)._loglikelihood_tokens(some_requests(), disable_tqdm=True)
    assert lengths == [59, 44]


def test_answers_are_cached_by_request_but_not_those_without_a_key(made):
    kept = {}

    class Hook:
        def add_partial(self, kind, key, answer):
            assert kind == "loglikelihood" and key not in kept
            kept[key] = answer

    lm = made(budget=10)
    lm.set_cache_hook(Hook())
    requests = [*some_requests(), (None, tokens(60, 1), [4, 5])]
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert kept == dict(zip([key for key, _, _ in requests[:-1]], answers[:-1], strict=True))


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_rolling_loglikelihoods(made, model):
    """A text of one window has no context; the last of several has."""
    texts = instances("loglikelihood_rolling", (TEXT[:100],), (TEXT,))
    for max_length, same in ((None, True), (64, False)):
        expected = harness(model, max_length=max_length).loglikelihood_rolling(texts, disable_tqdm=True)
        wide = made(budget=64, max_length=max_length).loglikelihood_rolling(texts, disable_tqdm=True)
        narrow = made(budget=8, max_length=max_length).loglikelihood_rolling(texts, disable_tqdm=True)
        assert wide == pytest.approx(expected, abs=1e-3)
        assert (narrow[1] == pytest.approx(expected[1], abs=1e-3)) == same


PROMPTS = (TEXT[:300], TEXT[200:340], TEXT[50:500])


def prompts(count: int = 40, **options) -> list[Instance]:
    settings = {"until": [], "max_gen_toks": count} | options
    return instances("generate_until", *((prompt, settings) for prompt in PROMPTS))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["snapkv", "headkv-r2", "ems"])
def test_what_is_generated_within_the_budget_is_the_harness_own(made, model, method, batch_size):
    expected = harness(model, batch_size=batch_size).generate_until(prompts(), disable_tqdm=True)
    lm = made(method=method, budget=512, batch_size=batch_size)
    assert lm.generate_until(prompts(), disable_tqdm=True) == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_generated_is_what_our_own_context_generates(made, model, profile, batch_size):
    lm, tokenizer = made(method="headkv-r2", budget=12, buffer=8, batch_size=batch_size), tiny_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with headprof.compressed(model, profile, method="headkv-r2", budget=12, buffer=8):
            written = model.generate(ids, max_new_tokens=40, do_sample=False)
        expected.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    found = lm.generate_until(prompts(), disable_tqdm=True)
    assert found == expected
    assert found != harness(model).generate_until(prompts(), disable_tqdm=True)


def test_generation_stops_where_the_harness_stops(made, model):
    written = made(budget=12).generate_until(prompts(), disable_tqdm=True)
    stops = [written[0][5:7]]
    stopped = made(budget=12).generate_until(prompts(until=stops), disable_tqdm=True)
    assert stopped == [text.split(stops[0])[0] for text in written]


def test_the_model_is_left_as_it_was(made, model):
    before = model.config._attn_implementation
    lm = made(budget=12)
    lm.generate_until(prompts(2), disable_tqdm=True)
    lm._loglikelihood_tokens(some_requests(), disable_tqdm=True)
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "nosuch"}, "There is no method 'nosuch'"),
        ({"window": "wide"}, "'window' cannot be 'wide'"),
        ({"method": "streamingllm", "window": 8}, "no parameter 'window'"),
        ({"budget": "many"}, "budget of 'many'"),
        ({"budget": 2}, "the 3 that every head keeps"),
        ({"attention_backend": "nosuch"}, "nosuch"),
    ],
)
def test_requests_that_cannot_be_served(made, options, complaint):
    with pytest.raises(UsageError, match=complaint):
        made(**options)


def test_a_share_that_is_too_small_for_a_prompt_is_told_before_any_work(made, model, monkeypatch):
    monkeypatch.setattr(HFLM, "_model_generate", None)
    lm = made(budget="1%")
    with pytest.raises(UsageError, match="every head keeps"):
        lm.generate_until(prompts(), disable_tqdm=True)


def test_profiles_that_are_missing_or_for_another_model(made, model, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match="There is no profile file"):
        made(method="headkv-r2", profile="nowhere.safetensors")
    with pytest.raises(ProfileError, match="There is no head profile for"):
        made(method="headkv-r2", profile=None)
    wide = tiny_model(num_heads=8)
    with pytest.raises(ProfileError, match="another model"):
        HeadprofLM(wide, tokenizer=tiny_tokenizer(), profile=profile)


def test_settings_reach_the_method(made):
    lm = made(method="headkv-r2:kernel=5", window=4, pool_factor=1.5, keep_last=3, buffer=0, decode_budget="50%")
    method = lm.plan.method
    assert (method.importance.window, method.importance.kernel, method.budget.pool_factor) == (4, 5, 1.5)
    assert (method.keep_last, lm.plan.buffer, lm.plan.decode_budget.unit) == (3, None, "share")


def test_without_a_name_it_is_the_embedded_model(tiny_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(adapter, "find_model", lambda name, _: asked.append(name) or Source(str(tiny_folder), name))
    lm = HeadprofLM(method="snapkv", device="cpu")
    assert asked == [EMBEDDED] and lm.model.name_or_path == str(tiny_folder)


def test_the_harness_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "headprof.integrations.lm_eval")
    with pytest.raises(UsageError, match=r"headprof\[lm-eval\]"):
        importlib.import_module("headprof.integrations.lm_eval")


# End to end: the harness's own evaluation of tasks of ours.

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITE = """\
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a checkpoint, its profile, and two tasks with their data."""
    folder = tmp_path_factory.mktemp("harness")
    save_tiny(folder / "tiny", layers=3)
    random_profile(tiny_model(layers=3), seed=1).save(folder / "profiles" / "tiny.safetensors")
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    questions = [TEXT[start : start + 260] for start in (0, 100, 200)]
    choices = ["green", "the old bridge", "a whale"]
    with (folder / "choice.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": each, "choices": choices}) + "\n" for each in questions)
    with (folder / "write.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": each, "answer": "amber"}) + "\n" for each in questions)
    return folder


@pytest.fixture
def inside(workplace, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(workplace)
    return workplace


def evaluated(model: str, model_args: str, folder: Path) -> dict:
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={folder}/tiny,{model_args}",
        tasks=["tiny_choice", "tiny_write"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )


def answers(results: dict) -> tuple[list[float], list[str]]:
    """Log-probabilities of all choices, and all texts written."""
    samples = results["samples"]
    scored = [float(answer[0]) for sample in samples["tiny_choice"] for (answer,) in sample["resps"]]
    return scored, [sample["resps"][0][0] for sample in samples["tiny_write"]]


def test_the_harness_evaluates_tasks(inside):
    """Of the profile that is found beside; with room for everything as its own model, with little otherwise."""
    own_scores, own_texts = answers(evaluated("hf", "dtype=float32", inside))
    for budget, same in ((512, True), (8, False)):
        results = evaluated("headprof", f"dtype=float32,method=headkv-r2,budget={budget},window=4", inside)
        scores, texts = answers(results)
        assert len(scores) == 9 and len(texts) == 3
        assert (scores == pytest.approx(own_scores, abs=1e-3)) == same
        assert (texts == own_texts) == same
        assert set(results["results"]) == {"tiny_choice", "tiny_write"}
        assert len(results["config"]["headprof_profile_digest"]) == 64


@pytest.fixture
def run(inside, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would outlive the terminal of the test
    # Reading the harness's thousands of tasks takes seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    app = typer.Typer()
    app.command(name="lm-eval", context_settings=command.PASS_ON)(command.lm_eval)

    def invoke(*arguments: str):
        return CliRunner().invoke(app, arguments)

    return invoke


def test_the_command_passes_its_arguments_on(run, inside):
    given = list(sys.argv)
    tasks = ("--tasks", "tiny_choice", "--include_path", str(inside), "--device", "cpu", "--limit", "2")
    result = run("--model", "headprof", "--model_args", f"pretrained={inside}/tiny,method=snapkv,budget=8", *tasks)
    assert result.exit_code == 0, result.output
    assert "tiny_choice" in result.output and "acc" in result.output
    assert sys.argv == given


def test_the_command_says_what_is_wrong_in_a_sentence(run, inside):
    tasks = ("--tasks", "tiny_choice", "--include_path", str(inside), "--device", "cpu")
    result = run("--model", "headprof", "--model_args", f"pretrained={inside}/tiny,method=nosuch", *tasks)
    assert result.exit_code == 2
    assert "There is no method 'nosuch'" in result.output and "Traceback" not in result.output


def test_help_is_the_harness_own(run):
    assert "usage: lm-eval" in run("--help").output


def test_the_model_type_is_registered():
    assert get_model("headprof") is HeadprofLM
