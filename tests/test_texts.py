"""Texts from plain files, JSON lines and folders of both."""

import pytest
from support.json_lines import write_jsonl

from headprof.errors import UsageError
from headprof.evaluation.texts import Text, read_texts


def test_a_text_file_is_one_text(tmp_path):
    file = tmp_path / "story.txt"
    file.write_bytes(b"\xef\xbb\xbfOnce upon\na time, caf\xc3\xa9.\n")
    assert read_texts(file) == [Text("story.txt", "Once upon\na time, café.\n")]


def test_rows_have_their_text_in_context_or_text(tmp_path):
    rows = [
        {"_id": "a1", "context": "One.", "text": "no", "input": "?"},
        {"text": "Two."},
        {"text": "\n"},
        {"context": None, "text": "Three."},
    ]
    texts = read_texts(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert texts == [Text("rows.jsonl:a1", "One."), Text("rows.jsonl:2", "Two."), Text("rows.jsonl:4", "Three.")]


def test_a_line_separator_within_a_string_does_not_end_the_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"text": "one\u2028two\x85three"}\r\n\r\n{"text": "four"}'.encode())
    assert [text.text for text in read_texts(file)] == ["one\u2028two\x85three", "four"]


def test_half_a_character_becomes_a_question_mark(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(r'{"text": "half \ud83d, whole \ud83d\ude00"}')
    assert read_texts(file)[0].text == "half ?, whole \N{GRINNING FACE}"


def test_a_folder_is_read_by_name_with_what_is_below(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("second")
    write_jsonl(tmp_path / "a.jsonl", [{"context": "first", "_id": 7}])
    (tmp_path / "z.txt").write_text("third")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("no text of ours")
    texts = read_texts(tmp_path)
    assert [(text.name, text.text) for text in texts] == [
        ("a.jsonl:7", "first"),
        ("b/c.txt", "second"),
        ("z.txt", "third"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"no file or folder .*absent\.txt"),
        ("page.html", b"<p>", r"neither a \.txt nor a \.jsonl file"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(at byte 3"),
        ("blank.txt", b" \n", "no text but blanks"),
        ("blank.jsonl", b"", "no text but blanks"),
        ("bad.jsonl", b'{"text": "x"}\n\n{"text":\n', r"Line 3 of .*bad\.jsonl is not JSON"),
        ("other.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"Line 2 of .*other\.jsonl .*'context' or 'text'"),
        ("list.jsonl", b'["text"]', "Line 1 of .*'context' or 'text'"),
        ("number.jsonl", b'{"context": 3}', "Line 1 of .*'context' or 'text'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_texts(file)


def test_a_folder_without_texts_is_an_error(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match=r"holds no \.txt or \.jsonl file"):
        read_texts(tmp_path)
