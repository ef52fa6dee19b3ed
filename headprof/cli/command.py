"""What makes a command of a function: its groups of options spread over the signature, its errors as sentences."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import PurePath
from typing import Any, get_type_hints

import typer

from headprof.cli.context import terminal
from headprof.cli.terminal import check_stdout
from headprof.errors import HeadprofError, UsageError


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, for `typer.Typer.command`.

    A parameter whose type is a dataclass is a group of options: its fields take the parameter's place, and the function
    gets them as one object. Their defaults are those of the dataclass, or of the object that is the parameter's own
    default. Errors that a user can mend end in one sentence and an exit code.
    """
    own = signature(function, eval_str=True).parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in own if is_dataclass(each.annotation)}

    @wraps(function)
    def run(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        _guarded(function, given | made)

    spread = [option for each in own for option in (_options(each) if each.name in groups else [each])]
    run.__annotations__ = {option.name: option.annotation for option in spread}
    run.__signature__ = Signature([option.replace(kind=Parameter.KEYWORD_ONLY) for option in spread])  # type: ignore[attr-defined]
    return run


def given_options(context: typer.Context, *groups: type | str) -> list[str]:
    """The options that were given on the command line, as `--name`, in the order of the help.

    Args:
        context: of the command.
        groups: those to look at: groups of options, or names of single parameters.
    """
    names = {name for group in groups for name in ([group] if isinstance(group, str) else _names(group))}
    return [_written(context, each) for each in context.command.params if each.name in names and _given(context, each)]


def _written(context: typer.Context, parameter: Any) -> str:
    """A parameter as the user wrote it: `--no-name` where that says no."""
    says_no = context.params.get(parameter.name) is False and parameter.secondary_opts
    return max(parameter.secondary_opts if says_no else parameter.opts, key=len)


def _names(group: type) -> Iterator[str]:
    return (each.name for each in fields(group))


def _given(context: typer.Context, parameter: Any) -> bool:
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name != "DEFAULT"


def _options(group: Parameter) -> Iterator[Parameter]:
    """The parameters that a group stands for."""
    hints = get_type_hints(group.annotation, include_extras=True)
    for each in fields(group.annotation):
        default = each.default if group.default is Parameter.empty else getattr(group.default, each.name)
        default = Parameter.empty if default is MISSING else default
        yield Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[each.name])


def _guarded(function: Callable[..., None], arguments: dict[str, Any]) -> None:
    try:
        check_stdout()
        _check_arguments(arguments.values())
        function(**arguments)
    except HeadprofError as error:
        if terminal.debug:
            raise
        terminal.error(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        terminal.error("Interrupted.")
        raise typer.Exit(130) from None
    except (RuntimeError, OSError) as error:
        fault = _fault_of_path(error)
        if terminal.debug or fault is None:
            raise
        terminal.error(fault)
        raise typer.Exit(UsageError.exit_code) from None


def _fault_of_path(error: RuntimeError | OSError) -> str | None:
    """What is wrong with a path that could not even be looked for; `None` when the error is about something else."""
    if isinstance(error, OSError):
        if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
            return None
        return f"{error.filename} cannot be looked for ({error.strerror}): check the path, and its permissions."
    if "home directory" in str(error):  # how `pathlib` says it
        return "This account has no home folder to look in: set HOME to a folder, or give paths without ~."
    if "Symlink loop" in str(error):
        return f"A path cannot be followed ({error}): check its symbolic links."
    return None


def _check_arguments(values: Iterable[Any]) -> None:
    """Refuse texts and names of files that are not UTF-8, which neither tokenizers nor most files hold, and NaN."""
    for value in values:
        if isinstance(value, list | tuple):
            _check_arguments(value)
        elif is_dataclass(value):
            _check_arguments(getattr(value, each.name) for each in fields(value))
        elif isinstance(value, float) and math.isnan(value):
            raise UsageError("A number of 'nan' is none: give one that can be compared.")
        elif isinstance(value, str | PurePath):
            try:
                str(value).encode("utf-8")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{str(value)[:200]!a} is not UTF-8 (at character {error.start}): rename the file, or convert "
                    "the text to UTF-8."
                ) from None
