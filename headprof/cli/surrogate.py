"""`headprof score --surrogate`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.cli.context import join_team, load, terminal
from headprof.cli.options import LoadOptions
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.tables.score import surrogate_table
from headprof.errors import UsageError
from headprof.utils.units import parse_lengths

if TYPE_CHECKING:
    from headprof.scoring.calibration import CalibrationSettings


def fit(
    settings: CalibrationSettings, model: str | None, output: Path | None, command: str, loading: LoadOptions
) -> None:
    """Fit a surrogate to a model, and write it."""
    from headprof.models.finding import model_name
    from headprof.profile.finding import default_output
    from headprof.profile.finding_surrogate import surrogate_path
    from headprof.profile.surrogate_checks import FORMAT
    from headprof.scoring.surrogate_fit import FEWEST_TEXTS, fit_surrogate
    from headprof.utils.files import check_writable

    settings.check(FEWEST_TEXTS)
    target = output or surrogate_path(default_output(model_name(model)))
    read = chain([] if settings.folder is None else [settings.folder], model_inputs(model, loading))
    check_outputs({target: FORMAT}, read)
    if join_team().size > 1:
        raise UsageError("A surrogate is fitted by one process: run it without torchrun or accelerate launch.")
    check_writable(target)
    loaded = load(model, loading)
    with terminal.progress() as report:
        surrogate = fit_surrogate(loaded, settings, command=command, on_progress=report)
    surrogate.save(target)
    terminal.table(*surrogate_table(surrogate))
    terminal.result(str(target))


def fit_settings(
    preset: str, number: int | None, lengths: str | None, seed: int, texts: Path | None
) -> CalibrationSettings:
    """What to fit to; `None` leaves the number of texts to the preset, and their lengths as they are."""
    from headprof.scoring.calibration import CalibrationSettings
    from headprof.scoring.surrogate_fit import PRESETS

    if preset not in PRESETS:
        raise UsageError(f"There is no preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    return CalibrationSettings(
        texts=number or PRESETS[preset],
        lengths=parse_lengths(lengths) if lengths else None,
        seed=seed,
        folder=texts,
    )
