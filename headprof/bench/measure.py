"""What every benchmark measures with: time, memory, bandwidth, the machine, and checks of what is asked for."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from headprof.errors import UsageError
from headprof.utils.run_record import device_name, package_version, processor_name, timestamp

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Told what is being run, how many runs are done, and of how many."""

NO_MEMORY = "out of memory"
"""Why a case failed for which `attempt` returned `None`."""


def require_at_least(lowest: int, **values: int | Sequence[int]) -> None:
    """Check the numbers of a request, named as their options are on the command line.

    Raises:
        UsageError: a number is less than `lowest`, or there is none in a sequence.
    """
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        numbers = value if isinstance(value, Sequence) else (value,)
        if not numbers:
            raise UsageError(f"There is nothing to run without {name}: name at least one with {option}.")
        if min(numbers) < lowest:
            raise UsageError(f"{option} {min(numbers)} is too small: give at least {lowest}.")


def device_of(model: Any) -> torch.device:
    """Where a model's token ids go."""
    return model.get_input_embeddings().weight.device


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def median_seconds(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median seconds of each work, done in turn `repeats` times, after one time that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, seconds, strict=True):
            start = now(device)
            work()
            taken.append(now(device) - start)
    return [median(taken[1:]) for taken in seconds]


def measure_bandwidth(device: torch.device | str, repeats: int = 7) -> float:
    """Bytes per second at which the device goes through its memory: the median of the fastest of several ways.

    So what is measured beside it stands above a floor, not above what one slow way to read makes of it.
    """
    ways = _ways_through_memory(torch.device(device))
    seconds = median_seconds([work for _, work in ways], repeats, torch.device(device))
    return max(count / taken for (count, _), taken in zip(ways, seconds, strict=True))


def _ways_through_memory(device: torch.device) -> list[tuple[int, Callable[[], object]]]:
    """Copying, adding up and multiplying buffers far larger than any processor cache, and the bytes that each moves.

    The buffers take 256 MB on a CPU, and 1 GiB elsewhere; there each is gone through several times, so that launches
    and waiting count for nothing.
    """
    on_cpu = device.type == "cpu"
    times, width = (1, 4000) if on_cpu else (16, 4096)
    source = torch.rand(16_000 if on_cpu else 65_536, width, device=device)
    target, factor = torch.empty_like(source), torch.rand(width, device=device)

    def repeated(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: [work() for _ in range(times)]

    return [
        (2 * times * source.nbytes, repeated(lambda: target.copy_(source))),
        (times * source.nbytes, repeated(source.sum)),
        (times * source.nbytes, repeated(lambda: source @ factor)),
    ]


class PeakMemory:
    """Most bytes in use at a time since it was made, beyond those in use then.

    On a CUDA device what PyTorch allocates; on Linux what is resident.
    """

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _restarted_resident_peak() if device.type == "cpu" else None

    def used(self) -> int | None:
        """`None` where the system does not say."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _process_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def attempt(work: Callable[[], Result]) -> Result | None:
    """What `work` returns; `None` when memory runs out, which is then free again."""
    try:
        return work()
    except MemoryError:
        pass
    except RuntimeError as error:
        known = any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
        if not known and not isinstance(error, torch.OutOfMemoryError):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def describe_environment(model: Any) -> dict[str, Any]:
    """Device, threads, versions, date, dtype and attention, as plain values for a report."""
    dtype = str(model.dtype).removeprefix("torch.")
    return describe_device(device_of(model)) | {"dtype": dtype, "attention": model.config._attn_implementation}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions and date, as plain values for a report."""
    packages = ("headprof", "torch", "transformers", "triton", "flash-attn")
    return {
        "date": timestamp(),
        "device": device_name(device) if device.type == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    } | {name: found for name in packages if (found := package_version(name)) is not None}


def _restarted_resident_peak() -> int | None:
    """Resident bytes, from which the system's record of their peak starts anew; `None` where it keeps none."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what is allocated next
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    peak, resident = _process_bytes("VmHWM"), _process_bytes("VmRSS")
    if peak is None or resident is None or peak > resident + _PAGES_NOT_YET_COUNTED:
        return None
    return resident


_PAGES_NOT_YET_COUNTED = 16 << 20
"""By how much Linux's two counts may differ right after they were made equal, since threads report late."""


def _process_bytes(name: str) -> int | None:
    """A figure of this process that Linux gives in kB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
