"""Influence curves: every number by its slow twin, the cache itself with one head's budget changed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.commands import headprof
from support.profiles import random_curves, random_profile, small_profile
from support.tiny_models import TEXT, load_tiny, save_tiny, tiny_model

from headprof import ask, compress_document, load_document, save_document
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.filling import read_document_into
from headprof.compression.methods.budget import BudgetPolicy
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import CacheError, InterruptedRun, ProfileError, UsageError
from headprof.profile.head_profile import HeadProfile
from headprof.tuning.answer_curves import interpolated, to_measure
from headprof.tuning.curves import CurveSettings, measure_curves
from headprof.tuning.exams import JUDGES, Exams, ExamSettings
from headprof.utils.tensor_files import with_checksum

GRID = (5, 20, 60)
HOW = CurveSettings(GRID)


@dataclass(frozen=True)
class Given(BudgetPolicy):
    """Heads keep what they are told to."""

    counts: tuple[tuple[int, ...], ...] = ()
    profile_scores = None

    def allocate(self, scores, *, budget, context_length, always_kept):
        return torch.tensor(self.counts).clamp(max=context_length)


@torch.no_grad()
def losses_of_cache(loaded, exams, exam, answer, counts):
    """Divergence and drop of an answer from a cache that holds so many rows of each head, and no hidden ones."""
    method = replace(exams.judge.of_table, budget=Given(tuple(map(tuple, counts.tolist()))))
    plan = make_plan(loaded.model, method=method, budget=5, buffer=None)
    observers = exams.observers(loaded, exam)
    cache = HeadCache(plan.for_observers(len(observers)))
    number = len(answer.reference)
    with attending_ragged(loaded.model):
        read_document_into(loaded.model, [cache], exam.prompt, observers)
        said = loaded.model(torch.tensor([answer.fed]), past_key_values=cache).logits[0, -number:]
    whole = loaded.model(torch.tensor([[*exam.prompt, *answer.fed]]), use_cache=False).logits[0, -number:]
    own, other = whole.double().log_softmax(-1), said.double().log_softmax(-1)
    wanted = torch.tensor(answer.reference)[:, None]
    return [float((own.exp() * (own - other)).sum(-1).mean()), float((own - other).gather(1, wanted).mean())]


@pytest.mark.parametrize("situation", ["known", "unknown"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2", "mistral"])
@pytest.mark.parametrize("around", [False, True])
def test_each_loss_is_that_of_a_cache(situation, arch, around):
    loaded = load_tiny(arch, attn="eager" if arch == "gemma2" else None, sliding_window=100)
    exams = Exams(loaded, JUDGES[situation], ExamSettings(probes=2, texts=1, length=520, pack=2))
    base = torch.tensor([[30, 7], [12, 90]]) if around else None
    measured = measure_curves(loaded, exams, CurveSettings(GRID, base, 0.0), batch=3)
    asked = [(exam, answer) for exam in exams for answer in exam.answers]
    assert [answer.kind for answer in measured.answers] == [answer.kind for _, answer in asked]
    for (exam, answer), found in zip(asked, measured.answers, strict=True):
        others = torch.full((2, 2), len(exam.prompt)) if base is None else base
        torch.testing.assert_close(
            found.base.tolist(), losses_of_cache(loaded, exams, exam, answer, others), atol=2e-5, rtol=1e-3
        )
        for layer, head, number in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 0), (1, 1, 3)):
            counts = others.clone()
            counts[layer, head] = (*GRID, len(exam.prompt))[number]
            expected = losses_of_cache(loaded, exams, exam, answer, counts)
            losses = [float(each[layer, head, number]) for each in (found.divergence, found.drop)]
            torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), st.sets(st.integers(0, 11)), st.floats(0, 1))
def test_what_is_not_measured_lies_between_what_hardly_differs(losses, known, tolerance):
    found = {number: (losses[number], -losses[number]) for number in known if number < len(losses)}
    while numbers := to_measure(found, len(losses), tolerance):
        assert not found.keys() & set(numbers)
        found |= {number: (losses[number], -losses[number]) for number in numbers}
    between = interpolated(found, len(losses))
    for number, loss in enumerate(losses):
        if number in found:
            assert between[:, number].tolist() == pytest.approx([loss, -loss])
        else:
            low, high = (losses[max(n for n in found if n < number)], losses[min(n for n in found if n > number)])
            assert abs(low - high) <= tolerance and min(low, high) - 1e-6 <= between[0, number] <= max(low, high) + 1e-6
    if tolerance == 0 and len(set(losses)) == len(losses):
        assert len(found) == len(losses)


# How they are kept.


def test_a_profile_keeps_them(tmp_path):
    plain = small_profile()
    curves = {"known": random_curves(plain.shape), "unknown": random_curves(plain.shape, 1, grid=(3, 9))}
    profile = replace(plain, curves=curves)
    profile.save(tmp_path / "p.safetensors")
    again = HeadProfile.load(tmp_path / "p.safetensors")
    for situation, kept in again.curves.items():
        for part in ("losses", "errors", "grid"):
            assert torch.equal(getattr(kept, part), getattr(curves[situation], part))
    assert again.digest() == profile.digest() != plain.digest() and again.curves["unknown"].points == [3, 9]
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        assert file.metadata()["format_version"] == "5"
    plain.save(tmp_path / "plain.safetensors")
    assert not HeadProfile.load(tmp_path / "plain.safetensors").curves


def damaged(name, tensors):
    losses, grid = tensors["curves_known"], tensors["curves_known_grid"]
    match name:
        case "no number":
            losses[0, 0, 0] = float("nan")
        case "another grid of heads":
            tensors["curves_known"] = losses[1:].contiguous()
        case "another type":
            tensors["curves_known"] = losses.double()
        case "errors below zero":
            tensors["curves_known_se"][0] = -1.0
        case "points descend":
            tensors["curves_known_grid"] = grid.flip(0).contiguous()
        case "points of none":
            grid[0] = 0
        case "too many points":
            tensors["curves_known_grid"] = torch.arange(1, 66)
        case "a part is missing":
            del tensors["curves_known_se"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no number", "are not all finite"),
        ("another grid of heads", r"have shape \[4, 2, 4\] where \[5, 2, 4\] belongs"),
        ("another type", "are float64, not float32"),
        ("errors below zero", "have errors below zero"),
        ("points descend", "at numbers of rows that do not ascend"),
        ("points of none", "at numbers of rows that do not ascend"),
        ("too many points", "at 1 to 64 whole numbers of rows"),
        ("a part is missing", "influence curves for a question that is known lack a part"),
    ],
)
def test_damaged_curves_are_refused(tmp_path, name, said):
    profile, path = small_profile(), tmp_path / "p.safetensors"
    replace(profile, curves={"known": random_curves(profile.shape)}).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    damaged(name, tensors)
    save_file(tensors, path, metadata=with_checksum(tensors, metadata))
    with pytest.raises(ProfileError, match=rf"is damaged \(.*{said}.*restore it, or run"):
        HeadProfile.load(path)


@pytest.mark.parametrize(("method", "situation"), [("headkv-curves", "known"), ("curves-kvzip", "unknown")])
def test_a_profile_without_says_how_to_add_them(method, situation):
    loaded = load_tiny()
    profile = replace(random_profile(loaded.model), curves={})
    with pytest.raises(ProfileError, match=rf"question that is {situation}: add them with `headprof score .*--curves"):
        make_plan(loaded.model, profile, method=method)
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=20)
    assert int(plan.allocation(300).sum()) == 20 * 4 and len(plan.allocation(300).unique()) > 1


def test_a_document_goes_on_by_its_curves(tmp_path):
    loaded = load_tiny()
    plan = make_plan(loaded.model, random_profile(loaded.model), method="curves-kvzip", budget=16, buffer=6)
    cache, path = compress_document(loaded, TEXT, plan), tmp_path / "doc.kv.safetensors"
    assert torch.equal(cache.lengths[:, 0], plan.allocation(cache.get_seq_length()))
    save_document(cache, path, loaded)
    again, _ = load_document(path, loaded)
    assert torch.equal(again.plan.scores, plan.scores) and again.plan.method == plan.method
    said = [ask(loaded, each, "How many boats?", max_new_tokens=20).text for each in (cache, again)]
    assert said[0] == said[1]
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    scores = tensors["scores"]
    for bad, fault in (
        (scores[0], "its scores are not float32, one for each KV head"),
        (scores.flip(1), "its scores are at numbers of rows that do not ascend"),
        (torch.stack([scores[0], scores[1].flip(0)]), "its scores rise with the rows that are kept"),
    ):
        changed = tensors | {"scores": bad.contiguous()}
        save_file(changed, path, metadata=with_checksum(changed, metadata))
        with pytest.raises(CacheError, match=fault):
            load_document(path, loaded)


# Interruptions and teams.


def answers_of(measured):
    return [
        [*torch.cat([part.flatten() for part in (a.divergence, a.drop, a.base)]).tolist(), a.kind, a.cluster]
        for a in measured.answers
    ]


def test_interrupted_runs_go_on_where_they_were(tmp_path):
    loaded = load_tiny()
    exams = Exams(loaded, JUDGES["known"], ExamSettings(probes=2, texts=2, length=520, pack=1))
    whole, path = measure_curves(loaded, exams, HOW), tmp_path / "p.curves.safetensors"
    rng = random.Random(0)
    for turn in range(10):
        stop, asked = rng.randrange(1, 6), []

        def interrupt(done, total, stop=stop, asked=asked):
            asked.append(done)
            if len(asked) > stop:
                raise KeyboardInterrupt

        with suppress(InterruptedRun):
            measure_curves(loaded, exams, HOW, results_path=path, resume=turn > 0, on_progress=interrupt)
    assert answers_of(measure_curves(loaded, exams, HOW, results_path=path, resume=True)) == answers_of(whole)
    with pytest.raises(UsageError, match=r"of another model or other settings \(grid\)"):
        measure_curves(loaded, exams, CurveSettings((5, 20)), results_path=path, resume=True)
    with pytest.raises(UsageError, match=r"of another model or other settings \(others keep\)"):
        base = torch.full((2, 2), 9)
        measure_curves(loaded, exams, CurveSettings(GRID, base), results_path=path, resume=True)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)
    with pytest.raises(UsageError, match=r"of another model or other settings \(weights\)"):
        measure_curves(loaded, exams, HOW, results_path=path, resume=True)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UsageError, match="cannot be read: delete that file, or run without --resume"):
        measure_curves(loaded, exams, HOW, results_path=path, resume=True)


@pytest.mark.parametrize("grid", [(), (0, 5), (5, 5), (9, 4), (5, 520)])
def test_grids_that_cannot_be(grid):
    loaded = load_tiny()
    exams = Exams(loaded, JUDGES["known"], ExamSettings(probes=1, length=520))
    with pytest.raises(UsageError, match="give ascending numbers below that"):
        measure_curves(loaded, exams, CurveSettings(grid))


# The command.


RUN = ("score", "--model", "tiny", "--curves", "--question", "known", "--curve-probes", "6", "--curve-length", "520")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a profile of it, and the curves that one process measures of it."""
    place = tmp_path_factory.mktemp("curves")
    save_tiny(place / "tiny", chat=True)
    replace(random_profile(tiny_model()), curves={}).save(place / "p.safetensors")
    done = headprof(place, *RUN, "--add-to", "p.safetensors", "-o", "alone.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alone.safetensors"
    return place


def assert_same_curves(one, other):
    for situation, curves in HeadProfile.load(one).curves.items():
        again = HeadProfile.load(other).curves[situation]
        assert torch.equal(curves.losses, again.losses) and torch.equal(curves.errors, again.errors)


def test_the_command_adds_curves(place):
    profile, before = HeadProfile.load(place / "alone.safetensors"), HeadProfile.load(place / "p.safetensors")
    assert set(profile.curves) == {"known"} and profile.curves["known"].points == [4, 8, 16, 32, 64, 128, 256, 512, 520]
    assert torch.equal(profile.reasoning, before.reasoning) and torch.equal(profile.kept_shares, before.kept_shares)
    noted = json.loads(profile.metadata["curves"])["known"]
    assert (
        noted["answers"] == {"probe": 6} and noted["others_keep"] == "all" and noted["command"].startswith("headprof")
    )
    asked = ("generate", "--model", "tiny", "--profile", "alone.safetensors", "--prompt", "Who?", "--budget", "8")
    assert headprof(place, *asked, "--method", "headkv-curves").returncode == 0
    refused = headprof(place, *asked, "--method", "curves-kvzip")
    assert refused.returncode == 1 and "no influence curves for a question that is unknown" in refused.stderr


@pytest.mark.processes
def test_two_processes_measure_what_one_does(place):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "headprof",
    ]
    command = [*launcher, *RUN, "--add-to", "p.safetensors", "-o", "two.safetensors"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "two.safetensors"
    assert_same_curves(place / "two.safetensors", place / "alone.safetensors")


def test_around_an_operating_point_and_both_situations(place):
    options = ("--curve-probes", "1", "--curve-texts", "1", "--question", "both", "--others", "10%")
    done = headprof(place, *RUN, *options, "--add-to", "p.safetensors", "-o", "both.safetensors")
    assert done.returncode == 0, done.stderr
    profile = HeadProfile.load(place / "both.safetensors")
    assert set(profile.curves) == {"known", "unknown"}
    for noted in json.loads(profile.metadata["curves"]).values():
        assert noted["answers"] == {"probe": 1, "text": 1} and noted["loss_at_others"] > 0


def test_a_short_prompt_has_the_numbers_of_rows_below_its_length(place):
    options = ("--curve-length", "400", "--curve-probes", "1")
    done = headprof(place, *RUN, *options, "--add-to", "p.safetensors", "-o", "short.safetensors")
    assert done.returncode == 0, done.stderr
    points = HeadProfile.load(place / "short.safetensors").curves["known"].points
    assert points == [4, 8, 16, 32, 64, 128, 256, 400]


@pytest.mark.parametrize(
    "adding", [("score", "--curves", "--add-to"), ("score", "--reconstruction", "--add-to"), ("tune",)]
)
def test_what_is_no_profile_is_said_to_be_none(place, adding):
    shutil.copy(place / "tiny" / "model.safetensors", place / "weights.safetensors")
    refused = headprof(place, *adding, "weights.safetensors", "--model", "tiny")
    said = "weights.safetensors is a safetensors file but not a head profile: choose another."
    assert refused.returncode == 1 and said in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--question", "open"), "A question cannot be 'open': choose known, unknown or both."),
        (("--curve-probes", "0"), "give at least one probe or text"),
        (("--curve-length", "1k,2k"), "give --curve-length one number"),
        (("--curve-length", "4"), "has no rows to spare: give a longer --curve-length"),
        (("--others", "much"), "A budget of 'much' cannot be read"),
        (("--others", ">0.1"), "give --others tokens or a share"),
        (("--others", "2"), "Other heads cannot keep 2 where each keeps 3 tokens in any case: raise --others."),
        (("--probes", "9"), "With --add-to no probes are scored: leave --probes away."),
        (("--no-tune",), "With --add-to no probes are scored: leave --no-tune away."),
        (("--surrogate",), "leave --surrogate, or --add-to, away"),
    ],
)
def test_mistakes_are_sentences(place, options, said):
    refused = headprof(place, *RUN, "--add-to", "p.safetensors", *options)
    assert refused.returncode == 2 and said in " ".join(refused.stderr.split())
    alone = headprof(place, "score", "--model", "tiny", "--others", "64")
    assert alone.returncode == 2 and "add --curves, or leave them away" in " ".join(alone.stderr.split())
