"""The file format of head profiles, and what is wrong with a file before any of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from headprof.errors import ProfileError
from headprof.profile.faults import LONGEST_NAME
from headprof.profile.influence import curve_names
from headprof.profile.kinds import COUNTED_KINDS, KINDS, PROBE_KINDS
from headprof.profile.refined_rows import REFINED_ROWS
from headprof.utils.records import plain
from headprof.utils.tensor_files import CHECKSUM_NAMES, Stored, TensorFile

FORMAT = "headprof.profile"
FORMAT_VERSION = "6"
"""Version 1 had no intervals, version 2 no budgets learned from reconstruction, version 3 no scores of other kinds than
`PROBE_KINDS`, version 4 no influence curves, version 5 no refined budgets; all are still read, and what fits
into an older one is written as that."""
READABLE = ("1", "2", "3", "4", "5", FORMAT_VERSION)
KEPT = "reconstruction"
"""The tensor of `HeadProfile.kept_shares` in a file."""
TENSOR_NAMES = {"reconstruction": "reconstruction_scores"}
"""Tensors of scores in a file that are not named as their kind is."""
RESERVED = ("format", "format_version", "model", "fingerprint", *CHECKSUM_NAMES)
_LARGEST_FILE = 2**26


def named_model(metadata: Mapping[str, str]) -> str | None:
    """The model that a file is for, if that is a name to be shown."""
    name = metadata.get("model", "")
    return name if name.isprintable() and len(name) <= LONGEST_NAME else None


def check_format(path: Path, metadata: Mapping[str, str], mend: str) -> None:
    """Raise `ProfileError` for a file that is no profile, or of a version that is not read; `mend` says what to do."""
    if metadata.get("format") != FORMAT:
        raise ProfileError(f"{path} is a safetensors file but not a head profile: choose another.")
    if (version := metadata.get("format_version")) not in READABLE:
        raise ProfileError(
            f"The profile {path} has format version {plain(str(version))} where this headprof reads "
            f"{', '.join(READABLE[:-1])} and {READABLE[-1]}: update headprof, or {mend}."
        )


def check_parts(file: TensorFile) -> None:
    """Look at what a file says it holds before any of it is read; raises `ValueError` saying which part is wrong."""
    if file.size > _LARGEST_FILE:
        raise ValueError(f"it has {file.size} bytes where a profile has at most {_LARGEST_FILE}")
    names = {kind: TENSOR_NAMES.get(kind, kind) for kind in KINDS}
    known = {"probes_used", KEPT, REFINED_ROWS} | curve_names()
    known |= {f"{name}{part}" for name in names.values() for part in ("", "_se", "_low", "_high")}
    if unknown := sorted(file.stored.keys() - known):
        raise ValueError(f"it holds an unknown tensor {plain(unknown[0])}")
    counted = len(counted_kinds(file.metadata.get("format_version", "")))
    if file.stored.get("probes_used") != Stored("I64", (counted,)):
        raise ValueError(f"its probes_used is not {counted} int64 counts")
    for kind, name in names.items():
        if (f"{name}_low" in file.stored) != (f"{name}_high" in file.stored):
            raise ValueError(f"its {kind} intervals have one end")


def counted_kinds(version: str) -> tuple[str, ...]:
    """The kinds whose probes a file of this format version counts, in the order of `probes_used`."""
    return COUNTED_KINDS if version in READABLE[3:] else PROBE_KINDS
