"""The embedded model from end to end, as the README shows it."""

import pytest
from support.question_files import write_question_files

from headprof.compression.encoding import prompt_ids
from headprof.compression.generation import generate_text
from headprof.compression.inputs import demo_document
from headprof.compression.session import make_plan
from headprof.evaluation import questions
from headprof.evaluation.questions import Grading
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.run import EvalRun
from headprof.evaluation.tasks import BENCHMARKS
from headprof.profile.finding import find_profile
from headprof.profile.head_profile import HeadProfile
from headprof.utils.assets import asset_dir

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def shipped(smollm2) -> HeadProfile:
    return HeadProfile.load(asset_dir("profiles") / "SmolLM2-135M-Instruct.safetensors", smollm2.shape)


def test_the_shipped_profile_is_found_and_says_how_it_was_made(smollm2, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADPROF_DATA", str(tmp_path))
    assert HeadProfile.load(find_profile(smollm2.name), smollm2.shape).digest() == shipped.digest()
    assert shipped.metadata["command"].startswith("headprof score")
    assert shipped.probes_used["retrieval"] > 100 and shipped.probes_used["reasoning"] > 100


@pytest.mark.long
def test_budget_of_the_whole_context_gives_the_full_caches_tokens(smollm2, shipped):
    document, question = demo_document()
    ids = prompt_ids(smollm2, document[:2000], question, 64)
    full = generate_text(smollm2, ids, max_new_tokens=64)
    plan = make_plan(smollm2.model, shipped, method="headkv-r2", budget=ids.shape[1])
    made = generate_text(smollm2, ids, plan, max_new_tokens=64)
    assert made.text == full.text and made.new_tokens == full.new_tokens > 5


def test_the_demo_answers_right_under_a_budget_of_64(smollm2, shipped):
    document, question = demo_document()
    ids = prompt_ids(smollm2, document, question, 32)
    pieces = []
    plan = make_plan(smollm2.model, shipped, method="headkv-r2", budget=64)
    made = generate_text(smollm2, ids, plan, max_new_tokens=32, on_text=pieces.append)
    assert "Tobias Fennimore" in made.text and "".join(pieces) == made.text
    full_bytes = smollm2.shape.cache_bytes_per_token(4) * (made.prompt_tokens + made.new_tokens)
    assert made.cache_bytes < 0.083 * full_bytes  # a quarter of it are the queries by which rows are judged next


@pytest.mark.long
def test_the_profile_beats_equal_budgets_on_unseen_probes(smollm2, shipped):
    """A small version of the README's table: at budget 32 the gap is far wider than chance among 6 probes."""
    request = EvalRequest(("niah",), ("full", "snapkv", "headkv-r2"), ("32",), 6, (1024,), seed=77)
    full, snapkv, headkv = EvalRun(smollm2, shipped, request).evaluate().cells
    assert full.score >= 0.75
    assert headkv.score >= snapkv.score + 0.25
    assert headkv.divergence < snapkv.divergence / 2


@pytest.mark.long
@pytest.mark.parametrize(
    "tasks",
    [
        ("ruler/niah_single_1",),
        pytest.param(BENCHMARKS["ruler"], marks=pytest.mark.slow, id="all"),
    ],
)
def test_tasks_of_ruler_at_a_compression_ratio(smollm2, tmp_path, monkeypatch, tasks):
    """An example each, the question read afterwards: half the rows are left; the full cache finds a needle."""
    monkeypatch.setattr(questions, "Grading", lambda score, done, most: Grading(score, done, min(most, 12)))
    data = write_question_files(tmp_path)
    request = EvalRequest(
        tasks,
        ("full", "snapkv"),
        ("ratio 0.5", "ratio 0"),
        lengths=(1024,),
        limit=1,
        question_known=False,
        data_dir=data,
    )
    assert not request.check()
    answers = EvalRun(smollm2, None, request).evaluate().answers
    assert [answer.task for answer in answers[::3]] == list(tasks)
    for full, half, whole in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert (full.budget, half.budget, whole.budget) == ("", "ratio 0.5", "ratio 0")
        assert (whole.text, whole.score) == (full.text, full.score)
        assert whole.divergence == pytest.approx(0, abs=1e-6) and half.divergence > 0
        assert half.prompt_tokens == full.prompt_tokens > 600
        assert half.cache_bytes < 0.6 * full.cache_bytes
    assert answers[0].score == 1
