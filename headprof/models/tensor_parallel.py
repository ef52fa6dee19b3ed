"""Heads that are split over several processes, as Transformers' tensor parallelism splits them.

Each of `N` processes runs every layer with `1 / N` of its KV heads and the query heads that read them: the first has
the first heads, and so on. What a head keeps is mostly its own matter; where it depends on the other heads of a layer,
processes ask one another. All of them do so at the same places of the program, or they would wait for ever.

Shapes: `K` KV heads of a layer, `B` sequences, `T` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headprof.errors import ModelError

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Of queries, keys and values; where a plan splits their outputs, it splits heads."""


@dataclass(frozen=True)
class HeadShard:
    """Which heads of every layer this process has; as it stands, all of them.

    Attributes:
        rank: number of this process among those that hold the model together, from 0.
        size: how many these are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_model(cls, model: Any) -> HeadShard:
        """The heads that a model of Transformers has in this process.

        Raises:
            ModelError: it is split otherwise than over all processes there are.
        """
        size = getattr(model, "tp_size", None) or 1
        if size == 1:
            return WHOLE
        import torch.distributed as dist

        if dist.get_world_size() != size:
            raise ModelError(
                f"The heads of this {type(model).__name__} are split over {size} of {dist.get_world_size()} processes: "
                "start as many processes as share its heads."
            )
        return cls(dist.get_rank(), size)

    @property
    def is_whole(self) -> bool:
        """Whether there is nobody to ask."""
        return self.size == 1

    def count(self, heads: int) -> int:
        """How many of so many heads this process has."""
        return heads // self.size

    def own(self, of_all: Tensor, dim: int = -1) -> Tensor:
        """Of what is known of all heads, along `dim`, the part of this process's."""
        if self.is_whole:
            return of_all
        count = self.count(of_all.shape[dim])
        return of_all.narrow(dim, self.rank * count, count)

    def together(self, own: Tensor, dim: int = -1) -> Tensor:
        """The inverse of `own`: what every process knows of its heads, along `dim`, put together for all of them."""
        if self.is_whole:
            return own
        if own.device.type == "cpu":  # which NCCL, by which CUDA tensors go, does not reach
            return torch.cat(self._of_all(own), dim=dim)
        import torch.distributed as dist

        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, dim=dim)

    def rows_together(self, own: Tensor, fill: float = 0) -> Tensor:
        """What every process knows of its heads' rows, `[B, K / N, T]`, as one `[B, K, T]`.

        Processes may bring other numbers of rows; where one has fewer, `fill` stands behind.
        """
        if self.is_whole:
            return own
        longest = max(self._of_all(own.shape[2]))
        return self.together(pad(own, (0, longest - own.shape[2]), value=fill), dim=1)

    def least(self, number: int) -> int:
        """The least of the numbers that the processes bring."""
        return number if self.is_whole else min(self._of_all(number))

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """The sum of the numbers that the processes bring, of each place of a list by itself."""
        return list(numbers) if self.is_whole else [sum(each) for each in zip(*self._of_all(numbers), strict=True)]

    def total(self, number: int) -> int:
        """The sum of the numbers that the processes bring."""
        return self.sums([number])[0]

    def of_first(self, value: Any) -> Any:
        """The value that the first process brings, for all."""
        if self.is_whole:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agreed(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, of which each has one of the same size."""
        if self.is_whole:
            return tensor
        import torch.distributed as dist

        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    def collected(self, mine: Any) -> list[Any] | None:
        """What every process brings, in the order of their heads, for the first one alone; `None` for the others."""
        if self.is_whole:
            return [mine]
        import torch.distributed as dist

        everyone = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        return everyone

    def _of_all(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone


WHOLE = HeadShard()
"""All heads, in one process."""


def check_split(config: Any, name: str, shape: HeadShape, size: int) -> None:
    """
    Args:
        config: the model's configuration.
        name: what the model is called.
        shape: of its heads.
        size: over how many processes they are to be split.

    Raises:
        ModelError: they cannot be, or Transformers has no plan that does.
    """
    text = config.get_text_config()
    rules = getattr(text, "base_model_tp_plan", None) or {}
    plan = {rule.rpartition(".")[2]: style for rule, style in rules.items()}
    if not all(plan.get(projection) == "colwise" for projection in _PROJECTIONS):
        raise ModelError(
            f"Transformers has no plan that splits the attention heads of {name} ({text.model_type}) over processes: "
            "leave --tp away."
        )
    for what, count in (("KV heads", shape.num_kv_heads), ("query heads", shape.num_heads)):
        if count % size:
            raise ModelError(
                f"The {count} {what} of {name} cannot be split evenly over {size} processes: {_mend(shape)}."
            )


def _mend(shape: HeadShape) -> str:
    """What a user can do where heads cannot be split as asked."""
    heads = shape.num_kv_heads, shape.num_heads
    sizes = [str(size) for size in range(2, shape.num_kv_heads + 1) if not any(count % size for count in heads)]
    return f"start {' or '.join(sizes)}" if sizes else "leave --tp away"


def local(weights: Tensor) -> Tensor:
    """Of a table of weights the part that this process holds; all of it where it is not split."""
    return weights.to_local() if hasattr(weights, "to_local") else weights


@torch.no_grad()
def in_full(weights: Tensor) -> Tensor:
    """A table of weights in full, which every process that holds a part of it must ask for."""
    return weights.full_tensor() if hasattr(weights, "full_tensor") else weights
