"""Texts of users: one way to read them, and one to tell in time that they are too long."""

import io
import json
import time
from dataclasses import replace

import pytest
from support.commands import headprof
from support.tiny_models import load_tiny, save_tiny, tiny_tokenizer

from headprof.compression.encoding import prompt_ids, question_ids
from headprof.compression.generation import compress_document, generate_text
from headprof.compression.inputs import read_document, what_to_ask
from headprof.compression.prompts import Prompt
from headprof.compression.session import make_plan
from headprof.errors import ProbeError, UsageError
from headprof.evaluation.texts import read_texts
from headprof.models.text_encoder import TextEncoder
from headprof.probes.haystack import Haystack
from headprof.probes.needles import load_needles

NEEDLE = {
    "needle": "The shed is grey.\u2028Its key\u0085hangs behind the clock.",
    "real_needle": "hangs behind the clock",
    "answer": "behind the clock",
    "question": "Where is the key?",
}
TEXT = "A caf\u00e9 stands by the sea. " * 12


class Endless:
    """A stream of which all cannot be read."""

    buffer = property(lambda self: self)

    def isatty(self):
        return False

    def read(self, most=-1):
        assert 0 <= most < 10**9
        return b"a" * most


def test_a_stream_without_end_is_refused():
    with pytest.raises(UsageError, match="standard input has more than"):
        what_to_ask(None, None, Endless())


def readers(folder, content: bytes):
    """What each reader of files makes of these bytes."""
    for name in ("a.txt", "b.jsonl"):
        (folder / name).write_bytes(content)
    return {
        "document": lambda: read_document(folder / "a.txt"),
        "texts": lambda: read_texts(folder / "a.txt")[0].text.strip(),
        "haystack": lambda: " ".join(Haystack.from_folder(folder)._text),
        "needles": lambda: load_needles(folder / "b.jsonl")[0].text,
        "stdin": lambda: what_to_ask(None, None, io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))[1],
    }


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, mark):
    for name, read in readers(tmp_path, mark + TEXT.encode()).items():
        if name != "needles":
            assert " ".join(read().split()) == TEXT.strip(), name
    needle = json.dumps(NEEDLE, ensure_ascii=False).encode()
    assert readers(tmp_path, mark + needle)["needles"]() == NEEDLE["needle"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"A caf\xe9 by the sea", r"not UTF-8 text \(at byte 5, 0xe9\): .*iconv -f WINDOWS-1252 -t UTF-8"),
        ("A caf\u00e9".encode("utf-16"), r"not UTF-8 text \(at byte 0, 0xff\): .*iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_what_is_not_utf_8_is_said_with_the_byte_and_the_mend(tmp_path, content, said):
    for name, read in readers(tmp_path, content).items():
        with pytest.raises((UsageError, ProbeError), match=said):
            read()
            raise AssertionError(name)


def test_only_line_feeds_end_a_line_of_needles(tmp_path):
    lines = [NEEDLE, NEEDLE | {"answer": "behind"}]
    (tmp_path / "n.jsonl").write_text("\r\n".join(json.dumps(each, ensure_ascii=False) for each in lines))
    assert [needle.answer for needle in load_needles(tmp_path / "n.jsonl")] == ["behind the clock", "behind"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"needle": ' + "9" * 5000 + "}"])
def test_a_line_that_no_parser_takes_is_named(tmp_path, line):
    (tmp_path / "n.jsonl").write_text(line)
    with pytest.raises(ProbeError, match="Line 1 of"):
        load_needles(tmp_path / "n.jsonl")


def test_half_a_character_in_a_needle_is_refused(tmp_path):
    (tmp_path / "n.jsonl").write_text(json.dumps(NEEDLE | {"question": "Where \ud800?"}))
    with pytest.raises(ProbeError, match="no text that could be written in the field 'question'"):
        load_needles(tmp_path / "n.jsonl")


def test_a_device_is_no_text():
    from pathlib import Path

    with pytest.raises(UsageError, match="is a device"):
        read_document(Path("/dev/zero"))


def test_arguments_that_are_not_utf_8_are_refused_before_any_work(tmp_path):
    save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "a.txt").write_text(TEXT)
    name = b"b\xff".decode("utf-8", "surrogateescape")
    for arguments in (
        ("compress", "-m", "absent", "-f", "a.txt", "-o", name),
        ("compress", "-m", "absent", "-f", "a.txt", "-q", name),
        ("compress", "-m", "absent", "-f", name),
        ("generate", "-m", "absent", "--prompt", name),
        ("score", "-m", "absent", "-o", name),
    ):
        result = headprof(tmp_path, *arguments)
        assert result.returncode == 2 and result.stdout == ""
        assert "is not UTF-8 (at character 1)" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_text_that_is_far_too_long_is_refused_in_time():
    loaded = load_tiny()
    text = "x\u00e9" * 10_000_000
    begun = time.perf_counter()
    plan = make_plan(loaded.model, None, method="snapkv", budget=16)
    for read in (
        lambda: prompt_ids(loaded, text, "Who?", 10),
        lambda: prompt_ids(loaded, None, text, 10),
        lambda: compress_document(loaded, text, plan),
    ):
        with pytest.raises(UsageError, match="more tokens than the 4096 that tiny-llama can read"):
            read()
    assert time.perf_counter() - begun < 10


def test_a_text_that_may_fit_is_not_taken_for_too_long():
    texts = TextEncoder(tiny_tokenizer())
    text = "The lighthouse keeper counted nine grey boats before breakfast. " * 2000
    tokens = len(texts.ids(text))
    assert not texts.is_longer(text, tokens) and not texts.is_longer(text, int(0.95 * tokens))
    assert texts.is_longer(text, tokens // 2)


@pytest.mark.parametrize("budget", ["1.5%", "16", "50%"])
def test_times_are_taken_of_what_ran_before(budget):
    loaded = load_tiny()
    plan = make_plan(loaded.model, None, method="snapkv", budget=budget)
    prompt = Prompt(prompt_ids(loaded, TEXT * 6, "Who?", 8), "snapkv", plan)
    cold = generate_text(loaded, prompt.ids, plan, max_new_tokens=8)
    runs = []
    loaded.model.register_forward_hook(lambda module, given, made: runs.append(made.logits.shape[0]))
    prompt.warm_up(loaded, full=True, backend="auto", prefill_chunk=None)
    assert len(runs) == 6  # three tokens with either cache
    assert generate_text(loaded, prompt.ids, plan, max_new_tokens=8).text == cold.text
    cached = compress_document(loaded, TEXT, plan)
    held = replace(prompt, ids=question_ids(loaded, cached.get_seq_length(), "Who?", 8), plan=None, cache=cached)
    seen = cached.get_seq_length()
    held.warm_up(loaded, full=False, backend="auto", prefill_chunk=None)
    assert cached.get_seq_length() == seen
