"""The JSON that the HeadKV and retrieval-head papers publish: `{"layer-head": [score per probe, ...]}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.head_profile import HeadProfile
from headprof.profile.head_table import check_grid, grid_size, parse_head_key, read_text, short_floats
from headprof.profile.imported_scores import ImportedScores, of_results, to_profile
from headprof.utils.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape


_MOST_PROBES = 10**6


def read_papers_json(path: str | Path) -> Tensor:
    """Head scores float32 `[L, H]` of a papers' file `{"layer-head": [score per probe, ...]}`: the mean of each list.

    Raises:
        ProfileError: the file is missing or malformed, a head is missing, or the lists differ in length.
    """
    return read_papers_samples(path).mean(dim=-1).float()


def read_papers_samples(path: str | Path) -> Tensor:
    """Every probe's score of a papers' file, float64 `[L, H, N]`; raises `ProfileError` like `read_papers_json`."""
    path = Path(path)
    return parse_samples(path, read_json(path))


def read_json(path: Path) -> Any:
    """A JSON file's value; raises `ProfileError` when it cannot be read, or names something twice."""
    try:
        return json.loads(read_text(path), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not valid JSON ({error}): export it again.") from error


def parse_samples(path: Path, table: Any, least: float = 0) -> Tensor:
    """Results `[L, H, N]`, float64, of such an object; raises `ProfileError` when one of them is below `least`."""
    import torch

    if not isinstance(table, dict) or not table:
        raise ProfileError(f'{path} holds no head scores: give a JSON object such as {{"0-0": [0.1], ...}}.')
    samples = {parse_head_key(path, key): _parse_samples(path, key, values, least) for key, values in table.items()}
    if len(samples) < len(table):
        raise ProfileError(f"{path} lists a head twice: give every head one list.")
    num_layers, num_heads = grid_size(path, samples)
    lengths = {head: len(values) for head, values in samples.items()}
    if lengths[0, 0] > _MOST_PROBES:
        raise ProfileError(f"{path} has more than {_MOST_PROBES} scores for a head: give fewer.")
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
    rows = short_floats(scores)
    table = {f"{i}-{j}": [float(rows[i][j])] for i in range(num_layers) for j in range(num_heads)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table), encoding="utf-8")


def papers_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """Scores of a papers' file with errors and intervals (see `import_papers_json`).

    Raises:
        ProfileError: the file is malformed, or its layers and heads are not the model's.
    """
    samples = parse_samples(path, read_json(path), least=-LARGEST_SCORE)
    if (samples < 0).any():
        raise ProfileError(f"{path} has negative scores, as LOCOS alone has: say --format locos if it is of that form.")
    check_grid(path, samples.shape[:2], shape)
    return of_results(samples)


def import_papers_json(paths: Mapping[str, Path], model_name: str, shape: HeadShape) -> HeadProfile:
    """Make a profile of papers' files, one per kind (`{"retrieval": path, "reasoning": path}`, either may be absent).

    Standard errors and 95 % bootstrap intervals come from the spread over the probes, and stay unknown where a file
    holds one score a head. Published lists repeat probes (those for Llama-3-8B hold two of them ten times each), so
    that equal results are drawn together, and `distinct_results` in the metadata says how many differ. Different
    results are taken for independent, which probes that share a context or a needle are not: no list says which do.

    Raises:
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    return to_profile({kind: papers_scores(path, shape) for kind, path in paths.items()}, paths, model_name, shape)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would keep the last of several equal names in silence."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _parse_samples(path: Path, key: str, values: Any, least: float) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or not values or not all(least <= v <= LARGEST_SCORE for v in values):
        raise ProfileError(
            f"{path} has no usable scores for head {key}: give a list of numbers from {least:g} to {LARGEST_SCORE:g}."
        )
    return values
