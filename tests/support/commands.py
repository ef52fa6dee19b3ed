"""Ways to run the command line: inside the test's process, which is fast, or in one of its own, as a user would."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from headprof.cli import app, main


def headprof(place: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run the command line in folder `place`, inside this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HEADPROF_DATA", str(place / "data-home"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # its variable was read at import
        patch.setattr(sys, "argv", ["headprof", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(sys, "excepthook", sys.excepthook)  # which typer replaces
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except Exception:
            sys.excepthook(*sys.exc_info())
            code = 1
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def invoke(*arguments: str) -> Result:
    """Run the command line in the folder and environment that the test has set."""
    return CliRunner().invoke(app, list(arguments))


def headprof_process(place: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run the command line in a process of its own, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "headprof", *arguments],
        cwd=place,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HEADPROF_DATA": str(place / "data-home"), "HF_HUB_OFFLINE": "1"},
    )
