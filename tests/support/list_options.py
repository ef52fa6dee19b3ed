"""Every command of `headprof` with all its options, as plain lines: two listings show what a change does to them.

python tests/support/list_options.py > options.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from headprof.cli.app import app

FACTS = (
    *("type", "min", "max", "default", "show_default", "required", "multiple", "nargs", "is_flag", "is_eager"),
    *("metavar", "envvar", "help", "rich_help_panel", "hidden"),
)


def commands(command: Any, name: str = "headprof") -> Iterator[tuple[str, Any]]:
    """The command itself and all below it, by the words that call them."""
    yield name, command
    for word, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, f"{name} {word}")


def listing() -> Iterator[str]:
    """For each command its help, the order of its parameters, and a line for each fact about each of them, sorted."""
    for name, command in commands(typer.main.get_command(app)):
        yield f"{name} | help: {command.help!r}"
        yield f"{name} | hidden: {command.hidden!r}"
        yield f"{name} | order: {' '.join(_names(each) for each in command.params)}"
        for parameter in sorted(command.params, key=_names):
            for fact in FACTS:
                yield f"{name} {_names(parameter)} | {fact}: {_shown(parameter, fact)}"


def _names(parameter: Any) -> str:
    """`--model/-m`; of an argument its name in capitals."""
    opts = [*parameter.opts, *parameter.secondary_opts]
    return "/".join(opts) if parameter.param_type_name == "option" else parameter.name.upper()


def _shown(parameter: Any, fact: str) -> str:
    if fact == "type" and hasattr(parameter, "type_descriptor"):
        return str(parameter.type_descriptor.annotation)
    return repr(getattr(parameter, fact, None))


if __name__ == "__main__":
    print("\n".join(listing()))
