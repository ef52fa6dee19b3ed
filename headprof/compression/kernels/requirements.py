"""What a backend needs beyond torch: a package, and a device that it is written for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import torch


@dataclass(frozen=True)
class Package:
    """A module that a backend imports, and what to install for it."""

    module: str
    pip_name: str

    @property
    def importable(self) -> bool:
        return _importable(self.module)

    def missing(self) -> str | None:
        """That it has to be installed, as a verb phrase; `None` if it is."""
        return None if self.importable else f"needs `pip install {self.pip_name}`"


@lru_cache(maxsize=8)
def _importable(module: str) -> bool:
    try:
        import_module(module)
    except (ImportError, OSError):  # not installed, or built for another torch
        return False
    return True


@lru_cache(maxsize=16)
def device_unsupported(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None
