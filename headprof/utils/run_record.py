"""What a result was made with and on: versions, date, machine, device."""

from __future__ import annotations

import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from headprof._version import __version__

if TYPE_CHECKING:
    import torch


def library_versions() -> dict[str, str]:
    """Of this package, of PyTorch with its build, of Transformers and of Python."""
    import torch
    import transformers

    return {
        "headprof": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def package_version(package: str) -> str | None:
    """Of a package as it was installed; `None` if it was not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def today() -> str:
    """The date in UTC, `"2026-01-31"`."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def timestamp() -> str:
    """Date and time in UTC to the second, `"2026-01-31T12:00:00+00:00"`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """The processor's architecture, and the threads that PyTorch computes on: `"x86_64, 8 threads"`."""
    import torch

    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def device_name(device: torch.device) -> str:
    """What a model runs on: the name of a GPU, else the device's type, `"cpu"`."""
    import torch

    with suppress(RuntimeError, AssertionError):
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
    return device.type


def processor_name() -> str:
    """What the processor calls itself, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
