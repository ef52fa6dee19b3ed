"""Processes that hold one model together: alone, and as groups that share the work."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import invoke
from support.forked import SILENT, processes
from support.profiles import random_profile
from support.tiny_models import save_tiny
from torch.distributed import HashStore, PrefixStore

from headprof.errors import UsageError
from headprof.models.loading import load_model
from headprof.profile.head_profile import HeadProfile
from headprof.tuning import judging, mixing, refining_known
from headprof.tuning.judging import TuneSettings
from headprof.tuning.refining_known import RefineSettings
from headprof.utils import in_step
from headprof.utils.in_step import InStep, StoreTeam, check_started, join_in_step
from headprof.utils.team import Team

# How work is divided, by threads that meet in a store


def in_groups(groups: int, size: int, work: Callable[[InStep], Any]) -> tuple[list[Any], HashStore]:
    """What each of `groups * size` threads makes of its place, in the order of ranks; and the store where they met."""
    store = HashStore()

    def member(rank: int) -> Any:
        number, place = divmod(rank, size)
        group = StoreTeam(place, size, PrefixStore(f"group {number}", store))
        return work(InStep(group, StoreTeam(number, groups, PrefixStore("groups", store))))

    with ThreadPoolExecutor(groups * size) as pool:
        return list(pool.map(member, range(groups * size))), store


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 7), max_size=6))
def test_each_item_goes_to_one_group(groups, size, items):
    def work(team: InStep) -> Any:
        twice = [list(team.claim(items)), list(team.claim(items[:2]))]
        return team.rank, team.size, team.ranks, twice

    found, _ = in_groups(groups, size, work)
    assert [each[:3] for each in found] == [(rank, groups, size) for rank in range(groups * size)]
    for first in range(0, len(found), size):
        assert all(found[first + place][3] == found[first][3] for place in range(size))
    for number, given_out in enumerate((items, items[:2])):
        assert sorted(item for each in found[::size] for item in each[3][number]) == sorted(given_out)


@pytest.mark.parametrize(("groups", "size"), [(1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("part_bytes", [7, 1 << 20])
def test_what_groups_find_is_told_to_all(groups, size, part_bytes, monkeypatch):
    monkeypatch.setattr(in_step, "PART_BYTES", part_bytes)

    def work(team: InStep) -> Any:
        found = [team.gather({"rank": team.rank, "round": number, "long": "x" * 20}) for number in range(3)]
        said = team.share(team.rank), team.share(None)
        team.leave()
        return found, said

    found, store = in_groups(groups, size, work)
    expected = [[{"rank": first * size, "round": at, "long": "x" * 20} for first in range(groups)] for at in range(3)]
    assert all(each == (expected, (0, None)) for each in found)
    rounds = {1 << 20: 1, 7: 40}[part_bytes] + 2  # parts of the longest, its name, and the word of leaving
    assert store.num_keys() <= groups * size * 2 * rounds, "what all have heard is forgotten"


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 2), (3, 1)])
def test_what_each_item_comes_to_is_known_to_all(groups, size):
    def work(team: InStep) -> Any:
        heard: list[tuple[int, int]] = []
        told = team.telling(lambda *now: heard.append(now), 4)
        return team.each("abcd", lambda item: told(item * 2)), heard, team.rank

    found, _ = in_groups(groups, size, work)
    for each, heard, rank in found:
        assert each == ["aa", "bb", "cc", "dd"]
        assert heard == sorted(heard) and all(done <= total == 4 for done, total in heard)
        assert rank == 0 or not heard
    assert groups > 1 or found[0][1] == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_first_group_goes_on_when_the_others_are_dismissed(groups):
    def work(team: InStep) -> Any:
        stays = team.dismiss()
        alone = stays and [team.size, list(team.claim("abc")), team.gather(team.rank), team.share(team.rank)]
        if stays:
            team.leave()
        return alone

    found, _ = in_groups(groups, 2, work)
    assert found[:2] == [[1, ["a", "b", "c"], [0], 0]] * 2 and found[2:] == [False] * (2 * groups - 2)


def test_one_process_alone_stays():
    team = Team()
    assert team.dismiss() and team.gather("mine") == ["mine"]
    team.leave()


def test_those_of_one_group_share_no_work():
    team = InStep(Team())
    assert (team.rank, team.size, team.ranks) == (0, 1, 1)
    assert list(team.claim([1, 2])) == [1, 2] and team.gather("mine") == ["mine"] and team.share(3) == 3
    team.leave()


# How many processes there have to be


@pytest.mark.parametrize(("started", "sharing"), [("2", False), ("2", True), ("4", True), ("6", True)])
def test_numbers_of_processes_that_hold_models_of_two(started, sharing):
    check_started(started, 2, sharing=sharing)


@pytest.mark.parametrize(
    ("started", "sharing", "said"),
    [
        ("1", False, "here is 1: start them with `torchrun --nproc-per-node 2 -m headprof"),
        ("4", False, "here are 4: start them with"),
        ("3", True, "here are 3: start 2, or a multiple of that, with `torchrun --nproc-per-node 2"),
        ("1", True, "here is 1: start 2, or a multiple of that"),
        ("0", True, "here are 0"),
        ("x", True, "here are x"),
    ],
)
def test_other_numbers_of_processes(started, sharing, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(UsageError, match=said):
        join_in_step(2, sharing=sharing)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *((command, "or a multiple of that") for command in ("score", "eval", "validate", "tune")),
        *((command, "start them") for command in ("generate", "compress --file a.txt")),
    ],
)
def test_commands_say_how_many_processes_they_take(command, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    ended = invoke(*command.split(), "--tp", "2")
    assert ended.exit_code == 2 and "held by 2 processes, and here are 3" in ended.stderr and said in ended.stderr


def test_there_is_a_gpu_for_each_process_of_a_machine(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="Each of the 4 processes here needs a GPU, and here are 2: start fewer"):
        join_in_step(2, sharing=True)


# Whole runs of two groups of two processes

SCORE = ["score", "--model", "tiny", "--include-failed", "--lengths", "450", "--pack", "2", "--no-tune"]
EVAL = ["eval", "--model", "tiny", "--methods", "snapkv,tova", "--budgets", "8", "--lengths", "300", "--probes", "6"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    save_tiny(folder / "tiny", "llama", chat=True, num_heads=4, num_kv_heads=2, layers=2)
    return folder


@pytest.fixture
def place(model_folder, monkeypatch):
    """The folder that commands run in, on one thread each; pictures are not drawn."""
    monkeypatch.setattr("headprof.plots.results_folder.drawings", lambda found: {})
    monkeypatch.setattr("headprof.plots.results_folder.write_report", lambda found, path: path)
    monkeypatch.setattr("headprof.cli.terminal._PATIENCE", 0.0)
    monkeypatch.chdir(model_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield model_folder
    torch.set_num_threads(threads)


def answers_in(file: Path) -> tuple[list[dict[str, str]], list[float]]:
    """A run's answers, and apart from them how far each is from the full cache's, which is subject to rounding."""
    with file.open(newline="") as lines:
        answers = list(csv.DictReader(lines))
    return answers, [float(each.pop("divergence")) for each in answers]


@pytest.mark.processes
def test_two_groups_make_the_profile_of_one_process(place):
    assert invoke(*SCORE, "--probes", "12", "-o", "alone.safetensors").exit_code == 0
    assert invoke(*SCORE, "--probes", "6", "-o", "groups.safetensors").exit_code == 0
    first, *others = processes(4, *SCORE, "--probes", "12", "--resume", "--tp", "2", "-o", "groups.safetensors")
    assert (first.exit_code, first.stdout) == (0, "groups.safetensors\n") and others == [SILENT] * 3
    one, other = (HeadProfile.load(place / f"{name}.safetensors") for name in ("alone", "groups"))
    assert one.scores.keys() == other.scores.keys() and one.probes_used == other.probes_used
    for kind in one.scores:
        torch.testing.assert_close(one.scores[kind], other.scores[kind], rtol=1e-4, atol=1e-5)
    assert {**one.metadata, "command": ""} == {**other.metadata, "command": ""}


@pytest.mark.processes
def test_two_groups_answer_as_one_process(place):
    assert invoke(*EVAL, "-o", "one").exit_code == 0
    first, *others = processes(4, *EVAL, "--tp", "2", "-o", "groups")
    assert first.exit_code == 0 and "tova" in first.stdout and others == [SILENT] * 3
    assert "6 prompts were read" in first.stderr
    (alone, lost_alone), (found, lost) = (answers_in(place / folder / "answers.csv") for folder in ("one", "groups"))
    assert found == alone and len(alone) == 6 * 3
    assert lost == pytest.approx(lost_alone, abs=1e-5) and max(lost) > 0.1
    for ended in processes(4, *EVAL, "--seed", "7", "--resume", "--tp", "2", "-o", "groups"):
        assert (ended.exit_code, ended.stdout) == (2, "") and "other settings (seed)" in ended.stderr


@pytest.mark.processes
def test_two_groups_judge_a_profile_as_one_process(place, monkeypatch):
    monkeypatch.setattr("headprof.validation.causal_check.MIN_RIGHT", 0)
    monkeypatch.setattr(
        "headprof.plots.validation.validation_plot", lambda result, file, compared: file.write_text("x")
    )
    loaded = load_model("tiny", device="cpu")
    random_profile(loaded.model, name="tiny").save(place / "p.safetensors")
    command = ["validate", "p.safetensors", "--model", "tiny", "--probes", "8", "--length", "450", "--pack", "2"]
    command += ["--top", "2", "--draws", "1", "--per-head", "--json", "-o"]
    alone = invoke(*command, "alone.png")
    for count, more in ((4, ["--tp", "2"]), (2, [])):
        first, *others = processes(count, *command, f"{count}.png", *more)
        assert (
            alone.exit_code in (0, 1) and first.exit_code == alone.exit_code and (place / f"{count}.png").is_file()
        ), first.stderr
        assert others == [SILENT] * (count - 1)
        found, expected = json.loads(first.stdout), json.loads(alone.stdout)
        assert found.keys() == expected.keys()
        for kind, drops in expected["per_head"]["drops"].items():
            assert torch.tensor(drops).abs().max() > 1e-3
            torch.testing.assert_close(found["per_head"]["drops"][kind], drops, rtol=1e-3, atol=1e-4)


# What a profile learns beside scores

SCORE_ALL = [word for word in SCORE if word != "--no-tune"] + ["--probes", "12", "--no-refine"]
SCORE_ALL += ["--curves", "--question", "known", "--curve-probes", "4", "--curve-length", "300", "--others", "64"]
SCORE_ALL += ["--reconstruction", "--texts", "2", "--text-lengths", "64,96"]


@pytest.fixture
def little_work(monkeypatch):
    """Few parameters and mixes are tried, on few and short probes."""
    monkeypatch.setattr(judging, "JUDGES", ({"window": 1, "kernel": 1}, {"shared": True}))
    short = partial(TuneSettings, budgets=(16,), length=320, rounds=((2, 1),))
    monkeypatch.setattr(judging, "TuneSettings", short)
    monkeypatch.setattr(refining_known, "RefineSettings", partial(RefineSettings, probes=1, checks=1, steps=(0.5,)))
    monkeypatch.setattr(mixing, "PROBES", 2)
    monkeypatch.setattr(mixing, "LENGTH", 320)


@pytest.mark.processes
def test_groups_learn_what_one_process_learns(place, little_work):
    alone = invoke(*SCORE_ALL, "-o", "learned-alone.safetensors")
    assert alone.exit_code == 0, alone.output
    first, *others = processes(4, *SCORE_ALL, "--tp", "2", "-o", "learned.safetensors")
    assert (first.exit_code, first.stdout) == (0, "learned.safetensors\n"), first.stderr
    assert others == [SILENT] * 3
    assert "Budgets are not refined for tiny. Gradients are taken where one process holds the model" in first.stderr
    one, other = (HeadProfile.load(place / f"{name}.safetensors") for name in ("learned-alone", "learned"))
    assert one.scores.keys() == other.scores.keys() and "reconstruction" in one.scores
    for kind in one.scores:
        torch.testing.assert_close(one.scores[kind], other.scores[kind], rtol=1e-4, atol=1e-5)
    assert one.kept_shares is not None and other.kept_shares is not None
    torch.testing.assert_close(one.kept_shares, other.kept_shares, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.curves["known"].losses, other.curves["known"].losses, rtol=1e-3, atol=1e-5)
    assert one.curves["known"].losses.abs().max() > 1e-3
    assert one.tuned == other.tuned
    assert one.refined_rows is not None and other.refined_rows is None
