"""Head profiles from and to other people's formats: the papers' JSON, and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headprof._version import __version__
from headprof.errors import UsageError
from headprof.profile.csv_table import import_csv, write_csv
from headprof.profile.head_profile import HeadProfile
from headprof.profile.papers_json import import_papers_json, write_papers_json
from headprof.utils.files import atomic_write
from headprof.utils.run_record import today

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape


def check_import(tables: Sequence[Path], papers: Mapping[str, Path]) -> None:
    """Find mistakes in what is to be imported before any of it is read.

    Args:
        tables: CSV files; there may be one.
        papers: papers' JSON by kind, instead.

    Raises:
        UsageError: neither or both are given, there are several tables, or a file is missing or plainly another kind.
    """
    if len(tables) > 1:
        raise UsageError(
            f"{len(tables)} files were given where one CSV can be imported: give JSON files with --retrieval and "
            "--reasoning."
        )
    if bool(tables) == bool(papers):
        raise UsageError(
            f"{'Both a CSV and JSON files were' if tables else 'No file was'} given: give one CSV file, or the papers' "
            "JSON with --retrieval, --reasoning or both."
        )
    for path in (*tables, *papers.values()):
        if not path.exists():
            raise UsageError(f"There is no file {path}: check the path.")
    for path in tables:
        if path.suffix == ".json":
            raise UsageError(f"{path} does not say which scores it holds: give it with --retrieval or --reasoning.")
        if path.suffix == ".safetensors":
            raise UsageError(f"{path} would need no import if it is a profile: copy it into the folder profiles.")
    for kind, path in papers.items():
        if path.suffix == ".csv":
            raise UsageError(f"{path} is a CSV file, whose columns say what they hold: give it without --{kind}.")


def import_profile(
    tables: Sequence[Path], papers: Mapping[str, Path], model_name: str, shape: HeadShape, source: str | None = None
) -> HeadProfile:
    """Make a profile of one CSV file or of papers' files, with its provenance in the metadata.

    Args:
        tables, papers: as for `check_import`.
        model_name: what the profile records as its model.
        shape: of that model.
        source: where the scores come from, as text.

    Raises:
        UsageError: as `check_import`.
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    check_import(tables, papers)
    profile = import_csv(tables[0], model_name, shape) if tables else import_papers_json(papers, model_name, shape)
    provenance = {
        "date": today(),
        "versions": json.dumps({"headprof": __version__}),
    }
    if source:
        provenance["source"] = source
    return replace(profile, metadata={**profile.metadata, **provenance})


def export_profile(path: str | Path, target: Path, which: str | None = None) -> None:
    """Write the profile at `path` in the format that the suffix of `target` names: .json, .csv or .safetensors.

    The papers' JSON holds one kind of score and nothing else, CSV both with their errors and intervals; a
    `.safetensors` is a copy. Numbers read back to the same float32.

    Args:
        path: the profile's file.
        target: the file to write.
        which: kind of score for JSON; may be left out where the profile holds one.

    Raises:
        UsageError: `target` is a folder or of another suffix, or `which` is missing, unknown or not for this format.
        ProfileError: the profile cannot be read, or holds no such scores.
        HeadprofError: the disk refuses.
    """
    if target.is_dir() or target.suffix not in (".json", ".csv", ".safetensors"):
        fault = "is a folder" if target.is_dir() else "has no suffix that names a format"
        raise UsageError(f"{target} {fault}: give a file whose name ends in .json, .csv or .safetensors.")
    if which is not None and target.suffix != ".json":
        raise UsageError(f"A {target.suffix} file holds every kind of score: leave --which away, or export .json.")
    profile = HeadProfile.load(path)
    if target.suffix == ".csv":
        write_csv(target, profile)
    elif target.suffix == ".safetensors":
        content = Path(path).read_bytes()
        with atomic_write(target) as temporary:
            temporary.write_bytes(content)
    elif which is None and len(profile.kinds) > 1:
        raise UsageError(
            f"The profile holds {' and '.join(profile.kinds)} scores where a JSON file holds one kind: "
            "choose one with --which."
        )
    else:
        write_papers_json(target, profile.scores_of(which or profile.kinds[0]))
