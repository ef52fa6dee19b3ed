"""What a command writes must not be what it reads: looked at before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from headprof.cli.options import LoadOptions
from headprof.errors import HeadprofError, UsageError


def check_outputs(targets: Mapping[Path, str | None], inputs: Iterable[Path]) -> None:
    """Refuse targets that would destroy what the command reads, or a file of another kind.

    Args:
        targets: the files to write, each with the `format` of its metadata if it is a safetensors file of ours.
        inputs: what is read: files, and folders with all that is in them and below. Only looked at where a target is
            there already.

    Raises:
        UsageError: one of the targets is an input or another target, or is a safetensors file of another format.
    """
    from headprof.utils.files import check_output, is_file

    places = [target.resolve() for target in targets]
    if len(set(places)) < len(places):
        raise UsageError(f"{' and '.join(map(str, targets))} are one file: choose different names.")
    if not any(is_file(target) for target in targets):
        return  # what is not there yet can be no input
    read = list(_all_files(inputs))
    for target, file_format in targets.items():
        check_output(target, read, file_format)


def model_inputs(model: str | None, loading: LoadOptions | None = None) -> Iterator[Path]:
    """The files of a model, as far as they are on this machine, and what it is loaded with."""
    from headprof.models.finding import model_files

    yield from model_files(model)
    if loading is not None and loading.chat_template is not None:
        yield Path(loading.chat_template).expanduser()


def profile_input(model: str | None, profile: Path | None, surrogate: Path | None = None) -> Iterator[Path]:
    """The files of the profile and of the surrogate that go with a model; nothing if there is none."""
    from headprof.models.finding import model_name
    from headprof.profile.finding import find_profile
    from headprof.profile.finding_surrogate import find_surrogate

    with suppress(HeadprofError):
        yield find_profile(model_name(model), profile)
    with suppress(HeadprofError):
        yield find_surrogate(model_name(model), surrogate, profile=profile)


def outputs_of_eval(folder: Path) -> dict[Path, None]:
    """The files that an evaluation writes to its folder, or takes away there."""
    from headprof.plots.results_folder import FILES

    names = ("answers.jsonl", "answers.previous.jsonl", *FILES)
    return {folder / name: None for name in names}


def data_of_eval(data: Path | None, folder: Path) -> Iterator[Path]:
    """The files that an evaluation may read its texts and benchmarks from, without those it wrote itself before."""
    if data is not None:
        own = folder.resolve() if _has_answers(folder) else None
        yield from (file for file in _all_files([data]) if file.parent.resolve() != own)


def _has_answers(folder: Path) -> bool:
    """Whether a folder is an evaluation's already."""
    try:
        with (folder / "answers.jsonl").open("rb") as file:
            return file.read(7) == b'{"run":'
    except OSError:
        return False


def _all_files(inputs: Iterable[Path]) -> Iterator[Path]:
    for path in inputs:
        if path.is_dir():
            for folder, _, names in os.walk(path):
                yield from (Path(folder) / name for name in names)
        else:
            yield path
