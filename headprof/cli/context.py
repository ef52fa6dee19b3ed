"""What every command needs: the terminal, errors as sentences, and options made into objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from headprof.cli.terminal import Terminal
from headprof.errors import HeadprofError

terminal = Terminal()


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can mend into one sentence and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HeadprofError as error:
            if terminal.debug:
                raise
            terminal.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            terminal.error("Interrupted.")
            raise typer.Exit(130) from None

    return run


def load(model: str | None, device: str = "auto", dtype: str = "auto", attn: str = "auto", trust: bool = False):
    from headprof.models.loading import load_model

    with terminal.progress() as report:
        return load_model(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust, progress=report)


def load_profile(loaded, explicit: Path | None):
    from headprof.profile.finding import find_profile
    from headprof.profile.head_profile import HeadProfile

    return HeadProfile.load(find_profile(loaded.name, explicit), loaded.shape, model_name=loaded.name)


def method_options(window, keep_last, kernel, pooling, pool_factor, settings) -> dict[str, Any]:
    """Parameters of a method's parts; `None` leaves one at its default."""
    from headprof.compression.methods.table import parse_settings

    named = {
        "window": window,
        "keep_last": keep_last,
        "kernel": kernel,
        "pooling": pooling,
        "pool_factor": pool_factor,
    }
    return named | parse_settings(settings or [])


def decoding_options(decode_budget: str | None, buffer: int | None) -> dict[str, Any]:
    """How a cache is compressed while generating; what is not given keeps its default, a buffer of 0 is none."""
    from headprof.compression.methods.budget import Budget

    given: dict[str, Any] = {} if decode_budget is None else {"decode_budget": Budget.parse(decode_budget)}
    return given if buffer is None else given | {"buffer": buffer or None}


def check_method(method: str, budget: str, options: dict[str, Any]) -> None:
    """Complain about a method, a parameter or a budget before anything is loaded."""
    from headprof.compression.methods.budget import Budget
    from headprof.compression.methods.table import find_method

    find_method(method).with_options(**options)
    Budget.parse(budget)


def choose_plan(
    loaded, profile: Path | None, method: str, budget: str, options: dict[str, Any], prompt_length: int = 0
):
    """How to compress a prompt; none for the full cache. A budget that cannot be met is an error before any work."""
    from headprof.compression.methods.table import find_method
    from headprof.compression.session import make_plan

    if method == "full" and prompt_length:
        return None
    needs_profile = find_method(method).budget.profile_scores
    head_profile = load_profile(loaded, profile) if needs_profile else None
    plan = make_plan(loaded.model, head_profile, method=method, budget=budget, **options)
    if prompt_length:
        plan.check(prompt_length)
    return plan


def lengths_of(text: str, least: int = 1) -> tuple[int, ...]:
    from headprof.utils.units import parse_lengths

    return parse_lengths(text, least)


def length_of(text: str) -> int:
    """A single length; raises `UsageError` where there are several."""
    from headprof.errors import UsageError

    length, *more = lengths_of(text)
    if more:
        raise UsageError(f"{text!r} are several lengths where one is wanted: give a single one, such as {length}.")
    return length


def join_team():
    """The processes that `torchrun` or `accelerate launch` started, each with its GPUs; only the first one speaks."""
    import os

    import torch

    from headprof.utils.team import Team, claim_gpus

    gpus = claim_gpus(os.environ, torch.cuda.device_count())
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    team = Team.join()
    if team.rank:
        terminal.configure(quiet=True, debug=terminal.debug)
    return team
