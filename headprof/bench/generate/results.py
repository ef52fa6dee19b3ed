"""What decoding took in each case, and beside the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headprof.bench.generate.full_cache import FULL


@dataclass(frozen=True)
class Measurement:
    """What one case took. Numbers are `None` where they could not be measured, all of them where the case failed.

    Attributes:
        method, budget: as requested; `full` and an empty budget for Transformers' own cache.
        backend: of the attention over the compressed cache; for the full cache the model's own attention.
        length: prompt tokens of each sequence.
        batch: sequences.
        prefill_seconds: until the first new token, compression included; median.
        overhead_seconds: of these, spent on choosing and keeping the prompt's tokens; median.
        decode_rate: new tokens per second, over all sequences, at the median time between two tokens.
        cache_bytes: that the cache holds right after the prompt.
        largest_cache_bytes: most that it holds while decoding.
        steadiness: decode rate over the last twelfth of the new tokens, as a multiple of that over the first twelfth
            after the cache had come to its largest size (or after the prompt, if it grows to the end); 1 is steady.
        peak_bytes: most memory in use beyond what was before the run, weights and prompt ids not counted: on CUDA what
            PyTorch allocates, on Linux what is resident.
        step_bytes: that decoding one token per sequence has to read: weights and cache.
        floor_rate: tokens per second if reading these at the measured bandwidth were all there is to do.
        failed: why the case could not be run; empty if it could.
        step: how a decode step is run: over the compressed cache as requested; `eager` for Transformers' growing
            `DynamicCache`, `compiled` for its `StaticCache`.
    """

    method: str
    budget: str
    backend: str
    length: int
    batch: int
    prefill_seconds: float | None = None
    overhead_seconds: float | None = None
    decode_rate: float | None = None
    cache_bytes: int | None = None
    largest_cache_bytes: int | None = None
    steadiness: float | None = None
    peak_bytes: int | None = None
    step_bytes: int | None = None
    floor_rate: float | None = None
    failed: str = ""
    step: str = "auto"

    @property
    def step_seconds(self) -> float | None:
        """Median time between two tokens."""
        return _ratio(self.batch, self.decode_rate)

    @property
    def floor_seconds(self) -> float | None:
        """What reading weights and cache takes at the measured bandwidth."""
        return _ratio(self.batch, self.floor_rate)

    @property
    def times_floor(self) -> float | None:
        """A step's time as a multiple of that; 1 is as fast as memory allows."""
        return _ratio(self.floor_rate, self.decode_rate)

    @property
    def overhead_share(self) -> float | None:
        """Share of the prefill that compression took, 0 to 1."""
        return _ratio(self.overhead_seconds, self.prefill_seconds)


@dataclass(frozen=True)
class BenchResult:
    """All cases of a run.

    Attributes:
        bandwidth: of the device's memory, bytes per second (see `measure_bandwidth`).
        measurements: the cases, grouped by length, the full caches first.
        environment: device, dtype, versions and date.
    """

    bandwidth: float
    measurements: list[Measurement]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A measurement relative to the full caches of the same length and batch; `None` where either number is missing.

    Each ratio is to the better of the full caches in that figure, which may be one in speed and the other in memory.

    Attributes:
        decode_ratio: times the full cache's decode rate; above 1 is faster.
        prefill_ratio: times its prefill time; below 1 is faster.
        cache_ratio, peak_ratio: times its bytes.
    """

    measurement: Measurement
    decode_ratio: float | None
    prefill_ratio: float | None
    cache_ratio: float | None
    peak_ratio: float | None


def comparison(result: BenchResult) -> list[Comparison]:
    """Every measurement, the full caches' own included, beside the full caches of the same length and batch."""
    rows = []
    for each in result.measurements:
        beside = [
            full
            for full in result.measurements
            if (full.method, full.length, full.batch) == (FULL, each.length, each.batch)
        ]
        rows.append(
            Comparison(
                each,
                decode_ratio=_ratio(each.decode_rate, best(max, [full.decode_rate for full in beside])),
                prefill_ratio=_ratio(each.prefill_seconds, best(min, [full.prefill_seconds for full in beside])),
                cache_ratio=_ratio(each.cache_bytes, best(min, [full.cache_bytes for full in beside])),
                peak_ratio=_ratio(each.peak_bytes, best(min, [full.peak_bytes for full in beside])),
            )
        )
    return rows


def best(choose: Callable[[Sequence[float]], float], values: Sequence[float | None]) -> float | None:
    """The largest or smallest of the values that are known; `None` where none is."""
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def figures(result: BenchResult) -> dict[str, Any]:
    """All that was measured, as plain values for a file: each measurement with what follows from it."""
    measurements = [
        asdict(row.measurement)
        | {
            "step_seconds": row.measurement.step_seconds,
            "floor_seconds": row.measurement.floor_seconds,
            "times_floor": row.measurement.times_floor,
            "overhead_share": row.measurement.overhead_share,
            "decode_ratio": row.decode_ratio,
            "prefill_ratio": row.prefill_ratio,
            "cache_ratio": row.cache_ratio,
            "peak_ratio": row.peak_ratio,
        }
        for row in comparison(result)
    ]
    return {"bandwidth": result.bandwidth, "measurements": measurements, "environment": result.environment}


def _ratio(value: float | None, beside: float | None) -> float | None:
    return None if value is None or not beside else value / beside
