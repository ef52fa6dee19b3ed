"""All commands put together. Heavy modules are imported where they are used: `--help` is quick."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from headprof._version import __version__
from headprof.cli.bench import bench
from headprof.cli.compress import compress
from headprof.cli.context import terminal
from headprof.cli.evaluate import evaluate
from headprof.cli.generate import generate
from headprof.cli.heatmap import heatmap
from headprof.cli.lm_eval import PASS_ON, lm_eval
from headprof.cli.profile import profiles
from headprof.cli.score import score
from headprof.cli.serve import serve
from headprof.cli.tune import tune
from headprof.cli.validate import validate
from headprof.errors import InterruptedRun, UsageError

app = typer.Typer(
    name="headprof",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Profile the attention heads of a language model, and spend a key/value-cache budget where it pays.\n\n"
    "Without [bold]--model[/], SmolLM2-135M-Instruct is used, which runs on a laptop. "
    "[bold]--quiet[/] (no progress, no remarks) and [bold]--debug[/] (tracebacks) may stand anywhere.",
)
for each in (score, tune, heatmap, validate, generate, compress, serve):
    app.command()(each)
app.command(name="eval")(evaluate)
app.command(name="lm-eval", context_settings=PASS_ON)(lm_eval)
app.add_typer(profiles, name="profile")
app.add_typer(bench, name="bench")


def _version(shown: bool) -> None:
    if shown:
        terminal.result(f"headprof {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _check_surroundings() -> None:
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files; matplotlib fails to load where this names no backend
    try:
        Path.cwd()
    except OSError:
        terminal.error("The working folder is gone: change to one that is there.")
        sys.exit(UsageError.exit_code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `--quiet` and `--debug` are understood anywhere in it."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show should not end an hour's work
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal.configure(quiet="--quiet" in given, debug="--debug" in given)
    _check_surroundings()
    try:
        app(args=[argument for argument in given if argument not in ("--quiet", "--debug")], prog_name="headprof")
    except SystemExit as ended:
        if ended.code == InterruptedRun.exit_code and not terminal.has_failed:  # typer ends without a word
            terminal.error("Interrupted.")
        raise
