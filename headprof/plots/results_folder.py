"""The folder that an evaluation ends with: tables, pictures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from headprof.evaluation.results import Evaluation, results_csv, summary
from headprof.plots.report import DRAWINGS, drawings, write_report
from headprof.utils.files import write_json, write_text

_TABLES = ("answers.csv", "losses.csv", "cells.csv")
FILES = ("results.json", *_TABLES, *(f"{name}.png" for name in DRAWINGS), "report.html")
"""Names of all files that there may be."""


def write_results(found: Evaluation, folder: Path) -> list[Path]:
    """Write tables, pictures and the report into `folder`, and take away those of a run before; returns the files.

    Raises:
        HeadprofError: the disk refused.
    """
    files = [folder / "results.json"]
    write_json(files[0], summary(found))
    tables: Sequence[Sequence[Any]] = (found.answers, found.losses, found.cells)
    for name, rows in zip(_TABLES, tables, strict=True):
        if rows:
            files.append(folder / name)
            write_text(files[-1], results_csv(rows))
    files += [draw(folder / f"{name}.png") for name, draw in drawings(found).items()]
    files.append(write_report(found, folder / "report.html"))
    for name in FILES:
        if folder / name not in files:
            with suppress(OSError):
                (folder / name).unlink()
    return files
