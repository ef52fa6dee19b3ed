"""Head scores in other people's formats: the JSON that the HeadKV and retrieval-head papers publish, and CSV."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.files import atomic_write
from headprof.profile import KINDS, HeadProfile

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.shape import HeadShape

_LARGEST = 3.4e38  # of a float32; also keeps out infinity and, since it compares false, NaN
_HEAD_KEY = re.compile(r"(\d{1,5})-(\d{1,5})")
_CSV_COLUMNS = ["layer", "head", *(column for kind in KINDS for column in (kind, f"{kind}_se"))]


def read_papers_json(path: str | Path) -> Tensor:
    """Head scores float32 `[L, H]` of a papers' file `{"layer-head": [score per probe, ...]}`: the mean of each list.

    Raises:
        ProfileError: the file is missing or malformed, a head is missing, or the lists differ in length.
    """
    return read_papers_samples(path).mean(dim=-1).float()


def read_papers_samples(path: str | Path) -> Tensor:
    """Every probe's score of a papers' file, float64 `[L, H, N]`; raises `ProfileError` like `read_papers_json`."""
    import torch

    path = Path(path)
    try:
        table = json.loads(_read_text(path))
    except ValueError as error:
        raise ProfileError(f"{path} is not valid JSON ({error}): export it again.") from error
    if not isinstance(table, dict) or not table:
        raise ProfileError(f'{path} holds no head scores: give a JSON object such as {{"0-0": [0.1], ...}}.')
    samples = {_parse_head_key(path, key): _parse_samples(path, key, values) for key, values in table.items()}
    num_layers, num_heads = _grid_size(path, samples)
    lengths = {head: len(values) for head, values in samples.items()}
    for (layer, head), length in lengths.items():
        if length != lengths[0, 0]:
            raise ProfileError(
                f"{path} has {length} scores for head {layer}-{head} where head 0-0 has {lengths[0, 0]}: "
                "give every head one score per probe."
            )
    rows = [[samples[layer, head] for head in range(num_heads)] for layer in range(num_layers)]
    return torch.tensor(rows, dtype=torch.float64)


def write_papers_json(path: str | Path, scores: Tensor) -> None:
    """Write scores `[L, H]` atomically as one line of the papers' JSON, each head a list of one score."""
    num_layers, num_heads = scores.shape
    rows = _short_floats(scores)
    table = {f"{i}-{j}": [float(rows[i][j])] for i in range(num_layers) for j in range(num_heads)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table), encoding="utf-8")


def import_papers_json(paths: Mapping[str, Path], model_name: str, shape: HeadShape) -> HeadProfile:
    """Make a profile of papers' files, one per kind (`{"retrieval": path, "reasoning": path}`, either may be absent).

    Standard errors come from the spread over the probes; they stay unknown where a file holds one score a head.

    Raises:
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    samples = {kind: read_papers_samples(path) for kind, path in paths.items()}
    for kind, path in paths.items():
        _check_grid(path, samples[kind].shape[:2], shape)
    return HeadProfile(
        model_name=model_name,
        shape=shape,
        scores={kind: values.mean(dim=-1).float() for kind, values in samples.items()},
        standard_errors={
            kind: (values.std(dim=-1) / math.sqrt(values.shape[-1])).float()
            for kind, values in samples.items()
            if values.shape[-1] > 1
        },
        probes_used={kind: values.shape[-1] for kind, values in samples.items() if values.shape[-1] > 1},
        metadata={"imported_from": ", ".join(Path(path).name for path in paths.values())},
    )


def read_csv(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and standard errors by kind, float32 `[L, H]` each, of a CSV that `write_csv` wrote.

    Columns may stand in any order and those of an unknown kind or error may be absent or empty.

    Raises:
        ProfileError: the file is missing or malformed, a head is missing, or a column is filled in part.
    """
    import torch

    path = Path(path)
    rows = list(csv.DictReader(_read_text(path).splitlines()))
    columns = rows[0].keys() if rows else ()
    if "layer" not in columns or "head" not in columns or not set(KINDS).intersection(columns):
        raise ProfileError(f"{path} is not a table of head scores: give it the columns {', '.join(_CSV_COLUMNS)}.")
    by_head = {_parse_head_key(path, f"{row['layer']}-{row['head']}"): row for row in rows}
    if len(by_head) < len(rows):
        raise ProfileError(f"{path} lists a head twice: give every head one row.")
    num_layers, num_heads = _grid_size(path, by_head)
    heads = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    tables: dict[str, Tensor] = {}
    for name in _CSV_COLUMNS[2:]:
        cells = [(by_head[head].get(name) or "").strip() for head in heads]
        if any(cells):
            values = [_parse_cell(path, name, head, cell) for head, cell in zip(heads, cells, strict=True)]
            tables[name] = torch.tensor(values, dtype=torch.float64).float().view(num_layers, num_heads)
    if not set(KINDS).intersection(tables):
        raise ProfileError(f"{path} holds no scores: fill its column retrieval or reasoning.")
    errors = {kind: tables[f"{kind}_se"] for kind in KINDS if f"{kind}_se" in tables and kind in tables}
    return {kind: tables[kind] for kind in KINDS if kind in tables}, errors


def write_csv(path: str | Path, profile: HeadProfile) -> None:
    """Write a profile atomically as CSV, a row a head: layer, head, then score and standard error of each kind.

    Numbers read back to the same float32; a kind or an error that the profile lacks is an empty column.
    """
    tables = {kind: _short_floats(scores) for kind, scores in profile.scores.items()}
    tables |= {f"{kind}_se": _short_floats(errors) for kind, errors in profile.standard_errors.items()}
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for layer in range(profile.shape.num_layers):
            for head in range(profile.shape.num_heads):
                cells = (tables[name][layer][head] if name in tables else "" for name in _CSV_COLUMNS[2:])
                writer.writerow([layer, head, *cells])


def import_csv(path: str | Path, model_name: str, shape: HeadShape) -> HeadProfile:
    """Make a profile of a CSV file; raises `ProfileError` when it is malformed or for other layers and heads."""
    scores, errors = read_csv(path)
    _check_grid(path, next(iter(scores.values())).shape, shape)
    return HeadProfile(model_name, shape, scores, errors, metadata={"imported_from": Path(path).name})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not a text file: give the JSON or CSV file of the head scores.") from error
    except OSError as error:
        raise ProfileError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error


def _parse_head_key(path: Path, key: str) -> tuple[int, int]:
    match = _HEAD_KEY.fullmatch(key)
    if match is None:
        raise ProfileError(f"{path} names a head {key!r}: write it as layer-head, both from 0, such as 17-3.")
    return int(match[1]), int(match[2])


def _parse_samples(path: Path, key: str, values: Any) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or not values or not all(0 <= v <= _LARGEST for v in values):
        raise ProfileError(f"{path} has no usable scores for head {key}: give a list of finite numbers, zero or more.")
    return values


def _parse_cell(path: Path, column: str, head: tuple[int, int], cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _LARGEST:
        raise ProfileError(
            f"{path} has {cell!r} as {column} of head {head[0]}-{head[1]}: give a finite number, zero or more."
        )
    return value


def _grid_size(path: Path, heads: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Layers and heads per layer that the heads' numbers imply, when every one of that grid is there."""
    present = set(heads)
    num_layers = 1 + max(layer for layer, _ in present)
    num_heads = 1 + max(head for _, head in present)
    if len(present) != num_layers * num_heads:
        grid = ((layer, head) for layer in range(num_layers) for head in range(num_heads))
        layer, head = next(place for place in grid if place not in present)
        raise ProfileError(
            f"{path} has no score for head {layer}-{head} among {num_layers} layers of {num_heads} heads: "
            "give every layer the same heads."
        )
    return num_layers, num_heads


def _check_grid(path: str | Path, grid: Iterable[int], shape: HeadShape) -> None:
    num_layers, num_heads = grid
    if (num_layers, num_heads) != (shape.num_layers, shape.num_heads):
        raise ProfileError(
            f"{path} has {num_layers} layers of {num_heads} heads where the model has {shape.num_layers} of "
            f"{shape.num_heads}: choose the model it was made for with --model."
        )


def _short_floats(values: Tensor) -> list[list[str]]:
    """Each number `[L, H]` as the shortest text that reads back to the same float32."""
    return [[str(number) for number in row] for row in values.detach().cpu().float().numpy()]
