"""Rows of a dataset, from the Hugging Face hub or from a folder that holds its files, both read by `datasets`."""

from __future__ import annotations

import ast
import glob
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headprof.errors import UsageError
from headprof.models.checkpoint import one_line, quiet

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SUFFIXES = tuple(suffix + packed for packed in ("", ".gz") for suffix in _BUILDERS)
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Source:
    """Where the rows of one task are.

    Attributes:
        dataset: id on the hub.
        config, split: as `datasets.load_dataset` takes them.
        files: what the file is called in a folder of the dataset, without suffix; the first that is there is read.
        folder: a folder in which a user who has several datasets may keep this one's files.
        archive: the zip file on the hub that holds `files[0] + ".jsonl"`, for a dataset that `datasets` 4 and newer
            refuse to load because it comes with a script.
        other_name: an id to take the dataset from where the hub does not know the first.
    """

    dataset: str
    config: str
    split: str
    files: tuple[str, ...]
    folder: str
    archive: str = ""
    other_name: str = ""


@dataclass(frozen=True)
class Row:
    """One row; its methods raise `UsageError` when a field is missing or of another type.

    Attributes:
        number: from 1.
        where: the file, or the dataset's id.
        values: what the row holds.
    """

    number: int
    where: str
    values: Mapping[str, Any]

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str:
        """A field that holds a text; numbers are written out."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.lacks(name, "a text")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that holds texts: a list, a list written as a text (as in CSV files), or a single text."""
        value = parsed(self.values.get(name))
        values = value if isinstance(value, list | tuple) else [value]
        if not values or not all(isinstance(item, str | int | float) for item in values):
            raise self.lacks(name, "texts")
        return tuple(str(item) for item in values)

    def lacks(self, name: str, what: str) -> UsageError:
        return UsageError(
            f"Row {self.number} of {self.where} has no field {name!r} with {what}: give the dataset's own files."
        )


def parsed(value: Any) -> Any:
    """A list or dictionary that is written as a text, in JSON or as Python prints it; anything else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def read_rows(source: Source, data_dir: Path | None) -> Iterator[Row]:
    """All rows in the dataset's order, read as they are asked for.

    Args:
        source: the dataset.
        data_dir: a folder with its files; `None` to take it from the hub, or from the hub's cache.

    Raises:
        UsageError: there is no such file, it cannot be read or is empty, or the hub cannot be reached.
    """
    if data_dir is None:
        where, rows = source.dataset, _from_hub(source)
    else:
        files = find_files(source, data_dir)
        where, rows = files[0].split("::")[-1], _read_files(files)
    number = 0
    for number, values in enumerate(rows, 1):
        yield Row(number, where, values)
    if number == 0:
        raise UsageError(f"{where} holds no rows: give the dataset's own files with --data-dir.")


def find_files(source: Source, data_dir: Path) -> list[str]:
    """The local files of a dataset: one, or the shards of a parquet file; `zip://MEMBER::PATH` within an archive.

    Raises:
        UsageError: there is no such folder, or none of the files is in it.
    """
    if not data_dir.is_dir():
        raise UsageError(
            f"There is no folder {data_dir} to read {source.dataset} from: give one with its files with --data-dir."
        )
    for folder in (data_dir, data_dir / source.folder, data_dir / source.dataset.split("/")[-1]):
        for name in source.files:
            for suffix in _SUFFIXES:
                if (folder / f"{name}{suffix}").is_file():
                    return [str((folder / f"{name}{suffix}").resolve())]
            shards = sorted(folder.glob(f"{name}-*-of-*.parquet"))
            if shards:
                return [str(shard.resolve()) for shard in shards]
        member = f"{source.files[0]}.jsonl"
        archive = folder / source.archive
        if source.archive and archive.is_file() and member in _members(archive):
            return [f"zip://{member}::{archive.resolve()}"]
    raise UsageError(
        f"{data_dir} has no {source.files[-1]}.jsonl (or .json, .parquet, .csv) of {source.dataset}: put its files "
        "there, or give another folder with --data-dir."
    )


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            return file.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"{archive} cannot be read ({one_line(error)}): download it again.") from error


def _read_files(files: list[str]) -> Iterator[Mapping[str, Any]]:
    path = files[0].split("::")
    builder = _BUILDERS[Path(path[0].removesuffix(".gz")).suffix]
    escaped = [_escape(file) for file in files]
    # Streamed, so that a few rows of a large file are read in no time and nothing is left in a cache.
    options = {"data_files": escaped, "split": "train", "streaming": True}
    try:
        with _silent() as datasets:
            rows = iter(datasets.load_dataset(builder, **options))
        while (row := _next(rows)) is not None:
            yield row
    except StopIteration:  # how `datasets` says that a file is empty
        return
    except Exception as error:
        raise UsageError(
            f"{path[-1]} cannot be read ({one_line(error)}): give the dataset's own file, in the format of its suffix."
        ) from error


def _escape(file: str) -> str:
    """`datasets` takes `*`, `?` and `[` in a path for a pattern."""
    member, separator, path = file.rpartition("::")
    return f"{member}{separator}{glob.escape(path)}"


def _next(rows: Iterator[Any]) -> Mapping[str, Any] | None:
    with _silent():
        return next(rows, None)


def _from_hub(source: Source) -> Iterator[Mapping[str, Any]]:
    from huggingface_hub.errors import RepositoryNotFoundError

    failure = _why_unreachable(source.dataset)
    if isinstance(failure, RepositoryNotFoundError) and source.other_name:
        yield from _from_hub(replace(source, dataset=source.other_name, other_name=""))
        return
    try:
        if source.archive:
            yield from _read_files([_archived(source, offline=failure is not None)])
        else:
            with quiet(), _silent() as datasets, _offline(datasets, failure is not None):
                rows = datasets.load_dataset(source.dataset, source.config, split=source.split)
            yield from rows
    except UsageError:
        raise
    except Exception as error:
        raise _explained(source, failure or error) from error


def _archived(source: Source, *, offline: bool) -> str:
    from huggingface_hub import hf_hub_download

    with quiet():
        path = hf_hub_download(source.dataset, source.archive, repo_type="dataset", local_files_only=offline)
    return f"zip://{source.files[0]}.jsonl::{path}"


def _why_unreachable(dataset: str) -> Exception | None:
    """Ask for the dataset's card in one request that is not retried; `datasets` itself tries for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import OfflineModeIsEnabled

    if is_offline_mode():
        return OfflineModeIsEnabled()
    try:
        get_hf_file_metadata(hf_hub_url(dataset, "README.md", repo_type="dataset"), timeout=_CONNECT_SECONDS)
    except Exception as error:  # the hub client's network errors come from whichever HTTP library it uses
        return error
    return None


def _explained(source: Source, failure: Exception) -> UsageError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    dataset = source.dataset
    mend = "pass a folder with its files with --data-dir"
    match failure:
        case OfflineModeIsEnabled():
            return UsageError(
                f"The dataset {dataset} is not on this machine and HF_HUB_OFFLINE keeps it from being downloaded; "
                f"unset that, or {mend}."
            )
        case GatedRepoError():
            return UsageError(
                f"The dataset {dataset} is gated: accept its license on the hub and run `hf auth login`, or {mend}."
            )
        case RepositoryNotFoundError():
            return UsageError(f"The hub has no dataset {dataset} any more; {mend}.")
    return UsageError(f"The dataset {dataset} cannot be had from the hub ({one_line(failure)}); try later, or {mend}.")


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Have `datasets` look in its cache alone; it has no argument for that."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _silent() -> Iterator[Any]:
    """The module `datasets`, without its progress bars and log lines for as long as this lasts."""
    import datasets
    from datasets.utils import logging

    level, bars = logging.get_verbosity(), datasets.utils.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
