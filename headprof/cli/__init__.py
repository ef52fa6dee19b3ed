"""The command line: one thin function a command, no logic."""

from headprof.cli.app import app, main

__all__ = ["app", "main"]
