"""Where the data and the profiles that ship with the package are found, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def asset_dir(name: str) -> Path:
    """Folder `name` (`data` or `profiles`): inside an installed wheel, else beside the package in a checkout."""
    installed = _PACKAGE / "_assets" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
