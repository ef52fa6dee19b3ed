"""Processes that share the work, as `torchrun` or `accelerate launch` started them; or one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from headprof.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

Item = TypeVar("Item")
Done = TypeVar("Done")

PATIENCE = timedelta(days=2)
"""How long a process waits for the others; if one dies, the launcher stops them all."""


class Team:
    """The processes of a run. What they do together is the same for each, whoever did it.

    Attributes:
        rank: number of this process, from 0; process 0 reads and writes the files.
        size: how many share the work; those that hold one model together (`in_step.InStep`) count as one.
        ranks: how many hold one model together.
    """

    ranks = 1

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None):
        self.rank = rank
        self.size = size
        self._store = store
        self._rounds = 0

    @classmethod
    def join(cls) -> Team:
        """Meet the other processes that the launcher's environment variables name; without them, a team of one.

        Messages go through `gloo`, so that no process needs a GPU, and each one uses its own.

        Raises:
            UsageError: no launcher made these variables.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        import torch.distributed as dist

        store, rank, size = meet()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return cls(rank, size, dist.PrefixStore("headprof", store))

    def leave(self) -> None:
        """Part, once all have come this far."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()

    def dismiss(self) -> bool:
        """Part with those that only shared work, once all have come this far.

        Returns:
            Whether this process goes on, alone or with those that hold process 0's model with it.
        """
        self.leave()
        self.size, self._store = 1, None
        return self.rank == 0

    def claim(self, items: Sequence[Item]) -> Iterator[Item]:
        """Items for this process alone: each item goes to the process that asks first, so that none waits long.

        Every process must call this for the same items, and take all it is given.
        """
        if self._store is None:
            yield from items
            return
        self._rounds += 1
        while (number := self._store.add(f"round {self._rounds}", 1) - 1) < len(items):
            yield items[number]

    def each(self, items: Sequence[Item], work: Callable[[Item], Done]) -> list[Done]:
        """What `work` makes of each item, in their order, for all processes; one of them does it, as with `claim`."""
        mine = {number: work(items[number]) for number in self.claim(range(len(items)))}
        found = {number: done for theirs in self.gather(mine) for number, done in theirs.items()}
        return [found[number] for number in range(len(items))]

    def telling(self, on_progress: Callable[[int, int], None], total: int) -> Callable[[Done], Done]:
        """What hands on each part that was done, once `on_progress` has heard of it from process 0.

        It hears the number done and that of all, as if the other processes were as far.
        """
        parts = count(1)

        def told(part: Done) -> Done:
            done = next(parts)
            if self.rank == 0:
                on_progress(min(done * self.size, total), total)
            return part

        return told

    def gather(self, mine: Any) -> list[Any]:
        """What each process brings, in the order of their ranks, for all of them."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def share(self, value: Any) -> Any:
        """Process 0's value, for all."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def meet() -> tuple[Store, int, int]:
    """The store that all processes of a launcher reach, the number of this process, and how many there are.

    Raises:
        UsageError: the environment is not that of a launcher.
    """
    import torch.distributed as dist

    try:
        return next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    except ValueError as error:
        raise UsageError(
            f"The environment has WORLD_SIZE, but is not that of a launcher ({error}): start with torchrun, or unset "
            "WORLD_SIZE."
        ) from None


def join_with_gpus() -> Team:
    """The processes that `torchrun` or `accelerate launch` started, each of which sees only its own GPUs from now on.

    Call it before CUDA is used.
    """
    import torch

    gpus = claim_gpus(os.environ, torch.cuda.device_count())
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    return Team.join()


def claim_gpus(environment: Mapping[str, str], num_gpus: int) -> str | None:
    """Which GPUs this process should see when several on one machine share them: a value of `CUDA_VISIBLE_DEVICES`.

    With more GPUs than processes each gets an equal run of them, over which a large model is spread; with fewer,
    several processes use the same one.

    Args:
        environment: with the launcher's `LOCAL_RANK` and `LOCAL_WORLD_SIZE`.
        num_gpus: how many this process sees now.

    Returns:
        `None` when nothing is to be changed: no launcher, no GPUs, or one process that may have them all.
    """
    size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if size == 1 or num_gpus == 0:
        return None
    rank, each = int(environment.get("LOCAL_RANK", "0")), max(1, num_gpus // size)
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(num_gpus)]
    first = rank * each % num_gpus
    return ",".join(names[first : first + each])
