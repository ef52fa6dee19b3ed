"""Whole runs of the command line in several processes that meet as a launcher has them meet.

They are forked, since importing everything anew takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from support.commands import invoke


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    exit_code: int
    stdout: str
    stderr: str


SILENT = Ended(0, "", "")
"""A process that did its part and left talking to the first one."""


def processes(count: int, *arguments: str) -> list[Ended]:
    """What came of a command in each of so many processes, in their order; the caller's tensors use one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]
    started = [fork.Process(target=_run, args=(rank, count, port, arguments, pipes[rank][1])) for rank in range(count)]
    try:
        for process in started:
            process.start()
        assert all(receiver.poll(120) for receiver, _ in pipes)
        return [receiver.recv() for receiver, _ in pipes]
    finally:
        for process in started:
            process.join(5)
            process.kill()


def _run(rank: int, count: int, port: int, arguments: tuple[str, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ended = invoke(*arguments)
    pipe.send(Ended(ended.exit_code, ended.stdout, " ".join(ended.stderr.split())))
