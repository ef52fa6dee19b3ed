"""Processes that hold one model together, as threads of one process: what they ask of one another needs no launcher."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

from headprof.models.tensor_parallel import HeadShard

Found = TypeVar("Found")


@dataclass
class Table:
    """Where threads lay what they bring."""

    size: int

    def __post_init__(self) -> None:
        self.places: list[Any] = [None] * self.size
        self.all_here = Barrier(self.size, timeout=20)


@dataclass(frozen=True)
class TalkingShard(HeadShard):
    """Heads of a thread, which asks others at a table."""

    table: Table = field(default_factory=lambda: Table(1), compare=False)

    def _of_all(self, mine: Any) -> list[Any]:
        self.table.places[self.rank] = mine
        self.table.all_here.wait()
        everyone = list(self.table.places)
        self.table.all_here.wait()
        return everyone

    def collected(self, mine: Any) -> list[Any] | None:
        everyone = self._of_all(mine)
        return everyone if self.rank == 0 else None


def in_step(size: int, work: Callable[[HeadShard], Found]) -> list[Found]:
    """What each of so many threads makes of its heads, in their order."""
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(TalkingShard(rank, size, table)), range(size)))
