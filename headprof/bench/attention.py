"""Attention over a layer's compressed rows beside what reading them must take, heads of equal and of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from headprof.bench.measure import Progress, measure_bandwidth, median_seconds, require_at_least
from headprof.compression.kernels.append import append_rows
from headprof.compression.kernels.backends import ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows, Request
from headprof.compression.kernels.triton_attention import Tile, triton_attention
from headprof.compression.kernels.work_items import WorkItems, rows_per_item
from headprof.errors import UsageError
from headprof.models.published import find_shape

LAYOUTS = ((1, 160), (16, 1024), (64, 1024), (256, 1024), (16, 8192))
"""Sequences, and rows that a KV head holds on average."""

_ITEM_ROWS = (128, 256, 384, 512, 768, 1024)
_TILES = ((64, 4, 2), (64, 4, 3), (64, 2, 2), (64, 2, 3), (32, 4, 3), (32, 2, 3), (128, 4, 2), (128, 8, 2))
"""Rows, warps and stages."""


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds of one layer's attention for one new token, medians.

    Attributes:
        sequences, rows: how many sequences, and the rows of a KV head on average.
        even: whether all heads have equally many, or each its own number.
        nbytes: of the keys and values that are read.
        bandwidth: bytes per second that the device reads, or reads and writes in a copy, whichever is more.
        attention: of a query for every sequence.
        append: to give every head the row of a new token; 0 where it was not measured.
        item_rows, tile_rows, warps, stages: how the kernel was told to work; 0 for another backend.
    """

    sequences: int
    rows: int
    even: bool
    nbytes: int
    bandwidth: int
    attention: float
    append: float
    item_rows: int = 0
    tile_rows: int = 0
    warps: int = 0
    stages: int = 0

    @property
    def ratio(self) -> float:
        """The share of the device's bandwidth at which the rows are read."""
        return self.nbytes / self.attention / self.bandwidth


@dataclass(frozen=True)
class _Setting:
    """How the Triton kernel is told to work."""

    item_rows: int
    tile: Tile


def run_attention_bench(
    shape: str,
    layouts: Sequence[tuple[int, int]] = LAYOUTS,
    *,
    sweep: bool = False,
    repeats: int = 9,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: Progress = lambda text, done, total: None,
) -> list[AttentionTimes]:
    """Attend over random rows, by the backend that `auto` takes; several sets of them in turn, so that no cache serves.

    On a CUDA device all is replayed from a graph, so that no time of the host's is counted.

    Args:
        shape: a name in `SHAPES`, whose heads are taken.
        layouts: sequences, and rows of a KV head on average.
        sweep: the Triton kernel in many settings, on uneven heads alone.
        repeats: timed runs, after one that is not, of which the median counts.
        device, dtype: of the rows.
        seed: of all that is random.
        on_progress: called before each case.

    Raises:
        UsageError: there is no such shape, a number is too small, or a sweep is asked for without a CUDA device.
    """
    heads = find_shape(shape)
    require_at_least(1, repeats=repeats, layouts=[number for layout in layouts for number in layout])
    where = torch.device(device)
    if sweep and where.type != "cuda":
        raise UsageError("A sweep over the Triton kernel's settings needs a CUDA device: leave --sweep away.")
    bandwidth = int(max(measure_bandwidth(where), _read_bandwidth(where)))
    cases = [(*layout, even) for layout, even in product(layouts, (False,) if sweep else (True, False))]
    times: list[AttentionTimes] = []
    for done, (sequences, rows, even) in enumerate(cases):
        on_progress(f"Attending over {sequences} x {rows} rows", done, len(cases))
        sets = _Sets(heads, sequences, rows, even, dtype, where, torch.Generator(where).manual_seed(seed), repeats + 2)
        case = partial(AttentionTimes, sequences, rows, even, sets.nbytes, bandwidth)
        if sweep:
            times += [_in_setting(sets, setting, case, repeats) for setting in _settings(sets.requests[0])]
        else:
            times.append(_as_it_is(sets, case, repeats))
        del sets
    return times


class _Sets:
    """Several layers' rows of one layout, together far larger than the device's cache, and a query for each."""

    def __init__(
        self,
        heads: dict,
        sequences: int,
        rows: int,
        even: bool,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        space: int,
    ):
        """`space`: free rows behind each head."""
        self.device, num_kv_heads, head_dim = device, heads["num_key_value_heads"], heads["head_dim"]
        lengths = _lengths(sequences * num_kv_heads, rows, even, generator)
        self.nbytes = 2 * int(lengths.sum()) * head_dim * dtype.itemsize
        number = max(2, -(-4 * _cache_size(device) // self.nbytes))

        def random(*size: int) -> Tensor:
            return torch.empty(number, *size, dtype=dtype, device=device).normal_(generator=generator)

        stops = (lengths + space).cumsum(0)
        starts = stops - lengths - space
        bounds = torch.cat([torch.stack([starts, starts + lengths], dim=1).flatten(), stops[-1:]]).int()
        total, longest = int(stops[-1]), int(lengths.max())
        keys, values = random(total, head_dim), random(total, head_dim)
        queries = random(sequences, heads["num_attention_heads"], 1, head_dim)
        self.new = random(sequences, num_kv_heads, 1, head_dim)
        self.requests = [
            Request(
                queries[each],
                RaggedRows(
                    keys[each],
                    values[each],
                    torch.zeros(total, dtype=torch.int32, device=device),
                    bounds.clone(),
                    longest + space,
                    rows + space if even else 0,
                    next_positions=torch.zeros(len(lengths), dtype=torch.int32, device=device),
                    in_use=longest,
                ),
                num_kv_heads,
                head_dim**-0.5,
            )
            for each in range(number)
        ]


def _lengths(num_heads: int, rows: int, even: bool, generator: torch.Generator) -> Tensor:
    """Rows of each head, int64 `[N]`: the uneven ones have a quarter of the average at least, and several times it at
    most, as a head profile deals them out."""
    device = generator.device
    if even:
        return torch.full((num_heads,), rows, device=device)
    shares = torch.rand(num_heads, generator=generator, device=device) ** 4
    spread = shares / shares.mean() * (rows - rows // 4)
    return rows // 4 + spread.long()


def _cache_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20


def _as_it_is(sets: _Sets, case: Callable[..., AttentionTimes], repeats: int) -> AttentionTimes:
    """By the backend that is taken by itself, and appending."""
    works = [
        partial(ragged_attention, each.query, each.rows, each.num_kv_heads, scaling=each.scaling)
        for each in sets.requests
    ]
    attention = _seconds_of_one(works, repeats, sets.device)
    first = sets.requests[0]
    told = _told(_Setting(rows_per_item(first.rows), _tile_of(first))) if "triton" in first.rows.plans else {}
    appends = [
        partial(append_rows, each.rows, new, new) for each, new in zip(sets.requests, sets.new.unbind(), strict=True)
    ]
    return case(attention=attention, append=_seconds_of_one(appends, repeats, sets.device), **told)


def _in_setting(sets: _Sets, setting: _Setting, case: Callable[..., AttentionTimes], repeats: int) -> AttentionTimes:
    works = [
        partial(triton_attention, each, items=WorkItems.of(each.rows, setting.item_rows), tile=setting.tile)
        for each in sets.requests
    ]
    return case(attention=_seconds_of_one(works, repeats, sets.device), append=0.0, **_told(setting))


def _settings(request: Request) -> Iterator[_Setting]:
    usual = _tile_of(request)
    for (tile_rows, warps, stages), item_rows in product(_TILES, _ITEM_ROWS):
        yield _Setting(item_rows, Tile(usual.queries, tile_rows, usual.dim, warps, stages))


def _tile_of(request: Request) -> Tile:
    return Tile.of(request.query, request.group_size * request.num_queries)


def _told(setting: _Setting) -> dict[str, int]:
    tile = setting.tile
    return {"item_rows": setting.item_rows, "tile_rows": tile.rows, "warps": tile.warps, "stages": tile.stages}


def _seconds_of_one(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> float:
    """Of one of the works, all of which are done in turn."""
    if device.type != "cuda":
        return median_seconds([lambda: [work() for work in works]], repeats, device)[0] / len(works)
    for work in works:  # compiles, and plans
        work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return median(seconds) / len(works)


def _read_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second at which a buffer far larger than any processor cache is summed; the median."""
    size = 256 * 10**6 if device.type == "cpu" else 1 << 30
    buffers = torch.ones(2, size // 4, device=device)
    return size / _seconds_of_one([partial(torch.sum, each) for each in buffers], repeats, device)
