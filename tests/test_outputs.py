"""What a command writes is nothing that it reads, and replaces no safetensors file of another kind."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import headprof
from support.profiles import random_profile
from support.tiny_models import CHAT_TEMPLATE, save_tiny, tiny_model

from headprof.errors import UsageError
from headprof.utils.files import PROBES_FORMAT, check_output

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 20
LOST = "is read by this command"
FOREIGN = "is a safetensors file of another kind"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a model, its profile, documents, and links to them."""
    save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "profiles").mkdir()
    random_profile(tiny_model()).save(tmp_path / "profiles" / "tiny.safetensors")
    (tmp_path / "in.txt").write_text(TEXT)
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "link.txt").symlink_to("in.txt")
    os.link(tmp_path / "in.txt", tmp_path / "hard.txt")
    (tmp_path / "weights.safetensors").symlink_to("tiny/model.safetensors")
    os.link(tmp_path / "profiles" / "tiny.safetensors", tmp_path / "hard.safetensors")
    (tmp_path / "heads.csv").write_text("layer,head,retrieval\n")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.png")
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "report.html").write_text(TEXT)
    (tmp_path / "data" / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return tmp_path


COMPRESS = ("compress", "-m", "tiny", "-f", "in.txt")
SCORE = ("score", "-m", "tiny", "--probes", "2", "--lengths", "1k", "--no-tune")
EVAL = ("eval", "-m", "tiny", "--methods", "snapkv", "--budgets", "16", "--tasks", "perplexity")
VALIDATE = ("validate", "-m", "tiny", "--probes", "2", "--per-head")
TEMPLATE = ("--chat-template", "chat.jinja")
BENCH = ("bench", "generate", "-m", "tiny", "--lengths", "64", "--methods", "snapkv")


@pytest.mark.parametrize(
    ("arguments", "target", "said"),
    [
        ((*COMPRESS, "-o", "in.txt"), "in.txt", LOST),
        ((*COMPRESS, "-o", "tiny/../in.txt"), "in.txt", LOST),
        ((*COMPRESS, "-o", "link.txt"), "in.txt", LOST),
        ((*COMPRESS, "-o", "hard.txt"), "in.txt", LOST),
        ((*COMPRESS, "-o", "tiny/model.safetensors"), "tiny/model.safetensors", LOST),
        ((*COMPRESS, "-o", "weights.safetensors"), "tiny/model.safetensors", LOST),
        ((*COMPRESS, "-o", "tiny/tokenizer.json"), "tiny/tokenizer.json", LOST),
        ((*COMPRESS, "-o", "profiles/tiny.safetensors"), "profiles/tiny.safetensors", LOST),
        ((*COMPRESS, "-o", "hard.safetensors"), "profiles/tiny.safetensors", LOST),
        ((*COMPRESS, "-o", "foreign.safetensors"), "foreign.safetensors", FOREIGN),
        ((*SCORE, "-o", "tiny/model.safetensors"), "tiny/model.safetensors", LOST),
        ((*SCORE, "-o", "foreign.safetensors"), "foreign.safetensors", FOREIGN),
        ((*SCORE, "--needles", "in.jsonl", "-o", "in.jsonl"), "in.jsonl", ""),
        (("heatmap", "-m", "tiny", "-o", "foreign.png"), "foreign.png", FOREIGN),
        ((*VALIDATE, "--csv", "profiles/tiny.safetensors"), "profiles/tiny.safetensors", LOST),
        ((*VALIDATE, "--csv", "tiny/config.json"), "tiny/config.json", LOST),
        ((*VALIDATE, "--csv", "a.png", "-o", "tiny/../a.png"), "in.txt", "are one file"),
        ((*BENCH, "-o", "tiny/config.json"), "tiny/config.json", LOST),
        ((*BENCH, "-o", "foreign.safetensors"), "foreign.safetensors", FOREIGN),
        (("bench", "score", "-m", "tiny", "-o", "tiny/config.json"), "tiny/config.json", LOST),
        ((*EVAL, "--data-dir", "data", "-o", "data"), "data/report.html", LOST),
        ((*COMPRESS, *TEMPLATE, "-o", "chat.jinja"), "chat.jinja", LOST),
        ((*SCORE, *TEMPLATE, "-o", "chat.jinja"), "chat.jinja", LOST),
        ((*VALIDATE, *TEMPLATE, "--csv", "data/../chat.jinja"), "chat.jinja", LOST),
        ((*BENCH, *TEMPLATE, "-o", "chat.jinja"), "chat.jinja", LOST),
        (("bench", "score", "-m", "tiny", *TEMPLATE, "-o", "chat.jinja"), "chat.jinja", LOST),
        ((*EVAL[:-1], "niah", "--chat-template", "data/report.html", "-o", "data"), "data/report.html", LOST),
        (("profile", "export", "profiles/tiny.safetensors", "hard.safetensors"), "profiles/tiny.safetensors", LOST),
        (("profile", "export", "profiles/tiny.safetensors", "foreign.safetensors"), "foreign.safetensors", FOREIGN),
        (("profile", "import", "heads.csv", "-m", "tiny", "-o", "tiny/model.safetensors"), "in.txt", LOST),
        (("profile", "import", "heads.csv", "-m", "tiny", "-o", "foreign.safetensors"), "in.txt", FOREIGN),
    ],
)
def test_an_output_never_replaces_an_input_or_a_file_of_another_kind(place, arguments, target, said):
    before = {file: file.read_bytes() for file in (place / target, place / "tiny" / "model.safetensors")}
    result = headprof(place, *arguments)
    assert result.returncode != 0 and result.stdout == ""
    assert said in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_what_a_command_wrote_before_is_written_again(place):
    for arguments in (
        (*COMPRESS, "--budget", "16"),
        ("heatmap", "-m", "tiny", "-o", "heads.svg"),
        ("profile", "export", "tiny", "out.safetensors"),
    ):
        for _ in range(2):
            result = headprof(place, *arguments)
            assert result.returncode == 0, result.stderr


def test_a_file_may_be_replaced_by_its_like_alone(tmp_path):
    probes, other = tmp_path / "a.probes.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(3)}, probes, metadata={"key": "{}", "names": "a"})
    save_file({"x": torch.zeros(3)}, other, metadata={"format": "headprof.profile"})
    check_output(probes, [other, tmp_path / "absent"], PROBES_FORMAT)
    check_output(other, [probes], "headprof.profile")
    check_output(tmp_path / "absent", [tmp_path / "absent"])
    for target, file_format in ((other, PROBES_FORMAT), (other, None), (other, "headprof.cache"), (probes, None)):
        with pytest.raises(UsageError, match="another kind"):
            check_output(target, [], file_format)


def test_an_evaluation_goes_on_in_its_folder_within_its_data(place):
    options = (
        *EVAL,
        "--data-dir",
        "data",
        "-o",
        "data/results",
        "--lengths",
        "128",
        "--continuation",
        "16",
        "--documents",
        "1",
    )
    assert headprof(place, *options).returncode == 0
    # Its own answers are no text of the user's, even where they would be read as one.
    assert LOST not in headprof(place, *options, "--resume").stderr
