"""What every resumable run does: starting, going on, stopping, in one process and several; and the formats on disk."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from headprof.errors import HeadprofError, InterruptedRun, UsageError
from headprof.evaluation.journal import Journal
from headprof.evaluation.results import Answer
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import ProbeResult
from headprof.utils.resuming import KeptResults, first_difference
from headprof.utils.team import Team
from headprof.utils.tensor_files import CHECKSUM_NAMES

ANSWER = Answer("niah", "0", "1k", "full", "", 1.0, 0.0, 1.0, "", 9, 99)
PROBE = ProbeResult("retrieval", "code", True, torch.arange(8.0).view(2, 4))
KEY = {"version": "1", "settings": {"seed": 0}}
RUNS = {"answers": (Journal, {("niah", 0): [ANSWER]}), "probes": (ProbesFile, {3: [PROBE, PROBE]})}


class FirstOfTwo(Team):
    """Process 0 of two, as far as sharing goes; it keeps what the other one would get."""

    def __init__(self):
        super().__init__(0, 2)
        self.shared = []

    def share(self, value):
        self.shared.append(value)
        return value


@pytest.fixture(params=list(RUNS))
def run(request, tmp_path):
    """How to open the run on disk, and what it finds."""
    kind, found = RUNS[request.param]
    return lambda key=KEY: KeptResults(key, kind(tmp_path / "kept")), found


def ended(run, found):
    kept = run()
    kept.start(False, Team())
    with kept.keeping():
        kept.add(found)
    return kept


def test_a_run_goes_on_with_what_was_kept(run):
    open_run, found = run
    ended(open_run, found)
    again = open_run()
    again.start(True, Team())
    assert list(again.results) == list(found)
    with again.keeping():
        pass
    anew = open_run()
    anew.start(False, Team())
    assert anew.results == {}


def test_without_a_file_there_is_nothing_to_go_on_with(run):
    open_run, _ = run
    kept = open_run()
    assert kept.count_on_disk() == 0 and kept.starting_anew() == ""
    kept.start(True, Team())
    assert kept.results == {}
    assert KeptResults(KEY).starting_anew() == ""


def test_an_interrupt_says_how_much_is_kept(run, tmp_path):
    open_run, found = run
    kept = open_run()
    kept.start(False, Team())
    with pytest.raises(InterruptedRun, match=r"^Interrupted before anything was kept\.$"), kept.keeping():
        raise KeyboardInterrupt
    with pytest.raises(InterruptedRun) as caught, kept.keeping():
        kept.add(found)
        raise KeyboardInterrupt
    counted = "answers to 1 questions" if open_run().file.words.parts == "questions" else "results of 2 probes"
    assert str(caught.value) == (
        f"Interrupted: the {counted} are kept in {tmp_path / 'kept'}; give the same command with --resume to go on."
    )
    assert open_run().count_on_disk() == kept.file.count(found)
    with pytest.raises(InterruptedRun, match=r"^Interrupted before anything was kept\.$"), KeptResults(KEY).keeping():
        raise KeyboardInterrupt


def test_other_errors_pass_and_what_there_is_is_kept(run):
    open_run, found = run
    kept = open_run()
    kept.start(False, Team())
    with pytest.raises(ZeroDivisionError), kept.keeping():
        kept.add(found)
        raise ZeroDivisionError
    assert open_run().count_on_disk() == kept.file.count(found)


def test_two_runs_do_not_write_one_file(run, tmp_path):
    open_run, found = run
    first = open_run()
    first.start(False, Team())
    words = first.file.words
    for resume in (False, True):
        with pytest.raises(UsageError) as caught:
            open_run(KEY | {"version": "2"}).start(resume, Team())
        assert str(caught.value) == (
            f"Another run is writing its {words.results} to {tmp_path / 'kept'}: wait until it has ended, or choose "
            f"another {words.target} with -o."
        )
    with first.keeping():
        first.add(found)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    second = open_run()
    second.start(True, Team())
    assert list(second.results) == list(found)


def test_a_run_that_cannot_begin_holds_nothing(run):
    open_run, found = run
    ended(open_run, found)
    with pytest.raises(UsageError, match="other settings"):
        open_run(KEY | {"version": "2"}).start(True, Team())
    open_run().start(True, Team())


def test_a_killed_run_holds_nothing(run, tmp_path):
    open_run, found = run
    script = (
        "import os, signal, sys\n"
        "from headprof.utils.files import FileLock\n"
        "assert FileLock(sys.argv[1]).take()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "kept")], check=False)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / ".kept.lock").exists()
    assert list(ended(open_run, found).results) == list(found)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_starting_anew_is_remarked_on(run, tmp_path):
    open_run, found = run
    parts = ended(open_run, found).file.words.parts
    number = {"questions": 1, "probes": 2}[parts]
    assert open_run().starting_anew() == (
        f"Starting anew; with --resume, {number} {parts} would be taken from {tmp_path} as they are."
    )
    assert open_run(KEY | {"version": "2"}).starting_anew() == ""


def test_all_processes_hear_of_a_mistake(run):
    open_run, found = run
    ended(open_run, found)
    team, other = FirstOfTwo(), open_run(KEY | {"settings": {"seed": 7}})
    with pytest.raises(UsageError, match=r"are of another model or other settings \(seed\): give the same"):
        other.start(True, team)
    ((error, results),) = team.shared
    assert isinstance(error, UsageError) and results == {}


def test_all_processes_hear_of_a_disk_that_refuses(tmp_path):
    team = FirstOfTwo()
    with pytest.raises(HeadprofError, match="is a folder"):
        KeptResults(KEY, Journal(tmp_path)).start(False, team)
    assert isinstance(team.shared[0][0], HeadprofError)


@pytest.mark.parametrize(
    ("found", "wanted", "name"),
    [
        ({"model": "a", "dtype": "b"}, {"model": "a", "dtype": "c"}, "dtype"),
        ({"max_prompt": 1}, {}, "max prompt"),
        ({}, {"question_known": True}, "question known"),
        ({"settings": {"seed": 0, "lengths": [1]}}, {"settings": {"seed": 0, "lengths": [2]}}, "lengths"),
        ({"settings": 7}, {"settings": {"seed": 0}}, "settings"),
        ({"options": {"kernel": 7}}, {"options": {"kernel": 5}}, "options"),
        ({}, {}, ""),
    ],
)
def test_the_first_difference(found, wanted, name):
    assert first_difference(found, wanted) == name


def test_the_formats_on_disk(tmp_path):
    """Files of other versions of this package are read, and theirs read ours."""
    ended(lambda: KeptResults(KEY, Journal(tmp_path / "answers.jsonl")), RUNS["answers"][1])
    head, line = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert head == {"run": KEY}
    assert line == {"task": "niah", "number": 0, "data": "", "answers": [vars(ANSWER)]}
    ended(lambda: KeptResults(KEY, ProbesFile(tmp_path / "p.safetensors")), RUNS["probes"][1])
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name not in CHECKSUM_NAMES}
        assert metadata == {"key": '{"settings": {"seed": 0}, "version": "1"}', "names": "code\nretrieval"}
        tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    assert tensors == {
        "scores": [PROBE.scores.tolist()] * 2,
        "answered": [True, True],
        "context": [3, 3],
        "kind": [1, 1],
        "family": [0, 0],
    }
