"""What commands share: the terminal, and what they load beside its progress bar."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from headprof.cli.options import LoadOptions
from headprof.cli.terminal import Terminal

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.head_profile import HeadProfile
    from headprof.utils.team import Team

terminal = Terminal()


def load(model: str | None, options: LoadOptions, tp: int = 1) -> LoadedModel:
    """The model that a command is about, which `tp` processes hold together."""
    from headprof.models.loading import load_model

    with terminal.progress() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its notes are remarked, once
        loaded = load_model(model, **asdict(options), tp=tp, progress=report)
    for note in loaded.notes:
        terminal.remark(f"Warning: {note}")
    return loaded


def load_profile(loaded: LoadedModel, file: Path | None) -> HeadProfile:
    """The profile of a model, from this file or where it is found."""
    from headprof.profile import finding

    return finding.load_profile(loaded.name, file, loaded.shape, loaded.given)


def join_team() -> Team:
    """The processes that `torchrun` or `accelerate launch` started, of which only the first one speaks."""
    from headprof.utils.team import join_with_gpus

    team = join_with_gpus()
    if team.rank:
        terminal.configure(quiet=True, debug=terminal.debug)
    return team


def join_ranks(tp: int, *, sharing: bool = False) -> Team:
    """The processes that hold one model together, of which only the first one speaks; one alone where `tp` is 1.

    Args:
        tp: how many hold one model.
        sharing: whether there may be several such groups, which share the work.

    Raises:
        UsageError: the launcher started another number of them.
    """
    from headprof.utils.in_step import join_in_step
    from headprof.utils.team import Team

    if tp == 1:
        return Team()
    if os.environ.get("RANK", "0") != "0":
        terminal.configure(quiet=True, debug=terminal.debug, mute=True)
    return join_in_step(tp, sharing=sharing)


def join_sharing(ranks: Team) -> Team:
    """Those that share the work: the groups of `join_ranks`, or each process by itself where it holds a whole model."""
    return ranks if ranks.ranks > 1 else join_team()


def save_profile(profile: HeadProfile, loaded: LoadedModel, target: Path) -> None:
    """Write a profile; of processes that hold the model together, the first one does."""
    if loaded.shard.rank == 0:
        profile.save(target)


def standard_input(team: Team) -> TextIO | None:
    """The standard input; where several processes hold the model, all that the first one is given, for each."""
    if team.ranks == 1:
        return sys.stdin
    given = None
    if team.rank == 0 and sys.stdin is not None and not sys.stdin.isatty():
        given = sys.stdin.buffer.read()
    given = team.share(given)
    return None if given is None else TextIOWrapper(BytesIO(given), encoding="utf-8", errors="surrogateescape")


def command_line() -> str:
    """The command as it was typed, to be noted beside its results; that it went on from before is left out."""
    return shlex.join(["headprof", *(word for word in sys.argv[1:] if word != "--resume")])
