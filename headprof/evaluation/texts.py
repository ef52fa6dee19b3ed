"""Long texts to evaluate on, from the files a user has: plain text, or JSON lines as LongBench writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headprof.errors import UsageError
from headprof.utils.files import read_text, without_lone_surrogates

TEXT_FIELDS = ("context", "text")
"""Where a row of a `.jsonl` file may have its text; the first that is there counts."""


@dataclass(frozen=True)
class Text:
    """A text and what to call it: the name of its file, for a row followed by its `_id` or else its line."""

    name: str
    text: str


def read_texts(path: Path) -> list[Text]:
    """The texts of a `.txt` file, of a `.jsonl` file's rows, or of all such files in a folder and below, by name.

    Blank texts are left out.

    Raises:
        UsageError: there is no such file, none holds a text, or one is not UTF-8 or not such JSON; it names the line.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file()]
        named = sorted((file.relative_to(path).as_posix(), file) for file in files)
        if not named:
            raise UsageError(f"The folder {path} holds no .txt or .jsonl file: put the texts there, or give another.")
    elif not path.exists():
        raise UsageError(f"There is no file or folder {path}: give a .txt or .jsonl file, or a folder of them.")
    elif path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{path} is neither a .txt nor a .jsonl file: rename it by what it holds, or give another.")
    else:
        named = [(path.name, path)]
    texts = [text for name, file in named for text in _texts_of(name, file) if text.text.strip()]
    if not texts:
        raise UsageError(f"{path} holds no text but blanks: give a file or folder with text in it.")
    return texts


def _texts_of(name: str, file: Path) -> Iterator[Text]:
    content = read_text(file)
    if file.suffix == ".txt":
        yield Text(name, content)
        return
    # Not `splitlines`: JSON strings may hold other line separators, such as U+2028, as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            row = _row(line, f"Line {number} of {file}")
            text = next(row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str))
            yield Text(without_lone_surrogates(f"{name}:{row.get('_id', number)}"), without_lone_surrogates(text))


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where} is not JSON ({error.msg} at column {error.colno}): write one object a line."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UsageError(f"{where} cannot be read ({error}): write one object a line.") from None
    if not isinstance(row, dict) or not any(isinstance(row.get(field), str) for field in TEXT_FIELDS):
        raise UsageError(f"{where} has no text in a field {' or '.join(map(repr, TEXT_FIELDS))}: name its text so.")
    return row
