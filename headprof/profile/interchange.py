"""Head scores in other people's formats: the JSON that the HeadKV and retrieval-head papers publish, and CSV."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof._version import __version__
from headprof.errors import ProfileError, UsageError
from headprof.profile.head_profile import KINDS, HeadProfile
from headprof.utils.files import atomic_write
from headprof.utils.run_record import today

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

_LARGEST = 3.4e38  # of a float32; also keeps out infinity and, since it compares false, NaN
_HEAD_KEY = re.compile(r"(\d{1,5})-(\d{1,5})")
_CSV_COLUMNS = ["layer", "head", *(column for kind in KINDS for column in (kind, f"{kind}_se"))]
_INTERVAL_COLUMNS = {kind: (f"{kind}_low", f"{kind}_high") for kind in KINDS}


def check_import(tables: Sequence[Path], papers: Mapping[str, Path]) -> None:
    """Find mistakes in what is to be imported before any of it is read.

    Args:
        tables: CSV files; there may be one.
        papers: papers' JSON by kind, instead.

    Raises:
        UsageError: neither or both are given, there are several tables, or a file is missing or plainly another kind.
    """
    if len(tables) > 1:
        raise UsageError(
            f"{len(tables)} files were given where one CSV can be imported: give JSON files with --retrieval and "
            "--reasoning."
        )
    if bool(tables) == bool(papers):
        raise UsageError(
            f"{'Both a CSV and JSON files were' if tables else 'No file was'} given: give one CSV file, or the papers' "
            "JSON with --retrieval, --reasoning or both."
        )
    for path in (*tables, *papers.values()):
        if not path.exists():
            raise UsageError(f"There is no file {path}: check the path.")
    for path in tables:
        if path.suffix == ".json":
            raise UsageError(f"{path} does not say which scores it holds: give it with --retrieval or --reasoning.")
        if path.suffix == ".safetensors":
            raise UsageError(f"{path} would need no import if it is a profile: copy it into the folder profiles.")
    for kind, path in papers.items():
        if path.suffix == ".csv":
            raise UsageError(f"{path} is a CSV file, whose columns say what they hold: give it without --{kind}.")


def import_profile(
    tables: Sequence[Path], papers: Mapping[str, Path], model_name: str, shape: HeadShape, source: str | None = None
) -> HeadProfile:
    """Make a profile of one CSV file or of papers' files, with its provenance in the metadata.

    Args:
        tables, papers: as for `check_import`.
        model_name: what the profile records as its model.
        shape: of that model.
        source: where the scores come from, as text.

    Raises:
        UsageError: as `check_import`.
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    check_import(tables, papers)
    profile = import_csv(tables[0], model_name, shape) if tables else import_papers_json(papers, model_name, shape)
    provenance = {
        "date": today(),
        "versions": json.dumps({"headprof": __version__}),
    }
    if source:
        provenance["source"] = source
    return replace(profile, metadata={**profile.metadata, **provenance})


def export_profile(path: str | Path, target: Path, which: str | None = None) -> None:
    """Write the profile at `path` in the format that the suffix of `target` names: .json, .csv or .safetensors.

    The papers' JSON holds one kind of score and nothing else, CSV both with their errors and intervals; a
    `.safetensors` is a copy. Numbers read back to the same float32.

    Args:
        path: the profile's file.
        target: the file to write.
        which: kind of score for JSON; may be left out where the profile holds one.

    Raises:
        UsageError: `target` is a folder or of another suffix, or `which` is missing, unknown or not for this format.
        ProfileError: the profile cannot be read, or holds no such scores.
        HeadprofError: the disk refuses.
    """
    if target.is_dir() or target.suffix not in (".json", ".csv", ".safetensors"):
        fault = "is a folder" if target.is_dir() else "has no suffix that names a format"
        raise UsageError(f"{target} {fault}: give a file whose name ends in .json, .csv or .safetensors.")
    if which is not None and target.suffix != ".json":
        raise UsageError(f"A {target.suffix} file holds every kind of score: leave --which away, or export .json.")
    profile = HeadProfile.load(path)
    if target.suffix == ".csv":
        write_csv(target, profile)
    elif target.suffix == ".safetensors":
        content = Path(path).read_bytes()
        with atomic_write(target) as temporary:
            temporary.write_bytes(content)
    elif which is None and len(profile.kinds) > 1:
        raise UsageError(
            f"The profile holds {' and '.join(profile.kinds)} scores where a JSON file holds one kind: "
            "choose one with --which."
        )
    else:
        write_papers_json(target, profile.scores_of(which or profile.kinds[0]))


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
        table = json.loads(_read_text(path), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not valid JSON ({error}): export it again.") from error
    if not isinstance(table, dict) or not table:
        raise ProfileError(f'{path} holds no head scores: give a JSON object such as {{"0-0": [0.1], ...}}.')
    samples = {_parse_head_key(path, key): _parse_samples(path, key, values) for key, values in table.items()}
    if len(samples) < len(table):
        raise ProfileError(f"{path} lists a head twice: give every head one list.")
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

    Standard errors and 95 % bootstrap intervals come from the spread over the probes, and stay unknown where a file
    holds one score a head. Published lists repeat probes (those for Llama-3-8B hold two of them ten times each), so
    that equal results are drawn together, and `distinct_results` in the metadata says how many differ. Different
    results are taken for independent, which probes that share a context or a needle are not: no list says which do.

    Raises:
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    from headprof.utils.bootstrap import bootstrap_interval, standard_error

    samples = {kind: read_papers_samples(path) for kind, path in paths.items()}
    for kind, path in paths.items():
        _check_grid(path, samples[kind].shape[:2], shape)
    grid = (shape.num_layers, shape.num_heads)
    errors, intervals, distinct = {}, {}, {}
    for kind, values in samples.items():
        probes = values.flatten(0, 1).T  # [N, L * H]
        results, result_of = probes.unique(dim=0, return_inverse=True)
        if len(results) < len(probes):
            distinct[kind] = len(results)
        if len(results) > 1:
            clusters = result_of.tolist()
            errors[kind] = standard_error(probes, clusters).view(grid)
            low, high = bootstrap_interval(probes, clusters)
            intervals[kind] = low.view(grid), high.view(grid)
    metadata = {"imported_from": ", ".join(Path(path).name for path in paths.values())}
    if distinct:
        metadata["distinct_results"] = ", ".join(f"{kind} {count}" for kind, count in distinct.items())
    return HeadProfile(
        model_name=model_name,
        shape=shape,
        scores={kind: values.mean(dim=-1).float() for kind, values in samples.items()},
        standard_errors=errors,
        probes_used={kind: values.shape[-1] for kind, values in samples.items() if values.shape[-1] > 1},
        metadata=metadata,
        intervals=intervals,
    )


def read_csv(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and standard errors by kind, float32 `[L, H]` each, of a CSV that `write_csv` wrote.

    Columns may stand in any order and those of an unknown kind, error or interval may be absent or empty.

    Raises:
        ProfileError: the file is missing or malformed, a head is missing, or a column is filled in part.
    """
    return _scores_and_errors(_read_columns(Path(path)))


def write_csv(path: str | Path, profile: HeadProfile) -> None:
    """Write a profile atomically as CSV, a row a head: layer, head, then score and standard error of each kind.

    The ends of the intervals follow for the kinds that have them. Numbers read back to the same float32; a kind or an
    error that the profile lacks is an empty column.
    """
    tables = {kind: _short_floats(scores) for kind, scores in profile.scores.items()}
    tables |= {f"{kind}_se": _short_floats(errors) for kind, errors in profile.standard_errors.items()}
    columns = list(_CSV_COLUMNS)
    for kind, interval in profile.intervals.items():
        columns += _INTERVAL_COLUMNS[kind]
        tables |= {name: _short_floats(end) for name, end in zip(_INTERVAL_COLUMNS[kind], interval, strict=True)}
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
    _check_grid(path, next(iter(scores.values())).shape, shape)
    intervals = {kind: ends for kind in scores if (ends := _interval(path, columns, kind)) is not None}
    return HeadProfile(model_name, shape, scores, errors, metadata={"imported_from": path.name}, intervals=intervals)


def _read_columns(path: Path) -> dict[str, Tensor]:
    """Every filled column of scores, errors and interval ends, float32 `[L, H]`; raises as `read_csv`."""
    import torch

    try:
        rows = list(csv.DictReader(_read_text(path).splitlines()))
    except csv.Error as error:
        raise ProfileError(f"{path} is not valid CSV ({error}): export it again.") from error
    columns = rows[0].keys() if rows else ()
    if "layer" not in columns or "head" not in columns or not set(KINDS).intersection(columns):
        raise ProfileError(f"{path} is not a table of head scores: give it the columns {', '.join(_CSV_COLUMNS)}.")
    by_head = {_parse_head_key(path, f"{row['layer']}-{row['head']}"): row for row in rows}
    if len(by_head) < len(rows):
        raise ProfileError(f"{path} lists a head twice: give every head one row.")
    num_layers, num_heads = _grid_size(path, by_head)
    heads = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    filled: dict[str, Tensor] = {}
    for name in (*_CSV_COLUMNS[2:], *(end for ends in _INTERVAL_COLUMNS.values() for end in ends)):
        cells = [(by_head[head].get(name) or "").strip() for head in heads]
        if any(cells):
            values = [_parse_cell(path, name, head, cell) for head, cell in zip(heads, cells, strict=True)]
            filled[name] = torch.tensor(values, dtype=torch.float64).float().view(num_layers, num_heads)
    if not set(KINDS).intersection(filled):
        raise ProfileError(f"{path} holds no scores: fill its column retrieval or reasoning.")
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


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of several equal names in silence."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


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
