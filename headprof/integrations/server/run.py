"""Running the server until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from headprof.errors import UsageError
from headprof.integrations.server.app import Server

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CLOSING = 5.0
"""Seconds in which responses that have been cut off reach their clients."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket on which to listen, so that a port that is taken is known before a model is loaded.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        UsageError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
            made.listen(128)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"The server cannot listen at {host}:{port} ({reason}): choose another --host or --port."
        ) from error
    return made


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = listening.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def serve(server: Server, listening: socket.socket, grace: float, on_start: Callable[[], None]) -> None:
    """Serve until an interrupt or SIGTERM; then begin nothing any more, and finish what is under way.

    Args:
        server: what to run.
        listening: where.
        grace: seconds after which what is still under way is cut off.
        on_start: called when requests are taken.
    """
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + _CLOSING) + 1,
        timeout_keep_alive=30,
    )
    _Uvicorn(config, server, grace, on_start).run(sockets=[listening])


class _Uvicorn(uvicorn.Server):
    """Uvicorn, which ends well when it is told to, and tells the worker."""

    def __init__(self, config: Any, server: Server, grace: float, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._server, self._grace, self._on_start = server, grace, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """In the place of uvicorn's, which ends the process by the same signal in the end."""
        if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        """Drain at the first signal, cut off at the second."""
        again = self.should_exit
        self.should_exit = True
        self._server.worker.drain(0.0 if again else self._grace)
