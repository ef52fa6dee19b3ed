"""Commands that messages name, as the user would type them."""

from __future__ import annotations

import shlex
from pathlib import Path


def score_command(model: str | None, kind: str = "", profile: Path | None = None) -> str:
    """The command that makes a model's profile, or adds a kind of score to one.

    Args:
        model: how the user named it, or what it is called if that is not known; `None` for any.
        kind: the kind of score that is lacking.
        profile: the file that it is to be added to, where that can be.
    """
    to = "PROFILE" if profile is None else shlex.quote(str(profile))
    adding = f" --{kind} --add-to {to}" if kind in ("reconstruction", "curves") else ""
    return f"headprof score --model {shlex.quote(model) if model else 'MODEL'}{adding}"


def surrogate_command(model: str | None) -> str:
    """The command that makes a model's surrogate; `model` as for `score_command`."""
    return f"{score_command(model)} --surrogate"


def tune_command(model: str | None) -> str:
    """The command that looks for the parameters that serve a model best; `model` as for `score_command`."""
    return f"headprof tune --model {shlex.quote(model) if model else 'MODEL'}"
