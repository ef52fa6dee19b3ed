"""The command line as its users meet it: every command on a tiny model, and one sentence for every mistake.

Most commands run inside the test's process, since importing PyTorch and Transformers anew takes seconds. Processes of
their own are left to what only they can show, and to a comparison of both ways.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from support.commands import headprof, headprof_process
from support.list_options import commands
from support.tiny_models import save_tiny

from headprof.cli import app
from headprof.compression.methods.names import METHOD_NAMES
from headprof.compression.methods.table import METHODS
from headprof.profile.head_profile import HeadProfile

APP = typer.main.get_command(app)
NEEDLE = {
    "needle": "The key of the shed hangs behind the clock. The key of the barn lies under a stone.",
    "real_needle": "The key of the shed hangs behind the clock.",
    "answer": "The key of the shed hangs behind the clock.",
    "question": "Where is the key of the shed?",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models, documents and broken files, in which the commands run."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny", "llama", chat=True, layers=3)
    save_tiny(place / "other", "llama", chat=True, layers=2)
    (place / "document.txt").write_text("The lighthouse keeper counted nine grey boats before breakfast. " * 20)
    (place / "empty.txt").write_text("")
    (place / "binary.txt").write_bytes(b"\xff\xfe\x00\x80" * 10)
    (place / "truncated").mkdir()
    for file in (place / "tiny").iterdir():
        (place / "truncated" / file.name).write_bytes(file.read_bytes())
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (place / "no-config").mkdir()
    (place / "broken.gguf").write_bytes(b"not a gguf file")
    (place / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    save_file({"retrieval": torch.zeros(3, 4)}, place / "foreign.safetensors")
    (place / "haystack").mkdir()
    (place / "no-text").mkdir()
    (place / "blank").mkdir()
    (place / "blank" / "a.txt").write_text("\n")
    (place / "needles.jsonl").write_text(json.dumps(NEEDLE) + "\n")
    (place / "bad-json.jsonl").write_text(json.dumps(NEEDLE) + "\n{oops\n")
    (place / "no-question.jsonl").write_text(json.dumps({k: v for k, v in NEEDLE.items() if k != "question"}) + "\n")
    (place / "elsewhere.jsonl").write_text(json.dumps(NEEDLE | {"real_needle": "It is lost."}) + "\n")
    (place / "none.jsonl").write_text("")
    made = headprof(place, *SCORE, "-o", "tiny.safetensors")
    assert made.returncode == 0, made.stderr
    return place


# A random model answers nothing right, so failed probes count here.
ASKED = ("--probes", "12", "--lengths", "1k", "--pack", "4", "--include-failed")
SCORE = ("score", "--model", "tiny", *ASKED, "--no-tune")


GENERATE = ("generate", "--model", "tiny", "--profile", "tiny.safetensors", "--prompt", "Who counted?")

MISTAKES = {
    "file that is not there": (
        (*GENERATE, "--file", "absent.txt"),
        2,
        "There is no file absent.txt: check the path given with --file.",
    ),
    "empty file": ((*GENERATE, "--file", "empty.txt"), 2, "empty.txt is empty: give a file with text in it."),
    "binary file": (
        (*GENERATE, "--file", "binary.txt"),
        2,
        "binary.txt is not UTF-8 text (at byte 0, 0xff): convert it, such as with iconv -f UTF-16 -t UTF-8.",
    ),
    "folder as file": (
        (*GENERATE, "--file", "haystack"),
        2,
        "haystack cannot be read (Is a directory): check the path and its permissions.",
    ),
    "file without a question": (
        ("generate", "--model", "tiny", "--file", "document.txt"),
        2,
        'There is no question about document.txt: ask one with --prompt "...".',
    ),
    "empty prompt": (
        ("generate", "--model", "tiny", "--prompt", " "),
        2,
        'The prompt is empty: give one with --prompt "...".',
    ),
    "unknown method": (
        (*GENERATE, "--method", "magic"),
        2,
        r"There is no method 'magic': choose one of full, snapkv, headkv, headkv-r2[\w, -]*.",
    ),
    "budget that is no budget": (
        (*GENERATE, "--budget", "lots"),
        2,
        "A budget of 'lots' cannot be read: give tokens per KV head (64), a share of the prompt (1.5%) or bytes for "
        "the whole cache (512MB).",
    ),
    "setting that is no setting": (
        (*GENERATE, "--set", "power"),
        2,
        "A setting of 'power' cannot be read: write --set name=value, such as --set power=2.",
    ),
    "setting of the wrong kind": (
        (*GENERATE, "--set", "ramp=perhaps"),
        2,
        "The parameter 'ramp' cannot be 'perhaps': give true or false.",
    ),
    "setting given twice": (
        (*GENERATE, "--set", "power=2", "--set", "power=1"),
        2,
        "The parameter 'power' is given twice, as 'power=1' too: leave one of them away.",
    ),
    "setting beside its own option": (
        (*GENERATE, "--set", "keep_last=3", "--keep-last", "2"),
        2,
        "The parameter 'keep_last' is given by --set and by --keep-last: leave one of them away.",
    ),
    "nothing to compress": (
        ("compress", "--model", "tiny", "--file", "empty.txt"),
        2,
        "empty.txt is empty: give a file with text in it.",
    ),
    "compressing below what is always kept": (
        ("compress", "--model", "tiny", "--method", "snapkv", "--file", "document.txt", "--budget", "2"),
        2,
        r"A budget of 2 tokens is below the \d+ that every head keeps: raise --budget, or lower --keep-last.",
    ),
    "budget below what is always kept": (
        (*GENERATE, "--budget", "4", "--keep-last", "8"),
        2,
        r"A budget of 4 tokens is below the \d+ that every head keeps: raise --budget, or lower --keep-last.",
    ),
    "ratio beside a budget": (
        (*GENERATE, "--budget", "64", "--compression-ratio", "0.5"),
        2,
        "A compression ratio is a budget too: leave --compression-ratio or --budget away.",
    ),
    "ratio beside a budget of a document": (
        ("compress", "--model", "tiny", "--file", "document.txt", "-b", "256", "--compression-ratio", "0.5"),
        2,
        "A compression ratio is a budget too: leave --compression-ratio or --budget away.",
    ),
    "ratios beside budgets": (
        ("eval", "--model", "tiny", "--budgets", "8", "--compression-ratio", "0.5"),
        2,
        "A compression ratio is a budget too: leave --compression-ratio or --budgets away.",
    ),
    "ratio that leaves nothing": (
        (*GENERATE, "--compression-ratio", "1"),
        2,
        "A compression ratio of '1' is no share of the cache to remove: give 0 or more, but less than 1, such as 0.75.",
    ),
    "list of ratios with a gap": (
        ("eval", "--model", "tiny", "--compression-ratio", "0.5,,0.9"),
        2,
        "A compression ratio of '' is no share of the cache to remove: give 0 or more, but less than 1, such as 0.75.",
    ),
    "budget of a few bytes": (
        (*GENERATE, "--budget", "100B"),
        2,
        "A budget of 100 bytes is less than one token per head (768 bytes): raise --budget.",
    ),
    "parameter that the method lacks": (
        (*GENERATE, "--method", "snapkv", "--pool-factor", "2"),
        2,
        r"This method has no parameter 'pool_factor': choose among window, kernel, [^:]*, sinks, keep_last, [^:]*\.",
    ),
    "even kernel": (
        (*GENERATE, "--kernel", "4"),
        2,
        "A kernel of 4 has no middle: give an odd --kernel, such as 5.",
    ),
    "unknown pooling": ((*GENERATE, "--pooling", "median"), 2, "There is no pooling 'median': choose max or mean."),
    "prompt longer than the model's context": (
        (*GENERATE, "--file", "document.txt", "--max-new-tokens", "5000"),
        2,
        r"The prompt of \d+ tokens and 5000 new ones exceed the 4096 that tiny can read: shorten the document by \d+ "
        "tokens or lower --max-new-tokens.",
    ),
    "no profile for the model": (
        ("generate", "--model", "other", "--prompt", "Who?"),
        1,
        r"There is no head profile for other[^\n]*`headprof score --model other`[^\n]*",
    ),
    "profile that is not there": (
        ("generate", "--model", "tiny", "--profile", "absent.safetensors", "--prompt", "Who?"),
        1,
        r"[^\n]*absent.safetensors[^\n]*",
    ),
    "profile of another model": (
        ("generate", "--model", "other", "--profile", "tiny.safetensors", "--prompt", "Who?"),
        1,
        r"[^\n]*tiny.safetensors[^\n]*layers[^\n]*headprof score --model other[^\n]*",
    ),
    "damaged profile": (("heatmap", "broken.safetensors"), 1, r"[^\n]*broken.safetensors[^\n]*"),
    "tensors that are no profile": (("heatmap", "foreign.safetensors"), 1, r"[^\n]*foreign.safetensors[^\n]*"),
    "unknown picture format": (("heatmap", "tiny.safetensors", "-o", "heads.bmp"), 2, r"[^\n]*\.png[^\n]*\.svg[^\n]*"),
    "unknown score": (("heatmap", "tiny.safetensors", "--which", "luck"), 2, r"[^\n]*luck[^\n]*"),
    "model folder without a model": ((*SCORE[:2], "no-config", *SCORE[3:]), 1, r"[^\n]*no-config[^\n]*"),
    "model path that is not there": ((*SCORE[:2], "./absent", *SCORE[3:]), 1, r"[^\n]*absent[^\n]*"),
    "truncated weights": ((*SCORE[:2], "truncated", *SCORE[3:]), 1, r"[^\n]*truncated[^\n]*"),
    "broken gguf": ((*SCORE[:2], "broken.gguf", *SCORE[3:]), 1, r"[^\n]*broken.gguf[^\n]*"),
    "hub id without a network": (
        (*SCORE[:2], "meta-llama/Meta-Llama-3-8B-Instruct", *SCORE[3:]),
        1,
        r"[^\n]*meta-llama/Meta-Llama-3-8B-Instruct[^\n]*",
    ),
    "no such device": ((*SCORE, "--device", "tpu"), 2, r"Unknown device 'tpu'[^\n]*"),
    "no such dtype": ((*SCORE, "--dtype", "int3"), 2, r"Unknown dtype 'int3'[^\n]*"),
    "no such preset": (
        ("score", "--model", "tiny", "--preset", "huge"),
        2,
        "There is no preset 'huge': choose one of quick, standard, thorough.",
    ),
    "no such way to decode": (
        (*SCORE, "--decode", "beam"),
        2,
        "There is no way to decode called 'beam': choose teacher or greedy.",
    ),
    "length that is no length": (
        (*SCORE, "--lengths", "1k,many"),
        2,
        "A length of 'many' cannot be read: write token counts such as 512,1k,4k.",
    ),
    "length beyond the model's context": (
        (*SCORE, "--lengths", "100k"),
        2,
        "A length of 102400 tokens is more than the 4096 positions of the model; use at most 4096.",
    ),
    "length too short for the needles": ((*SCORE, "--lengths", "64"), 2, r"A length of 64 tokens is too short [^\n]*"),
    "needles that are not there": (
        (*SCORE, "--needles", "absent.jsonl"),
        2,
        "The needle file absent.jsonl does not exist; give a JSONL file with one needle a line.",
    ),
    "needles that are not JSON": (
        (*SCORE, "--needles", "bad-json.jsonl"),
        1,
        r"Line 2 of bad-json.jsonl is not JSON [^\n]*",
    ),
    "needle without a question": (
        (*SCORE, "--needles", "no-question.jsonl"),
        1,
        r"Line 1 of no-question.jsonl has no text in the field 'question'[^\n]*",
    ),
    "answer outside its needle": (
        (*SCORE, "--needles", "elsewhere.jsonl"),
        1,
        "Line 1 of elsewhere.jsonl has a real_needle that is not in its needle; copy it from the needle, word for "
        "word.",
    ),
    "empty needle file": (
        (*SCORE, "--needles", "none.jsonl"),
        1,
        "The needle file none.jsonl is empty; write one JSON object with a needle on each line.",
    ),
    "haystack that is not there": (
        (*SCORE, "--haystack", "absent"),
        2,
        "The haystack folder absent does not exist; give a folder that holds .txt files.",
    ),
    "haystack without text files": (
        (*SCORE, "--haystack", "no-text"),
        2,
        "The haystack folder no-text holds no .txt file; put the filler text there as .txt.",
    ),
    "empty haystack": ((*SCORE, "--haystack", "blank"), 1, r"The .txt files in blank hold 0 sentences [^\n]*"),
    "output that is a folder": ((*SCORE, "-o", "haystack"), 1, r"[^\n]*haystack[^\n]*"),
    "too few answered probes": (
        tuple(part for part in SCORE if part != "--include-failed"),
        1,
        r"The model answered \d of 6 retrieval probes, too few for a profile: try shorter --lengths, more --probes or "
        "easier needles, or count failed ones too with --resume --include-failed; --reconstruction --no-probes needs "
        "none.",
    ),
    "no such task": (
        ("eval", "--model", "tiny", "--tasks", "chess"),
        2,
        "There is no task 'chess': choose among niah, reasoning, nonliteral, multi, perplexity, longbench, babilong, "
        "loogle, ruler, ruler-generated.",
    ),
    "perplexity without texts": (
        ("eval", "--model", "tiny", "--tasks", "perplexity", "--methods", "full"),
        2,
        "Perplexity needs texts: give a .txt or .jsonl file, or a folder of them, with --data-dir.",
    ),
    "texts that are not there": (
        ("eval", "--model", "tiny", "--tasks", "perplexity", "--methods", "full", "--data-dir", "absent"),
        2,
        "There is no file or folder absent: give a .txt or .jsonl file, or a folder of them.",
    ),
    "texts too short": (
        ("eval", "--model", "tiny", "--tasks", "perplexity", "--methods", "full", "--data-dir", "document.txt"),
        2,
        r"No text has the 4096 tokens of prefix and continuation, the longest has \d+: lower one of them or give "
        "longer texts.",
    ),
    "nothing left to compress": (
        ("eval", "--model", "tiny", "--tasks", "perplexity", "--data-dir", "document.txt", "--lengths", "512"),
        2,
        "Of 512 tokens, 512 to be predicted leave none to compress: raise --lengths or lower --continuation.",
    ),
    "several lengths of texts": (
        ("eval", "--model", "tiny", "--tasks", "perplexity", "--data-dir", "document.txt", "--lengths", "1k,2k"),
        2,
        "Perplexity is taken of texts of one length: give a single number with --lengths.",
    ),
    "decode budget below what is kept": (
        (*GENERATE, "--method", "snapkv", "--decode-budget", "2"),
        2,
        "A budget of 2 tokens is below the 3 that every head keeps: raise --budget, or lower --keep-last.",
    ),
    "decode budget that is no budget": (
        (*GENERATE, "--decode-budget", "few"),
        2,
        "A budget of 'few' cannot be read: give tokens per KV head (64), a share of the prompt (1.5%) or bytes for "
        "the whole cache (512MB).",
    ),
    "threshold that is no cosine": (
        (*GENERATE, "--method", "ems", "--set", "threshold=2"),
        2,
        "A threshold of 2 is no cosine: give -1 to 1.",
    ),
    "scores that cannot be joined": (
        (*GENERATE, "--method", "ems:combine=median"),
        2,
        "Global and local scores cannot be joined by 'median': choose max, sum, product, global or local.",
    ),
    "prompts that are not there": (
        ("eval", "--model", "tiny", "--methods", "full", "--prompts", "absent.json"),
        2,
        "There is no file absent.json: give a JSON file {task: template} with --prompts.",
    ),
    "prompts cut to no length": (
        ("eval", "--model", "tiny", "--methods", "full", "--max-prompt", "long"),
        2,
        "A length of 'long' cannot be read: write token counts such as 512,1k,4k.",
    ),
    "no such family": (
        ("eval", "--model", "tiny", "--methods", "full", "--families", "chess", "-o", "new/results"),
        2,
        r"There is no needle family 'chess'; use some of [^\n]*",
    ),
}


def listing(place: Path) -> set[str]:
    return {str(file.relative_to(place)) for file in place.rglob("*") if "data-home" not in str(file)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(place, mistake):
    arguments, code, message = MISTAKES[mistake]
    before = listing(place)
    result = headprof(place, *arguments)
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    literal = not re.search(r"\\d|\[\^|\\w", message)
    assert re.fullmatch("Error: " + (re.escape(message) if literal else message), lines[-1]), result.stderr
    assert result.returncode == code
    assert result.stdout == ""
    left = {name for name in listing(place) - before if not name.endswith(".probes.safetensors")}
    assert left <= {"profiles"}, left


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        ("heatmap", "broken.safetensors"),
        (*GENERATE, "--budget", "100B"),
        ("profile", "show", "tiny.safetensors"),
    ],
)
def test_a_process_of_its_own_says_the_same(place, arguments):
    alone, here = headprof_process(place, *arguments), headprof(place, *arguments)
    assert (alone.returncode, alone.stdout, alone.stderr) == (here.returncode, here.stdout, here.stderr)
    assert len(alone.stderr.splitlines()) == (0 if alone.returncode == 0 else 1)


@pytest.mark.long
def test_generate_in_a_process_of_its_own(place):
    options = ("generate", "--model", "tiny", "--profile", "tiny.safetensors", "--budget", "12")
    alone, here = (
        run(place, *options, "--file", "document.txt", "--max-new-tokens", "12", stdin="How many boats?\n")
        for run in (headprof_process, headprof)
    )
    assert alone.returncode == here.returncode == 0
    assert alone.stdout == here.stdout and len(alone.stdout.strip()) > 0
    assert "headkv-r2, budget 12" in alone.stderr and "headkv-r2, budget 12" not in alone.stdout
    # The figures are times, but their rows and columns are the same.
    assert [line.split()[:2] for line in alone.stderr.splitlines()] == [
        line.split()[:2] for line in here.stderr.splitlines()
    ]


def test_debug_shows_the_traceback(place):
    result = headprof(place, "--debug", "heatmap", "broken.safetensors")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_usage_errors_exit_with_two(place):
    for arguments in (("score", "--no-such-option"), ("no-such-command",)):
        alone, here = headprof_process(place, *arguments), headprof(place, *arguments)
        assert alone.returncode == here.returncode == 2 and alone.stdout == here.stdout == ""


def test_help_is_quick_and_imports_no_torch(place):
    code = "import sys, headprof.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "heatmap" in headprof_process(place, "--help").stdout
    assert headprof_process(place, "--version").stdout.startswith("headprof ")


def test_options_of_one_name_have_the_default_of_their_command():
    found = {name: {each.name: each.default for each in command.params} for name, command in commands(APP)}
    assert [found[f"headprof {name}"]["budget"] for name in ("generate", "compress")] == ["64", "256"]
    seeds = {"score": 0, "generate": 0, "eval": 1000, "validate": 2000, "bench generate": 0, "bench score": 0}
    assert {name: found[f"headprof {name}"]["seed"] for name in seeds} == seeds
    assert [name for name in found if name.startswith("headprof bench ")] == [
        "headprof bench generate",
        "headprof bench score",
    ]


def test_the_light_names_are_those_of_the_table():
    assert tuple(METHODS) == METHOD_NAMES


def test_help_names_methods_of_other_packages_and_loads_none(place, tmp_path):
    (tmp_path / "more-1.0.dist-info").mkdir()
    (tmp_path / "more-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (tmp_path / "more-1.0.dist-info" / "entry_points.txt").write_text(
        "[headprof.methods]\nzeal = absent:ZEAL\nadept = absent:ADEPT\nems = absent:EMS\n"
    )
    script = "from headprof.compression.methods.names import method_names; print(*method_names())"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = {"cwd": place, "capture_output": True, "text": True, "check": True}
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    names = subprocess.run([sys.executable, "-c", script], env=environment, **options).stdout.split()
    assert names == [*METHOD_NAMES, "adept", "zeal"]
    shown = subprocess.run([sys.executable, "-m", "headprof", "generate", "--help"], env=environment, **options).stdout
    assert f"{METHOD_NAMES[-1]}, adept or zeal" in " ".join(shown.replace("│", " ").split())


def test_score_heatmap_generate_in_that_order(place):
    result = headprof(place, *SCORE)
    assert result.stdout.strip() == "profiles/tiny.safetensors"
    profile = HeadProfile.load(place / "profiles" / "tiny.safetensors")
    assert profile.retrieval.shape == (3, 4) and profile.probes_used == {"retrieval": 6, "reasoning": 6, "write": 12}
    assert json.loads(profile.metadata["settings"])["seed"] == 0
    assert profile.metadata["command"].startswith("headprof score --model tiny")
    picture = headprof(place, "heatmap", "--model", "tiny", "-o", "heads.svg")
    assert picture.stdout.strip() == "heads.svg" and (place / "heads.svg").read_text().startswith("<?xml")
    text = headprof(place, "generate", "--model", "tiny", "--budget", "12", "--max-new-tokens", "6", "--compare")
    assert text.returncode == 0, text.stderr
    assert "built-in question" in text.stderr and "headkv-r2, budget 12" in text.stderr and "full" in text.stderr
    assert text.stdout.endswith("\n")


def test_the_same_seed_gives_identical_tensors_and_another_does_not(place):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert headprof(place, *SCORE, "--seed", seed, "-o", f"{name}.safetensors").returncode == 0
    a, b, c = (HeadProfile.load(place / f"{name}.safetensors") for name in "abc")
    for which in ("retrieval", "reasoning"):
        assert torch.equal(a.scores[which], b.scores[which])
        assert torch.equal(a.standard_errors[which], b.standard_errors[which])
    assert not torch.equal(a.reasoning, c.reasoning)


def test_generate_writes_json_and_reads_standard_input(place):
    options = (
        "generate",
        "--model",
        "tiny",
        "--method",
        "snapkv",
        "--budget",
        "50%",
        "--max-new-tokens",
        "5",
        "--json",
    )
    result = headprof(place, *options, "--file", "document.txt", stdin="How many boats?\n")
    report = json.loads(result.stdout)
    (run,) = report["runs"].values()
    assert report["prompt"] == "How many boats?"
    assert run["new_tokens"] <= 5 and 0 < run["cache_bytes"] < report["full_cache_bytes"]


def test_generate_with_the_full_budget_says_what_the_full_cache_says(place):
    options = ("--model", "tiny", "--file", "document.txt", "--prompt", "How many?", "--max-new-tokens", "12")
    full = headprof(place, "generate", *options, "--method", "full")
    whole = headprof(place, "generate", *options, "--profile", "tiny.safetensors", "--budget", "100%")
    assert full.returncode == whole.returncode == 0
    assert full.stdout == whole.stdout


def test_sampling_is_seeded(place):
    options = ("generate", "--model", "tiny", "--method", "snapkv", "--prompt", "Who?", "--temperature", "1.5")
    one, same, other = (
        headprof(place, *options, "--max-new-tokens", "12", "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert one == same != other


def test_eval_without_knowing_the_question(place):
    options = ("eval", "--model", "tiny", "--methods", "full,snapkv", "--budgets", "8", "--probes", "2", "--json")
    sizes = {}
    for more in ((), ("--query-agnostic",), ("--query-agnostic", "--observe", "")):
        result = headprof(place, *options, *more)
        assert result.returncode == 0, result.stderr
        sizes[more] = json.loads(result.stdout)["cells"][0]["cache_bytes"]
    known, observed, alone = sizes.values()
    assert observed == alone < known


def test_compression_ratios(place):
    """They are shares of what is compressed, shown as they were given; a ratio of 0 keeps everything."""
    options = ("--model", "tiny", "--method", "snapkv", "--file", "document.txt", "--json")
    ask = ("generate", *options, "--prompt", "How many?", "--max-new-tokens", "8")
    runs = json.loads(headprof(place, *ask, "--compression-ratio", "0.0", "--compare").stdout)["runs"]
    assert runs["snapkv, ratio 0.0"]["text"] == runs["full"]["text"]
    sizes = {
        more: json.loads(headprof(place, "compress", *options, *more, "-o", "ratio.kv").stdout)["tokens_per_head"]
        for more in (("--compression-ratio", "0.75"), ("--budget", "25%"), ("--compression-ratio", "0"))
    }
    quarter, same, whole = sizes.values()
    assert quarter == same == pytest.approx(whole / 4, abs=0.5)
    options = ("eval", "--model", "tiny", "--methods", "snapkv", "--probes", "2", "--query-agnostic")
    ratios, shares = (
        json.loads(headprof(place, *options, *more, "--json").stdout)["cells"]
        for more in (("--compression-ratio", "0.5,0.90"), ("--budgets", "50%,10%"))
    )
    assert [cell["budget"] for cell in ratios[:3]] == ["", "ratio 0.5", "ratio 0.90"]
    assert [cell | {"budget": ""} for cell in ratios] == [cell | {"budget": ""} for cell in shares]
    table = headprof(place, *options, "--compression-ratio", "0.5,0.90").stdout
    assert "ratio 0.5" in table and "ratio 0.90" in table


def test_eval_prints_a_table_and_writes_every_answer(place):
    options = ("eval", "--model", "tiny", "--profile", "tiny.safetensors", "--budgets", "8,100%", "--probes", "4")
    result = headprof(place, *options, "--methods", "full,snapkv,headkv-r2", "-o", "results", "--json")
    found = json.loads(result.stdout)
    assert found == json.loads((place / "results" / "results.json").read_text())
    cells = found["cells"]
    assert [(cell["task"], cell["group"]) for cell in cells[::5]] == [
        (task, group) for task in ("niah", "reasoning", "probes") for group in ("512", "1k")
    ]
    assert [(cell["method"], cell["budget"]) for cell in cells[:5]] == [
        ("full", ""),
        ("snapkv", "8"),
        ("snapkv", "100%"),
        ("headkv-r2", "8"),
        ("headkv-r2", "100%"),
    ]
    lines = (place / "results" / "answers.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 5
    assert {"answers.jsonl", "cells.csv", "report.html", "scores.png", "depths.png", "divergence.png"} < {
        file.name for file in (place / "results").iterdir()
    }
    table = headprof(place, *options, "--methods", "full,snapkv")
    assert "95 % interval" in table.stdout and "snapkv" in table.stdout and "One prefill served 3" in table.stderr
    assert "probes, 512, 2 questions" in table.stdout and "probes by task: score at budget 100%" in table.stdout


def test_eval_of_perplexity(place):
    options = ("eval", "--model", "tiny", "--tasks", "perplexity", "--data-dir", "document.txt", "--documents", "1")
    options = (*options, "--lengths", "200", "--continuation", "40", "--budgets", "12,100%", "--buffer", "8")
    result = headprof(place, *options, "--methods", "full,ems,ems:mass=false", "-o", "texts", "--json")
    cells = json.loads(result.stdout)["perplexities"]
    assert [(cell["method"], cell["budget"]) for cell in cells] == [
        ("full", ""),
        ("ems", "12"),
        ("ems", "100%"),
        ("ems:mass=false", "12"),
        ("ems:mass=false", "100%"),
    ]
    full, small, whole, plain, _ = (cell["perplexity"] for cell in cells)
    assert full == pytest.approx(whole, rel=1e-5) and full != pytest.approx(small, rel=1e-3) and small != plain
    assert len((place / "texts" / "losses.csv").read_text().splitlines()) == 1 + 5
    both = headprof(
        place, *options[:3], "--tasks", "niah,perplexity", *options[5:], "--methods", "full", "--probes", "2"
    )
    assert both.returncode == 2 and "of one length" not in both.stderr  # probes of 200 tokens have no room
    table = headprof(place, *options, "--methods", "full,ems")
    assert "perplexity" in table.stdout and "of full" in table.stdout
    assert "left to ask" not in table.stderr


def test_a_saved_document_goes_on_being_compressed(place):
    made = headprof(
        place,
        *("compress", "--model", "tiny", "--file", "document.txt", "--method", "ems", "--budget", "24", "-o", "d.kv"),
        *("--buffer", "8", "--question", "How many?", "--max-new-tokens", "30"),
    )
    assert made.returncode == 0, made.stderr
    ask = (
        "generate",
        "--model",
        "tiny",
        "--cache",
        "d.kv",
        "--prompt",
        "How many?",
        "--max-new-tokens",
        "30",
        "--json",
    )
    runs = {}
    for more in ((), ("--buffer", "0")):
        (run,) = json.loads(headprof(place, *ask, *more).stdout)["runs"].values()
        runs[more] = run
    bounded, growing = runs.values()
    assert " ".join(bounded["text"].split()) == made.stdout.strip()
    assert bounded["cache_bytes"] < growing["cache_bytes"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--method", "snapkv"), "--method"),
        (("--method", "headkv-r2"), "--method"),  # the default, but given
        (("--budget", "64"), "--budget"),
        (("-b", "32"), "--budget"),
        (("--compression-ratio", "0.5"), "--compression-ratio"),
        (("--profile", "tiny.safetensors"), "--profile"),
        (("--window", "8"), "--window"),
        (("--keep-last", "4"), "--keep-last"),
        (("--kernel", "5"), "--kernel"),
        (("--pooling", "max"), "--pooling"),
        (("--pool-factor", "2"), "--pool-factor"),
        (("--set", "power=2"), "--set"),
        (("--set", "power=2", "--budget", "32", "--window", "8"), "--budget, --window and --set"),
    ],
)
def test_a_saved_document_is_not_compressed_in_another_way(place, given, named):
    ask = ("generate", "--model", "tiny", "--cache", "d.kv", "--prompt", "How many?")
    result = headprof(place, *ask, *given)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"Error: A compressed document already says how it was compressed: leave {named} away.\n"


def test_a_saved_document_is_continued_as_asked(place):
    made = headprof(
        place, *("compress", "--model", "tiny", "--file", "document.txt", "--method", "snapkv", "-o", "whole.kv")
    )
    assert made.returncode == 0, made.stderr
    ask = ("generate", "--model", "tiny", "--cache", "whole.kv", "--prompt", "How many?", "--json")
    options = ("--max-new-tokens", "20", "--decode-budget", "12", "--buffer", "4", "--backend", "torch")
    options = (*options, "--prefill-chunk", "16", "--temperature", "1.5", "--device", "cpu", "--dtype", "float32")
    runs = []
    for more in ((), (*options, "--seed", "1"), (*options, "--seed", "2")):
        result = headprof(place, *ask, *more)
        assert result.returncode == 0, result.stderr
        runs += json.loads(result.stdout)["runs"].values()
    plain, one, other = runs
    assert one["text"] != other["text"] and one["cache_bytes"] < plain["cache_bytes"] / 4


def test_needles_of_the_papers_format(place):
    (place / "haystack" / "a.txt").write_text("Rain fell on the roof all day. The river rose a little. " * 400)
    files = ("--needles", "needles.jsonl", "--haystack", "haystack", "-o", "p.safetensors")
    asked = ("--probes", "9", "--lengths", "512", "--include-failed", "--decode", "greedy", "--no-tune")
    result = headprof(place, "score", "--model", "tiny", *files, *asked)
    assert result.returncode == 0, result.stderr
    profile = HeadProfile.load(place / "p.safetensors")
    assert profile.probes_used["reasoning"] == 9 and list(profile.scores) == ["reasoning", "write"]


LONG = ("score", "--model", "tiny", "--probes", "60", "--pack", "1", "--include-failed", "--no-tune")


@pytest.fixture(scope="module")
def whole(place) -> HeadProfile:
    """What `LONG` gives when nothing interrupts it."""
    assert headprof(place, *LONG, "-o", "whole.safetensors").returncode == 0
    return HeadProfile.load(place / "whole.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_stood(place, whole, tmp_path, how):
    (tmp_path / "tiny").symlink_to(place / "tiny")
    running = subprocess.Popen(
        [sys.executable, "-m", "headprof", *LONG, "-o", "cut.safetensors"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HEADPROF_SAVE_EVERY": "0.2"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which jobs in the background ignore
    )
    kept = tmp_path / "cut.probes.safetensors"
    deadline = time.monotonic() + 100
    while not kept.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(how)
    _, errors = running.communicate(timeout=60)
    assert kept.exists() and not (tmp_path / "cut.safetensors").exists()
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert re.fullmatch(
            r"Error: Interrupted: the results of \d+ probes are kept in cut.probes.safetensors; give the same command "
            "with --resume to go on.",
            errors.strip().splitlines()[-1],
        )
    refused = headprof(tmp_path, *LONG, "-o", "cut.safetensors", "--resume", "--seed", "9")
    assert refused.returncode == 2 and "of another model or other settings" in refused.stderr
    assert headprof(tmp_path, *LONG, "-o", "cut.safetensors", "--resume").returncode == 0
    cut = HeadProfile.load(tmp_path / "cut.safetensors")
    for which in ("retrieval", "reasoning"):
        assert torch.equal(cut.scores[which], whole.scores[which])
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "cut.safetensors", kept.name}


def test_no_space_on_the_disk_leaves_nothing(place, tmp_path):
    # A limit on file size makes every longer write fail, as a full disk does.
    script = f"ulimit -f 1; exec {sys.executable} -m headprof heatmap {place / 'tiny.safetensors'} -o heads.png"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=plain, check=False
    )
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ") and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "x"),
        ("heatmap",),
        ("validate", "--probes", "4"),
        ("eval", "--methods", "headkv", "--probes", "4"),
        ("compress", "--file", "text.txt"),
    ],
)
def test_a_missing_profile_of_a_local_model_names_the_command_that_finds_the_model(tiny_folder, tmp_path, words):
    (tmp_path / "text.txt").write_text("The code is 42.")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "model").symlink_to(tiny_folder)
    for given in (str(tiny_folder), "my/model"):
        made = headprof(tmp_path, *words, "--model", given)
        assert made.returncode == 1
        assert made.stderr.strip().endswith(f"run `headprof score --model {given}`.")
