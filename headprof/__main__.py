"""Where the program begins: an interrupt while it still loads its parts ends it in one sentence, too."""

from __future__ import annotations

import _thread
import signal
import sys
from threading import Timer
from types import FrameType

_interrupted = False


def run() -> None:
    """Run the command line. Libraries may make another exception of an interrupt that meets them while they load."""
    try:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _once_more
        from headprof.cli import main

        main()
    except KeyboardInterrupt:
        _end()
    except Exception:
        if not _interrupted or "--debug" in sys.argv:
            raise
        _end()


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _once_more(lost: sys.UnraisableHookArgs) -> None:
    """Interrupt again where Python had to ignore it: in what it calls when an object goes away, as while it imports."""
    if _interrupted and lost.exc_type is KeyboardInterrupt:
        Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _end() -> None:
    sys.stderr.write("Error: Interrupted.\n")
    sys.exit(130)


if __name__ == "__main__":
    run()
