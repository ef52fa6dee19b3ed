"""What stands for a `HeadCache` in a decode step that the device runs by itself (see `decode_steps`).

Nothing in it changes from step to step but what lies in its tensors, and these stay where they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from headprof.compression.kernels.append import append_rows
from headprof.compression.kernels.backends import ragged_attention
from headprof.compression.kernels.ragged_rows import RaggedRows


class StepLayer:
    """What a decode step reads and writes of one layer: tensors that stay where they are.

    Attributes:
        rows: as `RowStorage.in_place` has them, less what changes from token to token.
        ring, slot, valid: where the newest query goes, as in `RecentQueries`; `None` where none is remembered. The slot
            is moved on by `StepCache.finish`.
    """

    is_sliding = False
    is_compileable = True

    def __init__(self, rows: RaggedRows, ring: Tensor | None, slot: Tensor | None, valid: Tensor | None):
        self.rows = rows
        self.ring, self.slot, self.valid = ring, slot, valid

    @property
    def of_any_length(self) -> list[Tensor]:
        """Tensors whose first size differs from layer to layer and from cache to cache."""
        rows = self.rows
        tables = [getattr(plan, "table", None) for plan in rows.plans.values()]
        packed = () if rows.packed is None else rows.packed.tensors
        found = (rows.keys, rows.values, rows.positions, rows.bias, rows.received, *packed, *tables)
        return [each for each in found if each is not None]

    def remember(self, query: Tensor) -> None:
        """Write the newest token's query, `[B, H, 1, D]`."""
        if self.ring is None or self.slot is None:
            return
        self.ring.index_copy_(2, self.slot, query)
        if self.valid is not None:
            self.valid.index_fill_(1, self.slot, True)


class StepCache(Cache):
    """Stands for a `HeadCache` in a step that the device runs by itself.

    Attributes:
        current: the layer that took keys and values last.
        slots: where the next query of each layer goes, int64 `[L]`, of which each layer's is a part; `None` where none
            is remembered.
    """

    layers: list[Any]  # of StepLayer

    def __init__(self, layers: list[StepLayer], slots: Tensor | None, backend: str):
        super().__init__(layers=cast(Any, list(layers)))
        self.slots = slots
        self._rooms: Tensor | None = None
        if slots is not None:  # layers that are compressed at other times may have grown other rings
            with torch.inference_mode(False):
                rooms = [slots.new_full((1,), layer.ring.shape[2]) for layer in layers if layer.ring is not None]
                self._rooms = torch.cat(rooms)
        self.current: StepLayer | None = None
        self._backend = backend

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append one row to each head; the attention function then asks for `current`."""
        self.current = self.layers[layer_idx]
        append_rows(self.current.rows, key_states, value_states)
        return key_states, value_states

    def attend(self, query: Tensor, num_kv_heads: int, options: dict[str, Any]) -> Tensor:
        """Attention of the newest tokens' queries, `[B, H, 1, D]`, over the current layer: `[B, 1, H, D]`."""
        layer, self.current = self.current, None
        assert layer is not None
        scaling = options.get("scaling")
        output = ragged_attention(
            query,
            layer.rows,
            num_kv_heads,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            sliding_window=options.get("sliding_window"),
            sinks=options.get("s_aux"),
            backend=self._backend,
        )
        layer.remember(query)
        return output

    def finish(self) -> None:
        """Move on all layers' slots, in one go."""
        if self.slots is not None and self._rooms is not None:
            self.slots.add_(1).remainder_(self._rooms)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, int32 `[]` on the device: a number on the host would be the same in every step."""
        positions = self.layers[layer_idx].rows.next_positions
        return positions[0]
