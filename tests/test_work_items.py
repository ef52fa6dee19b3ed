"""How attention's work is dealt out: every row once, in pieces of a bounded size and number, anew in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from headprof.compression.kernels import work_items
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.kernels.work_items import GRAIN, WorkItems, rows_per_item


def rows_in(rooms, free=0) -> RaggedRows:
    """Heads in rooms of these sizes, all but `free` rows of each in use."""
    stops = torch.tensor([0, *rooms]).cumsum(0)
    ends = (stops[1:] - free).maximum(stops[:-1])
    bounds = torch.cat([torch.stack([stops[:-1], ends], dim=1).flatten(), stops[-1:]]).int()
    keys = torch.empty(int(stops[-1]), 1)
    return RaggedRows(keys, keys, keys[:, 0].int(), bounds, max(rooms), 0)


def dealt(items: WorkItems) -> list[tuple[int, int]]:
    heads, parts = items.table[: 2 * items.num_items].view(2, -1).tolist()
    return list(zip(heads, parts, strict=True))


def slowly_dealt(rooms, item_rows) -> list[tuple[int, int]]:
    """One head after the other, those with large parts first, one part after the other."""
    parts = [max(1, -(-room // item_rows)) for room in rooms]
    heads = sorted(range(len(rooms)), key=lambda head: -(rooms[head] // parts[head]))
    return [(head, part) for head in heads for part in range(parts[head])]


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=9), st.sampled_from([128, 256, 384]))
def test_items_of_a_head_are_as_many_as_its_room_needs(rooms, item_rows):
    items = WorkItems.of(rows_in(rooms), item_rows)
    expected = slowly_dealt(rooms, item_rows)
    found = dealt(items)
    assert items.num_heads == len(rooms) and items.num_items == sum(rooms) // item_rows + len(rooms)
    assert found[: len(expected)] == expected
    assert all(head == -1 for head, _ in found[len(expected) :])
    assert items.counts.tolist() == [0] * len(rooms)


def test_rows_that_come_need_no_other_items():
    few, many = rows_in([300, 20, 900], free=20), rows_in([300, 20, 900])
    assert dealt(WorkItems.of(few, 128)) == dealt(WorkItems.of(many, 128))


def test_refreshing_goes_by_the_bounds_of_now_and_in_place():
    rows = rows_in([300, 20, 900])
    items = WorkItems.of(rows, 128)
    address = items.table.data_ptr()
    rows.bounds.copy_(rows_in([20, 640, 560]).bounds)
    items.refresh()
    assert dealt(items)[:11] == slowly_dealt([20, 640, 560], 128)
    assert items.table.data_ptr() == address
    assert dealt(items) == dealt(WorkItems.of(rows, 128))


def test_nothing_is_read_back_to_the_host():
    """Fake tensors have no data: whoever asks for some fails."""
    with FakeTensorMode():
        rows = rows_in_storage(4, 512)
        items = WorkItems.of(rows)
        items.refresh()
        assert items.num_items == len(rows.keys) // items.item_rows + 4
        with pytest.raises(Exception, match=r"_local_scalar_dense"):
            items.table[0].item()


def rows_in_storage(num_heads, size) -> RaggedRows:
    keys = torch.empty(num_heads * size, 64)
    bounds = torch.empty(2 * num_heads + 1, dtype=torch.int32)
    return RaggedRows(keys, keys, torch.empty(len(keys), dtype=torch.int32), bounds, size, 0)


def test_a_plan_made_in_inference_mode_may_be_refreshed_outside():
    rows = rows_in([300, 20])
    with torch.inference_mode():
        items = WorkItems.of(rows, 128)
    assert not items.table.is_inference()
    items.refresh()


@pytest.mark.parametrize(
    ("num_heads", "size", "expected"),
    [
        (8, 150, 128),  # a layer at batch 1
        (128, 1024, 384),
        (256, 1024, 768),
        (2048, 1024, 768),
        (128, 8192, 768),
        (1, 1_000_000, 15744),  # a single head is not cut into more parts than can be joined quickly
    ],
)
def test_items_are_small_enough_for_every_processor_to_have_several(num_heads, size, expected, monkeypatch):
    monkeypatch.setattr(work_items, "num_processors", lambda device: 132)
    with FakeTensorMode():
        item_rows = rows_per_item(rows_in_storage(num_heads, size))
    assert item_rows == expected and item_rows % GRAIN == 0
