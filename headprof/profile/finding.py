"""Where head profiles are found: `./profiles`, the user's own folder, those that ship."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from headprof.errors import HeadprofError, ProfileError
from headprof.models.shape import HeadShape
from headprof.profile.commands import score_command
from headprof.profile.head_profile import HeadProfile
from headprof.utils.assets import asset_dir

_BESIDE = (".probes.safetensors", ".surrogate.safetensors", ".curves-known.safetensors", ".curves-unknown.safetensors")
"""How files end that lie beside a profile and are none."""


def profile_filename(model_name: str) -> str:
    """File name of a model's profile: the last part of its hub id or path, with `.safetensors`."""
    name = Path(model_name).name
    if name in ("", ".."):
        name = Path(model_name).resolve().name
    return f"{name.removesuffix('.gguf')}.safetensors"


def default_output(name: str) -> Path:
    """Where a model's profile goes when nothing is said: `./profiles/MODEL.safetensors`."""
    return Path("profiles") / profile_filename(name)


def user_profile_dir() -> Path:
    """The user's own profiles: `profiles` in `$HEADPROF_DATA`, else in the system's folder for user data."""
    import platformdirs

    root = os.environ.get("HEADPROF_DATA") or platformdirs.user_data_dir("headprof", appauthor=False)
    return Path(root).expanduser() / "profiles"


def profile_dirs() -> list[Path]:
    """Folders that are searched for profiles, first one first: `./profiles`, the user's own, the shipped ones."""
    return [Path("profiles"), user_profile_dir(), asset_dir("profiles")]


def find_profile(model_name: str, explicit: Path | None = None, given: str | None = None) -> Path:
    """The file of a model's profile: `explicit` when given, else the first match in `profile_dirs()`.

    Args:
        model_name: the model's name, as its profile records it.
        explicit: the file, if the user named one.
        given: how the user named the model, for the command in the message: a file or folder is not found by its name.

    Raises:
        ProfileError: there is none; the message names the command that makes it.
    """
    if explicit is not None:
        if explicit.is_file():
            return explicit
        command = f"{score_command(given or model_name)} -o {shlex.quote(str(explicit))}"
        raise ProfileError(f"There is no profile file at {explicit}: check the path, or run `{command}`.")
    for folder in profile_dirs():
        if (path := folder / profile_filename(model_name)).is_file():
            return path
    raise ProfileError(f"There is no head profile for {model_name}: run `{score_command(given or model_name)}`.")


def learning_command(model_name: str, explicit: Path | None = None, given: str | None = None) -> str:
    """The command that adds what repetition teaches to a model's profile, or to a copy of one that ships.

    Args:
        model_name, explicit, given: as for `find_profile`.

    Raises:
        ProfileError: there is no profile.
    """
    path, shipped = find_profile(model_name, explicit, given), asset_dir("profiles").resolve()
    command = score_command(given or model_name, "reconstruction", path)
    if path.resolve().parent != shipped or shipped == Path("profiles").resolve():
        return command
    return f"{command} -o {shlex.quote(str(default_output(model_name)))}"


def load_profile(
    model_name: str, explicit: Path | None = None, shape: HeadShape | None = None, given: str | None = None
) -> HeadProfile:
    """The profile that `find_profile` finds.

    Args:
        model_name, explicit, given: as for `find_profile`.
        shape: of the model; `None` to take the profile as it is, whatever model it is for.

    Raises:
        ProfileError: there is none, it is damaged, or it is for another model.
    """
    path = find_profile(model_name, explicit, given)
    return HeadProfile.load(path, shape, model_name=given or (None if shape is None else model_name))


def locate_profile(name: str | None) -> Path:
    """A profile's file, given as itself or by its model's name; `None` for the embedded model's.

    Raises:
        ProfileError: the model has none.
    """
    from headprof.models.finding import model_name

    return Path(name or "").expanduser() if names_file(name) else find_profile(model_name(name), given=name)


def load_located(name: str | None) -> tuple[Path, HeadProfile]:
    """A profile's file as `locate_profile` finds it, and what it holds.

    Raises:
        ProfileError: the model has none, or it cannot be used.
    """
    path = locate_profile(name)
    return path, HeadProfile.load(path, model_name=None if names_file(name) else name)


def names_file(name: str | None) -> bool:
    """Whether the user named a file, not a model."""
    path = Path(name or "").expanduser()
    return path.suffix == ".safetensors" or (path.is_file() and path.suffix != ".gguf")


@dataclass(frozen=True)
class FoundProfile:
    """A file in one of the folders that are searched for profiles.

    Attributes:
        path: the file.
        profile: what it holds; `None` when it cannot be used.
        fault: why it cannot be used, as a sentence.
        shadowed_by: the file of the same name that `find_profile` finds before it.
    """

    path: Path
    profile: HeadProfile | None = None
    fault: str | None = None
    shadowed_by: Path | None = None


def list_profiles() -> list[FoundProfile]:
    """Every profile in `profile_dirs()`, in the order of search and then by name; damaged ones say what ails them.

    `NAME.probes.safetensors` and `NAME.curves-known.safetensors` hold the results of a run and
    `NAME.surrogate.safetensors` a surrogate, not a profile; they are left out.
    """
    first: dict[str, Path] = {}
    found = []
    folders: dict[Path, Path] = {}
    for folder in profile_dirs():  # of which two are the same in a checkout
        folders.setdefault(folder.resolve(), folder)
    for folder in folders.values():
        for path in sorted(folder.glob("*.safetensors")):
            if not path.is_file() or path.name.endswith(_BESIDE):
                continue
            shadowed_by = first.get(path.name)
            first.setdefault(path.name, path)
            try:
                found.append(FoundProfile(path, HeadProfile.load(path), shadowed_by=shadowed_by))
            except HeadprofError as error:
                found.append(FoundProfile(path, fault=str(error), shadowed_by=shadowed_by))
    return found
