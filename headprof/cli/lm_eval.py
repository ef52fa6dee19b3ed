"""`headprof lm-eval`: the lm-evaluation-harness's own command line, with the model type `headprof`."""

from __future__ import annotations

from typing import Any

import typer

from headprof.cli.command import command

PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Context settings that leave every argument, `--help` too, to the harness."""


@command
def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness on a compressed cache; all arguments are the harness's own.

    Settings go in --model_args: pretrained, method, budget, profile, and parameters of the method.

    [dim]headprof lm-eval --model headprof --model_args method=snapkv,budget=64 --tasks hellaswag --limit 50[/]
    """
    from headprof.integrations.lm_eval import run_harness

    run_harness(context.args)
