"""Evaluation: intervals, tables, and one shared pass that equals many single ones."""

import csv
import io
import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import EOS, load_tiny, tiny_model

from headprof.compression import continuing
from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError
from headprof.evaluation.asker import Asker, Sharing
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.questions import ExampleQuestions, Grading, ProbeQuestions
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.results import Answer, main_cells, results_csv, tabulate
from headprof.evaluation.run import EvalRun
from headprof.evaluation.tasks import Example
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.intervals import mean_interval, t_95, wilson_interval


# Expected bounds: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_mean_interval_is_students():
    values = [0.1, 0.4, 0.35, 0.8]
    half = t_95(3) * stdev(values) / 2
    assert mean_interval(values) == pytest.approx((fmean(values) - half, fmean(values) + half))
    assert t_95(3) == pytest.approx(3.182, abs=1e-3)
    assert mean_interval([0.5]) is None and mean_interval([]) is None


def answer(number, method, budget, score, size=10, task="niah", group="1k", divergence=None, agreement=None):
    return Answer(task, str(number), group, method, budget, score, divergence, agreement, "", 100, size)


def test_table_counts_per_method_and_budget():
    answers = [answer(i, "full", "", float(i < 3), 40) for i in range(4)]
    answers += [answer(i, "snapkv", "8", float(i < 1), divergence=i / 2, agreement=1 - i / 4) for i in range(4)]
    full, snapkv = tabulate(answers)
    assert (full.method, full.questions, full.score, full.cache_bytes) == ("full", 4, 0.75, 40.0)
    assert (
        full.interval == wilson_interval(3, 4) and full.divergence is full.agreement is full.divergence_interval is None
    )
    assert (snapkv.budget, snapkv.score, snapkv.divergence, snapkv.agreement) == ("8", 0.25, 0.75, 0.625)
    assert snapkv.divergence_interval == mean_interval([0, 0.5, 1, 1.5])
    rows = list(csv.DictReader(io.StringIO(results_csv(answers))))
    assert len(rows) == 8 and (rows[4]["method"], rows[4]["score"], rows[4]["divergence"]) == ("snapkv", "1.0", "0.0")
    assert results_csv([]) == ""


@pytest.mark.parametrize("text", ["one\rtwo", 'a "quoted", one\r\n', "\n", "", "None"])
def test_texts_of_all_kinds_come_back_from_a_table(text):
    written = results_csv([replace(answer(number, "full", "", 0.5), text=text) for number in range(2)])
    rows = list(csv.DictReader(io.StringIO(written, newline="")))
    assert [(row["text"], row["score"], row["divergence"]) for row in rows] == 2 * [(text, "0.5", "")]


def test_graded_scores_have_students_interval_within_bounds():
    (cell,) = tabulate([answer(i, "full", "", score) for i, score in enumerate((0.9, 1.0, 0.2))])
    low, high = mean_interval([0.9, 1.0, 0.2])
    assert high > 1 and cell.interval == (max(low, 0.0), 1.0)
    assert tabulate([answer(0, "full", "", 0.4)])[0].interval is None


def test_tasks_of_a_suite_are_pooled_length_by_length():
    answers = [
        answer(number, "full", "", float(task == "niah"), task=task, group=group)
        for task in ("niah", "reasoning", "babilong/qa1")
        for group in ("1k", "2k")
        for number in range(3)
    ]
    cells = {(cell.task, cell.group): cell for cell in tabulate(answers)}
    assert list(cells) == [
        *((task, group) for task in ("niah", "reasoning", "probes") for group in ("1k", "2k")),
        *(("babilong/qa1", group) for group in ("1k", "2k")),
    ]
    assert (cells["probes", "1k"].questions, cells["probes", "1k"].score) == (6, 0.5)
    assert {cell.task for cell in main_cells(list(cells.values()))} == {"probes", "babilong/qa1"}


def test_stacked_caches_continue_like_each_alone():
    model = tiny_model(num_kv_heads=2, layers=3)
    profile, ids = random_profile(model), random_ids(1, 40)
    plans = [make_plan(model, profile, method=m, budget=b) for m, b in (("full", 1), ("snapkv", 6), ("headkv", 11))]
    with attending_ragged(model):
        caches = [HeadCache(plan) for plan in plans]
        prefill(model, ids, FanOutCache(caches))
        more = random_ids(1, 5, seed=2)
        together = model(more.expand(3, -1), past_key_values=stack_caches(caches)).logits
        for number, cache in enumerate(caches):
            alone = model(more, past_key_values=cache).logits[0]
            torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-4)
        prefill(model, ids, shorter := HeadCache(plans[0]))
        with pytest.raises(ValueError, match="same number of tokens"):
            stack_caches([caches[0], shorter])


def candidates_for(loaded, *wanted):
    profile = random_profile(loaded.model)
    return [
        Candidate(method, budget, make_plan(loaded.model, profile, method=method, budget=budget or 1))
        for method, budget in wanted
    ]


MANY = (("snapkv", "9"), ("full", ""), ("headkv", "30"), ("ems", "12"), ("snapkv", "100%"), ("adakv", "16"))


def invented_question(loaded, *, reply="", stop="", length=12, known_max=20):
    """A question with a document of invented words; what it is worth is how often the letter e is said."""
    document = " ".join(f"word{number % 17}" for number in range(60))
    example = Example(
        task="longbench/trec",
        name="1",
        group="",
        before="Read: ",
        document=document,
        after="\nWhich word?",
        reply=reply,
        answers=("word three and then five",),
        classes=(),
        metric="longbench.qa_f1",
        max_new_tokens=known_max,
        chat=True,
    )
    question = ExampleQuestions(loaded, [example])[0]
    grading = Grading(lambda text: text.count("e") / 100, lambda text: bool(stop) and stop in text, length)
    return replace(question, grading=grading)


@torch.inference_mode()
def apart(loaded, candidate, prompt, tail, reference, observers, grading):
    """What one candidate says and predicts, by itself and token by token: log-probabilities `[N, vocabulary]`, text."""
    plan = replace(candidate.plan, buffer=None)
    logs, said = [], []
    with attending_ragged(loaded.model):
        for feed in (list(reference), None):
            cache = HeadCache(plan)
            cache.expect_observers(observers)
            prefill(loaded.model, torch.tensor([prompt]), cache)
            for token in tail:
                logits = loaded.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            if feed is not None:
                for token in feed:
                    logs.append(logits.double().log_softmax(dim=-1))
                    logits = loaded.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                continue
            while len(said) < grading.max_new_tokens:
                token = int(logits.argmax())
                if token == loaded.tokenizer.eos_token_id:
                    break
                said.append(token)
                if grading.is_complete(loaded.tokenizer.decode(said, skip_special_tokens=True)):
                    break
                logits = loaded.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return torch.stack(logs), loaded.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("most_logits", [continuing.MOST_LOGITS, 1])
@pytest.mark.parametrize("stop", ["", "e"])
@pytest.mark.parametrize(("known", "reply"), [(True, ""), (True, "It is"), (False, ""), (False, "It is")])
def test_answers_are_those_of_each_candidate_alone(known, reply, stop, most_logits, monkeypatch):
    monkeypatch.setattr(continuing, "MOST_LOGITS", most_logits)
    loaded = load_tiny()
    question = invented_question(loaded, reply=reply, stop=stop)
    observers = [] if known else PromptEncoder(loaded.tokenizer).question_ids("Who?")
    candidates = [replace(each, plan=each.plan.for_observers(len(observers))) for each in candidates_for(loaded, *MANY)]
    answers = Asker(loaded, candidates, known, observers).ask(question)

    ids = [*question.document_ids, *question.asked_ids, *question.reply_ids]
    first = len(question.document_ids) if not known else len(ids) - max(1, len(question.reply_ids))
    prompt, tail = [*ids[:first], *observers], ids[first:]
    alone = [
        apart(loaded, each, prompt, tail, question.reference_ids, len(observers), question.grading)
        for each in candidates
    ]
    full = alone[1][0]
    for found, (logs, text), candidate in zip(answers, alone, candidates, strict=True):
        assert (found.method, found.budget, found.text) == (candidate.method, candidate.budget, text)
        assert found.score == text.count("e") / 100
        assert found.divergence == pytest.approx((full.exp() * (full - logs)).sum(dim=-1).mean().item(), abs=1e-5)
        assert found.agreement == pytest.approx((full.argmax(dim=-1) == logs.argmax(dim=-1)).double().mean().item())
        assert found.prompt_tokens == first
    assert answers[1].divergence == 0 and answers[1].agreement == 1
    assert answers[4].divergence == pytest.approx(0, abs=1e-6) and answers[0].divergence > 1e-4


def question_of_different_tokens(loaded):
    """A question about a document in which no token comes twice.

    The first layer's keys depend on token and position alone. So a row is exactly as similar to the row of the same
    token so many places before it as to that so many places behind it, and the last digit says which of the two it
    merges with: rounding alone moves the divergence of `ems` by 0.003 where words repeat at equal distances.
    """
    question = invented_question(loaded, reply="It is")
    tokens = torch.randperm(len(loaded.tokenizer) - 3, generator=torch.Generator().manual_seed(1)) + 3
    return replace(question, document_ids=tuple(tokens[:240].tolist()))


def divergences(loaded, question, known):
    """Of each candidate, by its name."""
    asked = Asker(loaded, candidates_for(loaded, *MANY), known).ask(question)
    return {(each.method, each.budget, each.prompt_tokens): each.divergence for each in asked}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_hardly_moves_a_divergence(known, seed):
    """Weights that differ by as much as float32 arithmetic in another order does: no choice hangs on that."""
    loaded = load_tiny()
    question = question_of_different_tokens(loaded)
    before = divergences(loaded, question, known)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)
    assert divergences(loaded, question, known) == pytest.approx(before, abs=1e-4)
    assert before["snapkv", "9", min(before)[2]] > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
def test_answers_on_a_gpu_are_those_on_the_cpu(known):
    """To far less than TF32 would move them, which is by 0.002 and more; float32 moves them by less than 1e-5."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    loaded = load_tiny()
    question = question_of_different_tokens(loaded)
    here = divergences(loaded, question, known)
    loaded.model.to("cuda")
    assert divergences(loaded, question, known) == pytest.approx(here, abs=1e-4)


def test_generation_ends_with_the_models_end_token():
    """The end token is made certain after a few steps: its row of the output matrix is that of what is said then."""
    loaded = load_tiny()
    question = invented_question(loaded, length=30)
    asker = Asker(loaded, candidates_for(loaded, ("full", ""), ("snapkv", "9")))
    said = loaded.tokenizer(asker.ask(question)[0].text, add_special_tokens=False).input_ids
    loaded.model.generation_config.eos_token_id = [said[-1], 0]
    ended = asker.ask(question)[0].text
    assert len(ended) < len(loaded.tokenizer.decode(said)) and EOS not in ended
    assert loaded.tokenizer.decode(said).startswith(ended)


@pytest.mark.parametrize("known", [True, False])
def test_probes_are_graded_as_the_model_itself_would_answer(known):
    """With the model's own greedy answer as the right one, the full cache is always right."""
    loaded = load_tiny()
    (full,) = candidates_for(loaded, ("full", ""))
    asker = Asker(loaded, [full], known)
    for probe in ProbeQuestions(loaded, "niah", 3, (512,), None, 5):
        for reply in ((), (7, 9)):
            prompt = torch.tensor([[*probe.document_ids, *probe.asked_ids, *reply]])
            output = loaded.model.generate(
                prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=2, eos_token_id=None
            )
            said = tuple(output[0, prompt.shape[1] :].tolist())
            for right, score in ((said, 1.0), ((*said[:-1], said[-1] + 1), 0.0)):
                (found,) = asker.ask(replace(probe, reply_ids=reply, reference_ids=right))
                assert found.score == score and found.text == ""


def test_probes_of_a_task_do_not_depend_on_how_many_are_asked():
    loaded = load_tiny()
    few, many = (ProbeQuestions(loaded, "reasoning", number, (512, 700), None, 5) for number in (2, 6))
    assert list(few) == list(many)[:2] and len(many) == 6
    assert [each.group for each in many] == ["512", "700"] * 3
    assert all(0 <= each.depth <= 1 and each.family for each in many)
    assert {each.family for each in many}.isdisjoint(
        each.family for each in ProbeQuestions(loaded, "niah", 6, (512,), None, 5)
    )


def test_the_reference_follows_what_stands_before_it():
    loaded = load_tiny()
    for reply, text in (("", "word three and then five"), ("It is", " word three and then five")):
        assert invented_question(loaded, reply=reply).reference_ids == tuple(loaded.tokenizer(text).input_ids[:20])
    assert len(invented_question(loaded, known_max=4).reference_ids) == 4


def test_a_prompt_is_cut_in_the_middle_to_what_is_allowed():
    loaded = load_tiny()
    example = Example(
        "longbench/qasper", "1", "", "Read: ", "one two three " * 200, " Which?", "", ("x",), (), "m", 8, True
    )
    for allowed in (300, None):
        cut = ExampleQuestions(loaded, [example], allowed)[0]
        tokens = len(cut.document_ids) + len(cut.asked_ids)
        assert tokens <= 300 if allowed else tokens > 1000


def test_sharing_is_added_up():
    loaded = load_tiny()
    asker = Asker(loaded, candidates_for(loaded, ("full", ""), ("snapkv", "9")))
    question = invented_question(loaded)
    asker.ask(question)
    asker.ask(question)
    sharing = asker.sharing
    tokens = len(question.document_ids) + len(question.asked_ids) - 1
    assert (sharing.questions, sharing.prompt_tokens, sharing.sampled_tokens) == (2, 2 * tokens, tokens)
    assert sharing.seconds_apart() == pytest.approx(4 * sharing.sampled_seconds)
    total = sharing + Sharing(1, 10, 1.0, 0, 0.0)
    assert (total.questions, total.prompt_tokens) == (3, 2 * tokens + 10) and Sharing().seconds_apart() == 0


def evaluated(loaded, *, profile=None, **options):
    request = EvalRequest(**({"tasks": ("niah",), "budgets": ("8",), "probes": 2, "lengths": (512,)} | options))
    return EvalRun(loaded, profile, request).evaluate().answers


def test_a_request_runs_every_method_at_every_budget():
    loaded = load_tiny()
    options = {"methods": ("full", "snapkv", "headkv"), "budgets": ("8", "100%"), "options": {"pool_factor": 2.0}}
    assert EvalRequest(("niah",), **options).check()
    answers = evaluated(loaded, profile=random_profile(loaded.model), **options)
    assert len(answers) == 2 * 5
    by = {(each.question, each.method, each.budget): each for each in answers}
    for probe in ("0", "1"):
        full = by[probe, "full", ""]
        for method in ("snapkv", "headkv"):
            whole = by[probe, method, "100%"]
            assert whole.score == full.score and whole.divergence == pytest.approx(0, abs=1e-6) and whole.agreement == 1
        assert by[probe, "snapkv", "8"].divergence > 0 and math.isfinite(by[probe, "snapkv", "8"].divergence)
        assert by[probe, "snapkv", "8"].cache_bytes < full.cache_bytes / 10
        assert by[probe, "snapkv", "8"].cache_bytes == by[probe, "headkv", "8"].cache_bytes


@pytest.mark.parametrize("observe", ["", "Who and when?"])
def test_a_document_alone_is_compressed_when_the_question_is_not_known(observe):
    loaded = load_tiny()
    methods = ("full", "snapkv", "knorm")
    answers = evaluated(loaded, methods=methods, question_known=False, observe=observe)
    for one, other in zip(answers, evaluated(loaded, methods=methods), strict=True):
        assert one.prompt_tokens < other.prompt_tokens
        assert (one.cache_bytes < other.cache_bytes) if one.method == "full" else one.cache_bytes == other.cache_bytes


def test_a_request_that_needs_no_profile_says_so():
    assert not EvalRequest(("niah",), ("full", "snapkv"), ("8",)).check()
    with pytest.raises(UsageError, match="no method 'magic'"):
        EvalRequest(("niah",), ("magic",), ("8",)).check()
    with pytest.raises(UsageError, match="no pooling 'median'"):
        EvalRequest(("niah",), ("snapkv",), ("8",), options={"pooling": "median"}).check()
