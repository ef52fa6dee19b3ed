"""Where the surrogate of a model is found: beside its profile, or where profiles are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.commands import surrogate_command
from headprof.profile.finding import profile_dirs, profile_filename

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.surrogate import Surrogate

SUFFIX = ".surrogate.safetensors"


def surrogate_path(profile: Path) -> Path:
    """Where a surrogate is kept: `NAME.surrogate.safetensors` beside the profile `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}{SUFFIX}")


def find_surrogate(
    model_name: str, explicit: Path | None = None, given: str | None = None, profile: Path | None = None
) -> Path:
    """The file of a model's surrogate: `explicit` when given, else beside `profile`, or where profiles are found.

    Args:
        model_name: the model's name, as its profile records it.
        explicit: the file, if the user named one.
        given: how the user named the model, for the command in the message.
        profile: the head profile that the user named.

    Raises:
        ProfileError: there is none; the message names the command that makes it.
    """
    command = surrogate_command(given or model_name)
    if explicit is not None:
        if explicit.is_file():
            return explicit
        raise ProfileError(f"There is no surrogate file at {explicit}: check the path, or run `{command}`.")
    name = profile_filename(model_name)
    places = [folder / name for folder in profile_dirs()]
    for place in places if profile is None else [profile, *places]:
        if (path := surrogate_path(place)).is_file():
            return path
    raise ProfileError(f"There is no surrogate for {model_name}: run `{command}`.")


def load_surrogate(loaded: LoadedModel, explicit: Path | None = None, profile: Path | None = None) -> Surrogate:
    """The surrogate that `find_surrogate` finds for a model.

    Raises:
        ProfileError: there is none, it is damaged, or it is for another model.
    """
    from headprof.profile.surrogate import Surrogate

    given = loaded.given or loaded.name
    surrogate = Surrogate.load(find_surrogate(loaded.name, explicit, loaded.given, profile), given)
    surrogate.check_model(loaded.model, loaded.shape, given)
    return surrogate
