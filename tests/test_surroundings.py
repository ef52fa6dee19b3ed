"""What a command is run in and with: streams, signals, folders, numbers and names that nobody planned for."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from base64 import b64encode
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.commands import headprof
from support.list_options import commands
from support.profiles import make_profile, random_profile
from support.tiny_models import save_tiny, tiny_model

from headprof.cli import app
from headprof.errors import UsageError
from headprof.evaluation.results import results_csv
from headprof.plots.heads import heatmap
from headprof.plots.page import escape, with_policy
from headprof.utils.printable import printable
from headprof.utils.units import parse_lengths

LONG = "9" * 5000
HOSTILE = "org/\x1b]0;owned\x07M\x9b31model\x00\u202e\x7f"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and its profile, whose name in the file is hostile."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny", chat=True)
    (place / "profiles").mkdir()
    profile = replace(
        random_profile(tiny_model(), name="caf\u00e9"), metadata={"source": HOSTILE, "date": "2026-01-02"}
    )
    profile.save(place / "profiles" / "tiny.safetensors")
    return place


def in_process(place: Path, *arguments: str, before: str = "", **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own, after a line of Python."""
    code = f"import os, sys; {before or 'pass'}; from headprof.__main__ import run; run()"
    options = {"capture_output": True, "timeout": 120, "cwd": place} | options
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("env", {})
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, **options)


def listed_type(option) -> str:
    kind = getattr(getattr(option, "type_descriptor", None), "annotation", None)
    return getattr(kind, "__name__", str(kind))


SHOW = ("profile", "show", "tiny")


@given(st.text())
def test_what_is_shown_has_no_controls_and_is_valid_xml(text):
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", shown)
    assert printable(shown) == shown and len(shown) >= len(text)
    if all(letter.isprintable() or letter in "\n\t" for letter in text):
        assert shown == text


def test_controls_in_a_file_reach_no_terminal(place):
    for arguments in (
        SHOW,
        ("profile", "list"),
        (*SHOW, "tiny"),
        (*SHOW, "--json"),
        ("heatmap", "-m", "absent\x1b[2J"),
    ):
        result = headprof(place, *arguments)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.stdout + result.stderr), arguments
    assert r"\x1b]0;owned\x07" in headprof(place, *SHOW).stdout
    assert json.loads(headprof(place, *SHOW, "--json").stdout)


@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_controls_in_a_file_reach_no_picture(tmp_path, suffix):
    profile = replace(make_profile(name=HOSTILE), metadata={"date": HOSTILE})
    text = heatmap(profile, tmp_path / f"heads{suffix}").read_text("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    if suffix == ".svg":
        ElementTree.fromstring(text)


def test_pages_run_their_own_code_alone(tmp_path):
    text = heatmap(make_profile(), tmp_path / "heads.html").read_text("utf-8")
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert rules[rule] == f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'"
    assert " style=" not in text.split("<body>")[1].split("<script")[0] and " onclick=" not in text
    plain = with_policy('<meta charset="utf-8"><style>a</style>')
    assert "script-src 'none'" in plain
    assert escape("<b>\x1b") == r"&lt;b&gt;\x1b"


def test_json_is_json_whatever_stdout_can_show(place):
    result = in_process(place, *SHOW, "--json", env={"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})
    assert result.stdout.isascii() and json.loads(result.stdout)["model"] == "caf\u00e9"


@pytest.mark.long
def test_a_closed_or_full_stdout_is_said_in_one_sentence(place):
    closed = in_process(place, *SHOW, before="os.close(1); sys.stdout = None")
    assert (closed.returncode, closed.stderr.count(b"\n")) == (1, 1) and b"output is closed" in closed.stderr
    for arguments in (SHOW, (*SHOW, "--json"), ("profile", "list")):
        with Path("/dev/full").open("wb") as full:
            result = in_process(place, *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1 and result.stderr.count(b"\n") == 1, result.stderr
        assert b"cannot be written (No space left on device)" in result.stderr


def test_a_pipe_that_nobody_reads_ends_quietly(place):
    ends = os.pipe()
    os.close(ends[0])
    result = in_process(place, *SHOW, capture_output=False, stdout=ends[1], stderr=subprocess.PIPE)
    os.close(ends[1])
    assert result.returncode != 0 and result.stderr == b""


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ImportError"])
def test_an_interrupt_while_libraries_load_is_one_sentence(place, raised):
    # A library that meets the signal, and one that makes another error of it.
    finder = (
        "import signal; from importlib.abc import MetaPathFinder\n"
        "class Finder(MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'rich.console':\n"
        "            try: signal.raise_signal(signal.SIGINT)\n"
        f"            except KeyboardInterrupt: raise {raised}('no')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    code = f"import os, sys\n{finder}\nfrom headprof.__main__ import run; run()"
    result = subprocess.run(
        [sys.executable, "-c", code, "profile", "list"], capture_output=True, cwd=place, check=False
    )
    assert (result.returncode, result.stderr) == (130, b"Error: Interrupted.\n")


@pytest.mark.parametrize(
    "reading",
    [
        "def read(*rest): signal.raise_signal(signal.SIGINT)",
        # which Python has to ignore, so that it must come again
        "class Gone:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "def read(*rest): Gone(); time.sleep(5); return []",
    ],
)
def test_an_interrupt_while_arguments_are_read_is_one_sentence(place, reading):
    code = (
        "import signal, time, typer.core; from headprof.__main__ import run\n"
        f"{reading}\ntyper.core.TyperCommand.parse_args = read\nrun()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "profile", "list"], capture_output=True, cwd=place, check=False
    )
    assert (result.returncode, result.stderr) == (130, b"Error: Interrupted.\n")


def test_a_signal_at_any_moment_of_starting_is_one_sentence(place):
    for wait in (0.15, 0.5, 1.2):
        code = "from headprof.__main__ import run; run()"
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": place}
        process = subprocess.Popen([sys.executable, "-c", f"print(1, flush=True); {code}", *SHOW], **options)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        if b"site" not in said:  # Python itself was still starting
            assert b"Traceback" not in said or b"headprof" not in said, said


def test_a_working_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    result = in_process(gone, "profile", "list", before="os.rmdir(os.getcwd())")
    assert (result.returncode, result.stderr.count(b"\n")) == (2, 1) and b"working folder is gone" in result.stderr


def test_pictures_need_no_backend_and_paths_no_home(place):
    result = in_process(place, "heatmap", "-m", "tiny", "-o", "heads.png", env={"MPLBACKEND": "nonsense"})
    assert result.returncode == 0, result.stderr
    none = headprof(place, *SHOW[:2], "~nobody-of-that-name/x.safetensors")
    assert none.returncode == 2 and "no home folder" in none.stderr and none.stderr.count("\n") == 1


def test_every_number_has_bounds():
    options = [(name, each) for name, command in commands(typer.main.get_command(app)) for each in command.params]
    numbers = [(name, each) for name, each in options if re.match("int|float", listed_type(each))]
    assert len(numbers) > 40
    assert [f"{name} {each.name}" for name, each in numbers if each.max is None] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "x", "--seed", str(2**64)),
        ("generate", "--prompt", "x", "--temperature", "inf"),
        ("generate", "--prompt", "x", "--temperature", "nan"),
        ("generate", "--prompt", "x", "--temperature", "1e-320"),
        ("generate", "--prompt", "x", "--temperature", "1e-5"),
        ("generate", "--prompt", "x", "--set", "self=1"),
        ("generate", "--prompt", "x", "--keep-last", "100000000000000000000"),
        ("generate", "--prompt", "x", "--pool-factor", "nan"),
        ("generate", "--prompt", "x", "--budget", "9" * 400),
        ("generate", "--prompt", "x", "--budget", "9" * 400 + "GB"),
        ("generate", "--prompt", "x", "--set", "power=inf"),
        ("generate", "--prompt", "x", "--set", "window=" + "9" * 5000),
        ("score", "--probes", "2147483648"),
        ("score", "--lengths", "9" * 5000),
        ("score", "--tolerance", "nan", "--until-stable"),
    ],
)
def test_numbers_beyond_all_use_are_refused_at_once(place, arguments):
    result = headprof(place, *arguments, "-m", "tiny")
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "x", "--profile", LONG),
        ("generate", "--prompt", "x", "--chat-template", LONG),
        ("generate", "--prompt", "x", "--cache", LONG),
        ("generate", "--prompt", "x", "--backend", LONG),
        ("generate", "--prompt", "x", "--decode-budget", LONG),
        ("generate", "--prompt", "x", "--file", LONG),
        ("compress", "--file", LONG),
        ("heatmap", LONG),
        ("profile", "show", LONG),
        ("profile", "import", LONG),
        ("profile", "import", "--retrieval", LONG),
        ("profile", "export", "tiny", f"{LONG}.csv"),
        ("score", "--needles", LONG),
        ("score", "--haystack", LONG),
        ("validate", LONG),
        ("eval", "--tasks", "perplexity", "--data-dir", LONG),
        ("eval", "--profile", LONG),
        ("eval", "--prompts", LONG),
        ("bench", "generate", "--profile", LONG),
    ],
)
def test_a_text_that_is_too_long_for_a_name_is_one_sentence(place, arguments):
    result = headprof(place, *arguments, *(() if arguments[0] == "profile" else ("-m", "tiny")))
    assert result.returncode in (1, 2) and result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and len(result.stderr) < 1500


def test_a_link_to_itself_is_one_sentence(place):
    (place / "loop").symlink_to("loop")
    (place / "in.txt").write_text("The keeper counted boats.")
    for arguments in (
        ("compress", "-f", "in.txt", "-o", "loop"),
        ("compress", "-f", "loop"),
        ("generate", "-f", "in.txt", "--prompt", "x", "-p", "loop"),
        ("heatmap", "-o", "loop/heads.png"),
    ):
        result = headprof(place, *arguments, "-m", "tiny")
        assert result.returncode in (1, 2) and result.stdout == "", result.stderr
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr


def test_lengths_have_bounds():
    with pytest.raises(UsageError):
        parse_lengths("1k,10000000000")


def test_a_cell_of_a_table_is_no_formula():
    @dataclass
    class Row:
        text: str
        number: float

    texts = ["=1+1", "+a", "-b", "@c", "\t=x", "-1.5", "plain", "a=b"]
    rows = list(csv.DictReader(io.StringIO(results_csv([Row(text, -2.5) for text in texts]))))
    assert [row["text"] for row in rows] == ["'=1+1", "'+a", "'-b", "'@c", "'\t=x", "-1.5", "plain", "a=b"]
    assert {row["number"] for row in rows} == {"-2.5"}
