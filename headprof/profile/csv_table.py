"""Head scores as CSV, a row a head: layer, head, then score, standard error and interval of each kind."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.head_profile import HeadProfile
from headprof.profile.head_table import check_grid, grid_size, parse_head_key, read_text, short_floats
from headprof.profile.kept_shares import MOST_SHARES, kept_shares_fault
from headprof.profile.kinds import KINDS, PROBE_KINDS, named_kinds
from headprof.utils.files import atomic_write
from headprof.utils.records import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

_COLUMNS = ["layer", "head", *(column for kind in PROBE_KINDS for column in (kind, f"{kind}_se"))]
"""What every table has; other kinds stand in it where a profile holds them."""
_SCORES = [column for kind in KINDS for column in (kind, f"{kind}_se")]
_KEPT = "kept_"
_INTERVAL_COLUMNS = {kind: (f"{kind}_low", f"{kind}_high") for kind in KINDS}


def read_csv(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and standard errors by kind, float32 `[L, H]` each, of a CSV that `write_csv` wrote.

    Columns may stand in any order and those of an unknown kind, error or interval may be absent or empty.

    Raises:
        ProfileError: the file is missing or malformed, a head is missing, or a column is filled in part.
    """
    return _scores_and_errors(_read_columns(Path(path)))


def write_csv(path: str | Path, profile: HeadProfile) -> None:
    """Write a profile atomically as CSV, a row a head: layer, head, then score and standard error of each kind.

    Kinds without probes of their own have columns where the profile holds them. The ends of the intervals follow for
    the kinds that have them, and, where budgets have been learned, what share of its tokens the head's KV head keeps:
    `kept_1`, `kept_2` ... Numbers read back to the same float32; a kind or an error that the profile lacks is an empty
    column.
    """
    tables = {kind: short_floats(scores) for kind, scores in profile.scores.items()}
    tables |= {f"{kind}_se": short_floats(errors) for kind, errors in profile.standard_errors.items()}
    columns = [*_COLUMNS, *(name for name in _SCORES if name in tables and name not in _COLUMNS)]
    for kind, interval in profile.intervals.items():
        columns += _INTERVAL_COLUMNS[kind]
        tables |= {name: short_floats(end) for name, end in zip(_INTERVAL_COLUMNS[kind], interval, strict=True)}
    if profile.kept_shares is not None:
        of_heads = profile.kept_shares.repeat_interleave(profile.shape.group_size, dim=-1)
        kept = {f"{_KEPT}{number}": short_floats(each) for number, each in enumerate(of_heads, 1)}
        columns += kept
        tables |= kept
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for layer in range(profile.shape.num_layers):
            for head in range(profile.shape.num_heads):
                cells = (tables[name][layer][head] if name in tables else "" for name in columns[2:])
                writer.writerow([layer, head, *cells])


def import_csv(path: str | Path, model_name: str, shape: HeadShape) -> HeadProfile:
    """Make a profile of a CSV file; raises `ProfileError` when it is malformed or for other layers and heads."""
    path = Path(path)
    columns = _read_columns(path)
    scores, errors = _scores_and_errors(columns)
    check_grid(path, next(iter(scores.values())).shape, shape)
    intervals = {kind: ends for kind in scores if (ends := _interval(path, columns, kind)) is not None}
    noted, kept = {"imported_from": path.name}, _kept_shares(path, columns, shape)
    return HeadProfile(model_name, shape, scores, errors, metadata=noted, intervals=intervals, kept_shares=kept)


def _read_columns(path: Path) -> dict[str, Tensor]:
    """Every filled column of scores, errors and interval ends, float32 `[L, H]`; raises as `read_csv`."""
    import torch

    try:
        rows = list(csv.DictReader(read_text(path).split("\n")))
    except csv.Error as error:
        raise ProfileError(f"{path} is not valid CSV ({error}): export it again.") from error
    columns = rows[0].keys() if rows else ()
    if "layer" not in columns or "head" not in columns or not set(KINDS).intersection(columns):
        raise ProfileError(f"{path} is not a table of head scores: give it the columns {', '.join(_COLUMNS)}.")
    by_head = {parse_head_key(path, f"{row['layer']}-{row['head']}"): row for row in rows}
    if len(by_head) < len(rows):
        raise ProfileError(f"{path} lists a head twice: give every head one row.")
    num_layers, num_heads = grid_size(path, by_head)
    heads = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    filled: dict[str, Tensor] = {}
    kept = [f"{_KEPT}{number}" for number in range(1, MOST_SHARES + 1) if f"{_KEPT}{number}" in columns]
    for name in (*_SCORES, *(end for ends in _INTERVAL_COLUMNS.values() for end in ends), *kept):
        cells = [(by_head[head].get(name) or "").strip() for head in heads]
        if any(cells):
            values = [_parse_cell(path, name, head, cell) for head, cell in zip(heads, cells, strict=True)]
            filled[name] = torch.tensor(values, dtype=torch.float64).float().view(num_layers, num_heads)
    if not set(KINDS).intersection(filled):
        raise ProfileError(f"{path} holds no scores: fill its column {named_kinds()}.")
    return filled


def _scores_and_errors(columns: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    kinds = [kind for kind in KINDS if kind in columns]
    errors = {kind: columns[f"{kind}_se"] for kind in kinds if f"{kind}_se" in columns}
    return {kind: columns[kind] for kind in kinds}, errors


def _interval(path: Path, columns: Mapping[str, Tensor], kind: str) -> tuple[Tensor, Tensor] | None:
    """Both ends of one kind's intervals, if the file has them."""
    low, high = _INTERVAL_COLUMNS[kind]
    if (low in columns) != (high in columns):
        raise ProfileError(f"{path} fills only one of the columns {low} and {high}: fill both or neither.")
    if low not in columns:
        return None
    if (columns[low] > columns[high]).any():
        raise ProfileError(f"{path} has a {low} above the {high} of the same head: exchange the two.")
    return columns[low], columns[high]


def _kept_shares(path: Path, columns: Mapping[str, Tensor], shape: HeadShape) -> Tensor | None:
    """What KV heads keep, float32 `[S, L, K]`, if the file says it."""
    import torch

    names = [f"{_KEPT}{number}" for number in range(1, MOST_SHARES + 1)]
    found = [columns[name] for name in names if name in columns]
    if not found:
        return None
    grouped = torch.stack(found).unflatten(-1, (shape.num_kv_heads, shape.group_size))
    kept = grouped[..., 0].contiguous()
    fault = kept_shares_fault(kept, shape)
    if not torch.equal(grouped, kept[..., None].expand_as(grouped)):
        fault = "differ between query heads of one KV head"
    if fault:
        raise ProfileError(
            f"The columns {_KEPT}1, {_KEPT}2 ... of {path} {fault}: export them again, or leave them out."
        )
    return kept


def _parse_cell(path: Path, column: str, head: tuple[int, int], cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LARGEST_SCORE:
        raise ProfileError(
            f"{path} has {shortened(cell)} as {column} of head {head[0]}-{head[1]}: give a number from 0 to "
            f"{LARGEST_SCORE:g}."
        )
    return value
