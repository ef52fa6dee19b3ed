"""Runs that are killed, and runs that several processes share: the same profile as one process that is left alone."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.profiles import random_profile
from support.tiny_models import save_tiny, tiny_model

from headprof.errors import UsageError
from headprof.profile.head_profile import HeadProfile
from headprof.utils.team import Team, claim_gpus

RUN = ["score", "--model", "tiny", "--include-failed", "--lengths", "700,500", "--pack", "2", "--no-tune"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, and the profile that one process makes of it."""
    place = tmp_path_factory.mktemp("team")
    save_tiny(place / "tiny", "llama", chat=True, layers=3)
    run(place, [sys.executable, "-m", "headprof", *RUN, "--probes", "90", "-o", "alone.safetensors"])
    return place


def environment(**others: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HEADPROF_SAVE_EVERY": "0.05"} | others


def run(place: Path, command: list[str], **others: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=place, env=environment(**others), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def assert_same_file(one: Path, other: Path) -> None:
    """Equal but for the command in the metadata, which names the output."""
    a, b = HeadProfile.load(one), HeadProfile.load(other)
    for kind in ("retrieval", "reasoning"):
        assert torch.equal(a.scores[kind], b.scores[kind])
        assert torch.equal(a.standard_errors[kind], b.standard_errors[kind])
        assert all(map(torch.equal, a.intervals[kind], b.intervals[kind]))
    assert a.probes_used == b.probes_used
    assert {**a.metadata, "command": ""} == {**b.metadata, "command": ""}


@pytest.mark.processes
def test_two_processes_make_the_profile_of_one(place):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run(place, [*launcher, "-m", "headprof", *RUN, "--probes", "90", "-o", "two.safetensors"])
    assert_same_file(place / "two.safetensors", place / "alone.safetensors")
    assert done.stdout.strip() == "two.safetensors"  # said once
    assert sorted(path.name for path in place.glob("*two*")) == ["two.probes.safetensors", "two.safetensors"]


@pytest.mark.processes
def test_of_two_processes_one_adds_learned_budgets(place):
    replace(random_profile(tiny_model(layers=3)), kept_shares=None, model_name="tiny").save(place / "add.safetensors")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    learning = [
        "--reconstruction",
        "--no-refine",
        "--add-to",
        "add.safetensors",
        "--texts",
        "2",
        "--text-lengths",
        "128",
    ]
    done = run(place, [*launcher, "-m", "headprof", "score", "--model", "tiny", *learning])
    assert done.stdout.strip() == "add.safetensors"  # said once
    assert HeadProfile.load(place / "add.safetensors").kept_shares is not None


@pytest.mark.processes
def test_two_processes_go_on_where_one_was_interrupted_and_stop_at_the_same_probe(place):
    stable = ["--until-stable", "--tolerance", "0.5", "--probes", "400"]
    run(place, [sys.executable, "-m", "headprof", *RUN, *stable, "-o", "stable.safetensors"])
    alone = HeadProfile.load(place / "stable.safetensors")
    assert alone.settings["until_stable"]["stable"] and alone.settings["asked"] < 400
    run(place, [sys.executable, "-m", "headprof", *RUN, "--probes", "20", "-o", "shared.safetensors"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run(place, [*launcher, "-m", "headprof", *RUN, *stable, "--resume", "-o", "shared.safetensors"])
    assert_same_file(place / "shared.safetensors", place / "stable.safetensors")


@pytest.mark.processes
def test_a_mistake_stops_all_processes_with_the_sentence(place):
    run(place, [sys.executable, "-m", "headprof", *RUN, "--probes", "8", "-o", "other.safetensors"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "headprof", *RUN, "--seed", "5", "--resume", "-o", "other.safetensors"]
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode != 0 and "other settings" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("seed", range(int(os.environ.get("HEADPROF_KILLED_RUNS", "1"))))
def test_a_run_that_is_killed_again_and_again_ends_the_same(place, seed):
    """SIGKILL at random moments; `make test-kill` does it more often."""
    rng, target = random.Random(seed), place / f"killed-{seed}.safetensors"
    command = [sys.executable, "-m", "headprof", *RUN, "--probes", "90", "--resume", "-o", target.name]
    killed = 0
    while killed < 3:
        process = subprocess.Popen(command, cwd=place, env=environment(), stderr=subprocess.DEVNULL)
        results = target.with_name(f"killed-{seed}.probes.safetensors")
        deadline = time.monotonic() + 60
        while killed == 0 and not results.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # the first one is let live until there is something to lose
        time.sleep(rng.uniform(0, 1.5 if killed == 0 else 6))
        process.kill()
        process.wait()
        killed += 1
    assert results.exists()
    run(place, command)
    assert_same_file(target, place / "alone.safetensors")
    assert not list(place.glob(".*partial"))


@pytest.mark.parametrize("size", ["2", "x", ""])
def test_an_environment_that_no_launcher_made(size, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match="start with torchrun, or unset WORLD_SIZE"):
        Team.join()


def test_a_team_of_one_does_everything_itself():
    team = Team.join()
    assert (team.rank, team.size) == (0, 1)
    assert list(team.claim([3, 4])) == [3, 4] and team.gather("mine") == ["mine"] and team.share(7) == 7
    team.leave()


@pytest.mark.parametrize(
    ("local", "num_gpus", "expected"),
    [
        ({}, 8, None),
        ({"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 8, None),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0, None),
        ({"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}, 8, "5"),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 8, "4,5,6,7"),
        ({"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"}, 8, "4,5"),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 2, "1"),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "6,7"}, 2, "7"),
    ],
)
def test_gpus_are_shared_out(local, num_gpus, expected):
    assert claim_gpus(local, num_gpus) == expected
