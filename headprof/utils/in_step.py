"""Processes that hold one model together (`--tp`), and groups of such processes that share the work.

Transformers splits a model over all processes that `torch.distributed` knows of. So each group is a world of its own,
and what groups have to tell each other goes through the store in which the launcher lets processes meet.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from headprof.errors import UsageError
from headprof.utils.team import PATIENCE, Item, Team, meet

if TYPE_CHECKING:
    from torch.distributed import Store

Told = TypeVar("Told")

PART_BYTES = 4 << 20
"""Of what is told through a store, which takes at most 8 MiB at a time."""


class StoreTeam(Team):
    """A team that `torch.distributed` does not know of: all that its processes tell each other goes through a store."""

    _store: Store

    def __init__(self, rank: int, size: int, store: Store):
        super().__init__(rank, size, store)
        self._meetings = 0

    def gather(self, mine: Any) -> list[Any]:
        if self.size == 1:
            return [mine]
        self._meetings += 1
        self._bring(f"meeting {self._meetings} {self.rank}", mine)
        everyone = [self._fetch(f"meeting {self._meetings} {rank}") for rank in range(self.size)]
        # All have come here, so nobody reads any more what this process brought when they met before.
        self._forget(f"meeting {self._meetings - 1} {self.rank}")
        return everyone

    def share(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]

    def leave(self) -> None:
        """Part; the first process, in which the store may live, goes last."""
        if self.rank > 0:
            self._store.set(f"left {self.rank}", "")
        elif self.size > 1:
            self._store.wait([f"left {rank}" for rank in range(1, self.size)], PATIENCE)

    def _bring(self, name: str, value: Any) -> None:
        told = pickle.dumps(value)
        parts = [told[start : start + PART_BYTES] for start in range(0, len(told), PART_BYTES)]
        for number, part in enumerate(parts):
            self._store.set(f"{name} {number}", part)  # type: ignore[arg-type]  # it takes what it gives, bytes
        self._store.set(name, str(len(parts)))  # last, since others wait for it

    def _fetch(self, name: str) -> Any:
        self._store.wait([name], PATIENCE)
        return pickle.loads(b"".join(map(self._store.get, self._parts(name))))

    def _forget(self, name: str) -> None:
        if self._store.check([name]):
            for part in (*self._parts(name), name):
                self._store.delete_key(part)

    def _parts(self, name: str) -> list[str]:
        return [f"{name} {number}" for number in range(int(self._store.get(name)))]


class InStep(Team):
    """The processes of a group that holds one model together: each does all of the group's work, in step.

    What one of them finds they all find, so to those who share work they are one, for which the first one speaks.

    Args:
        group: the processes of this group.
        groups: all groups, as a team in which the first process of each has its group's number; `None` for this alone.
    """

    def __init__(self, group: Team, groups: Team | None = None):
        groups = groups or Team()
        super().__init__(groups.rank * group.size + group.rank, groups.size)
        self.ranks = group.size
        self._group, self._groups = group, groups

    def leave(self) -> None:
        self._group.leave()
        if self._group.rank == 0:
            self._groups.leave()

    def dismiss(self) -> bool:
        if self._group.rank == 0:
            self._groups.leave()
        stays = self._groups.rank == 0
        if not stays:
            self._group.leave()
        self.size, self._groups = 1, Team()
        return stays

    def claim(self, items: Sequence[Item]) -> Iterator[Item]:
        """Items for this group alone, for each of its processes the same ones."""
        numbers = iter(self._groups.claim(range(len(items))))
        while (number := self._told(lambda: next(numbers, None))) is not None:
            yield items[number]

    def gather(self, mine: Any) -> list[Any]:
        """What the first process of each group brings, which is what they all should."""
        return self._told(lambda: self._groups.gather(mine))

    def share(self, value: Any) -> Any:
        return self._told(lambda: self._groups.share(value))

    def _told(self, ask: Callable[[], Told]) -> Told:
        """What the first process of the group comes to with the other groups, for all of its own."""
        return self._group.share(ask() if self._group.rank == 0 else None)


def join_in_step(size: int, *, sharing: bool = False) -> InStep:
    """The processes that `torchrun` started, of which the first `size` hold one model together, and so on.

    Each is on the GPU of its local rank. Call it before CUDA is used.

    Args:
        size: how many hold one model.
        sharing: whether there may be several such groups, which share the work.

    Raises:
        UsageError: the launcher started another number of processes, or there are fewer GPUs than processes.
    """
    check_started(os.environ.get("WORLD_SIZE", "1"), size, sharing=sharing)
    import torch
    import torch.distributed as dist

    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
    store, rank, started = meet()
    number, place = divmod(rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        store=dist.PrefixStore(f"group {number}", store),
        rank=place,
        world_size=size,
        timeout=PATIENCE,
    )
    groups = StoreTeam(number, started // size, dist.PrefixStore("groups", store))
    return InStep(Team(place, size), groups)


def check_started(started: str, size: int, *, sharing: bool) -> None:
    """
    Args:
        started: number of processes, as the launcher's environment has it.
        size, sharing: as for `join_in_step`.

    Raises:
        UsageError: so many cannot hold models of `size` processes each.
    """
    number = int(started) if started.isdecimal() else 0
    if number == size or (sharing and number and number % size == 0):
        return
    mend = f"start {size}, or a multiple of that," if sharing else "start them"
    raise UsageError(
        f"With --tp {size} a model is held by {size} processes, and here {'is' if started == '1' else 'are'} "
        f"{started}: {mend} with `torchrun --nproc-per-node {size} -m headprof ...`."
    )


def _own_gpu(num_gpus: int) -> int:
    """
    Raises:
        UsageError: there is not one for each process of this machine.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if processes > num_gpus:
        raise UsageError(
            f"Each of the {processes} processes here needs a GPU, and here are {num_gpus}: start fewer, or with a "
            "smaller --tp."
        )
    return rank
