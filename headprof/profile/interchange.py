"""Head profiles from and to other people's formats: what papers publish, and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headprof._version import __version__
from headprof.errors import UsageError
from headprof.profile.csv_table import import_csv, write_csv
from headprof.profile.head_profile import HeadProfile
from headprof.profile.imported_scores import ImportedScores, to_profile
from headprof.profile.kinds import PROBE_KINDS
from headprof.profile.papers_json import write_papers_json
from headprof.profile.published.forms import CSV, FORMS, PAPERS, check_form, is_published, recognised
from headprof.profile.tuned import NOTE
from headprof.utils.files import atomic_write
from headprof.utils.run_record import today

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

BOTH = "both"
_NOTES = "imported_notes"


@dataclass(frozen=True)
class Given:
    """Files that are to be imported, and what they are said to hold.

    Attributes:
        files: of which there may be one.
        by_kind: files by the kind of score that they are taken as, instead.
        taken_as: `retrieval`, `reasoning` or `both`, for the one file; `None` if its format says it.
        form: name of their format; `None` to tell it by their content.
    """

    files: Sequence[Path] = ()
    by_kind: Mapping[str, Path] = field(default_factory=dict)
    taken_as: str | None = None
    form: str | None = None

    def check(self) -> None:
        """Find mistakes before any of the files is read.

        Raises:
            UsageError: neither or both are given, there are several files, a file is missing or plainly another kind,
                or a word is none of those that there are.
        """
        if len(self.files) > 1:
            raise UsageError(
                f"{len(self.files)} files were given where one can be imported: give one, or one each with --retrieval "
                "and --reasoning."
            )
        if bool(self.files) == bool(self.by_kind):
            fault = "Files were given in both ways" if self.by_kind else "No file was given"
            raise UsageError(f"{fault}: give one file of head scores, or files with --retrieval, --reasoning or both.")
        check_form(self.form)
        if self.taken_as is not None and self.taken_as not in (*PROBE_KINDS, BOTH):
            raise UsageError(f"Scores cannot be taken as {self.taken_as!r}: choose retrieval, reasoning or both.")
        if self.taken_as is not None and self.by_kind:
            raise UsageError("The options --retrieval and --reasoning say what a file holds: leave --as away.")
        for path in (*self.files, *self.by_kind.values()):
            if not path.exists():
                raise UsageError(f"There is no file {path}: check the path.")
            if path.suffix == ".safetensors":
                raise UsageError(f"{path} would need no import if it is a profile: copy it into the folder profiles.")

    def sources(self) -> list[Source]:
        """What is to be read, each file once.

        Raises:
            ProfileError: a file cannot be read, or is of no known format.
            UsageError: it could be of two formats, or does not say which scores it holds.
        """
        found = [self._source(path, None) for path in self.files]
        return found + [self._source(path, kind) for kind, path in self.by_kind.items()]

    def _source(self, path: Path, kind: str | None) -> Source:
        form = self.form or recognised(path)
        if form == CSV:
            if kind or self.taken_as:
                option = f"--{kind}" if kind else "--as"
                raise UsageError(f"{path} is a CSV file, whose columns say what they hold: give it without {option}.")
            return Source(path, form, ())
        taken_as = kind or self.taken_as or FORMS[form].kind
        if taken_as is None:
            raise UsageError(
                f"{path} does not say which scores it holds: add --as retrieval, --as reasoning or --as both."
            )
        return Source(path, form, PROBE_KINDS if taken_as == BOTH else (taken_as,), chosen=bool(kind or self.taken_as))


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        path: the file.
        form: name of its format.
        kinds: as which scores it is taken; empty for a CSV, whose columns say it.
        chosen: whether that was asked for.
    """

    path: Path
    form: str
    kinds: tuple[str, ...]
    chosen: bool = True

    @property
    def model(self) -> str | None:
        """What the file calls its model, if it does; raises `ProfileError` when it cannot be read."""
        read = FORMS[self.form].model if self.form in FORMS else None
        return read(self.path) if read else None

    def require_model(self) -> None:
        """For when nobody has said which model the scores are of: refuse to guess, unless the file names every head.

        Raises:
            UsageError: it does not.
        """
        if self.form in (CSV, PAPERS):
            return
        if (named := self.model) is not None:
            raise UsageError(f"{self.path} is of {named} by its own words: say so with --model {named}.")
        raise UsageError(
            f"{self.path} does not say which model its scores are of: name it with --model, and with --shape what "
            "shape it has if its configuration cannot be read."
        )


def import_profile(
    sources: Sequence[Source], model_name: str, shape: HeadShape, source: str | None = None
) -> HeadProfile:
    """Make a profile of a CSV file, or of one file or two of published scores, with its provenance in the metadata.

    Args:
        sources: the files; a CSV stands alone, and no kind of score is in two of them.
        model_name: what the profile records as its model.
        shape: of that model.
        source: where the scores come from, as text.

    Raises:
        ProfileError: a file is malformed, or its layers and heads are not the model's.
    """
    if sources[0].form == CSV:
        profile = import_csv(sources[0].path, model_name, shape)
    else:
        profile = _of_papers(sources, model_name, shape)
    provenance = {
        "date": today(),
        "versions": json.dumps({"headprof": __version__}),
    }
    if source:
        provenance["source"] = source
    return replace(profile, metadata={**profile.metadata, **provenance})


def beside(profile: HeadProfile, path: Path, form: str | None = None) -> HeadProfile:
    """What a file holds that is to be compared with a profile: a profile too, or scores that somebody published.

    Published scores are taken to be of the same model, and to be for every kind of score that the profile has.

    Args:
        profile: the one to compare with.
        path: the file.
        form: name of its format; `None` to tell it by the content.

    Raises:
        ProfileError: the file is malformed, or its layers and heads are not the profile's.
        UsageError: there is no such format, or the file could be of two.
    """
    check_form(form)
    if form is None and not is_published(path):
        return HeadProfile.load(path)
    form = form or recognised(path)
    source = Source(path, form, () if form == CSV else profile.kinds)
    return import_profile([source], source.model or "model not named", profile.shape)


def notes(profile: HeadProfile) -> list[str]:
    """What was made of the files that a profile was imported from, a sentence each."""
    return profile.metadata.get(_NOTES, "").splitlines()


def _of_papers(sources: Sequence[Source], model_name: str, shape: HeadShape) -> HeadProfile:
    imported: dict[str, ImportedScores] = {}
    read: dict[tuple[Path, str], ImportedScores] = {}
    said: list[str] = []
    for each in sources:
        file = each.path, each.form
        scores = read[file] = read.get(file) or FORMS[each.form].read(each.path, shape)
        imported |= dict.fromkeys(each.kinds, scores)
        of_file = f"{each.path.name}: " if len(sources) > 1 else ""
        said += [f"{of_file}{text}" for text in (*_taken_as(each), *scores.remarks, *_other_model(scores, model_name))]
    paths = {kind: each.path for each in sources for kind in each.kinds}
    profile = to_profile(imported, paths, model_name, shape)
    formats = [f"{' and '.join(each.kinds)}: {each.form} ({FORMS[each.form].paper})" for each in sources]
    metadata = {**profile.metadata, "imported_format": "; ".join(formats)}
    if said:
        metadata[_NOTES] = "\n".join(dict.fromkeys(said))
    if profile.kept_shares is not None:
        learned = next(each for each in sources if imported[each.kinds[0]].kept_shares is not None)
        metadata["reconstruction"] = json.dumps(
            {"imported_from": learned.path.name, "paper": FORMS[learned.form].paper}
        )
    return replace(profile, metadata=metadata)


def _other_model(scores: ImportedScores, model_name: str) -> tuple[str, ...]:
    if scores.model is None or Path(scores.model).name.lower() == Path(model_name).name.lower():
        return ()
    return (f"The file calls its model {scores.model}, and is taken to be of {model_name}.",)


def _taken_as(source: Source) -> tuple[str, ...]:
    if source.chosen:
        return ()
    return (f"Its scores are taken as {source.kinds[0]} scores, unless --as says otherwise.",)


def export_profile(path: str | Path, target: Path, which: str | None = None, given: str | None = None) -> list[str]:
    """Write the profile at `path` in the format that the suffix of `target` names: .json, .csv or .safetensors.

    The papers' JSON holds one kind of score and nothing else, CSV both with their errors and intervals; a
    `.safetensors` is a copy. Numbers read back to the same float32.

    Args:
        path: the profile's file.
        target: the file to write.
        which: kind of score for JSON; may be left out where the profile holds one.
        given: how the user named the model, for commands in messages.

    Returns:
        What methods go by and a file of this format does not hold, in words.

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
    profile = HeadProfile.load(path, model_name=given)
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
    return _left_out(profile, target.suffix)


def _left_out(profile: HeadProfile, suffix: str) -> list[str]:
    if suffix == ".safetensors":
        return []
    held = {
        "learned budgets": profile.kept_shares is not None and suffix != ".csv",
        "influence curves": bool(profile.curves),
        "tuned parameters": NOTE in profile.metadata,
        "refined budgets": profile.refined_rows is not None,
    }
    return [name for name, is_held in held.items() if is_held]
