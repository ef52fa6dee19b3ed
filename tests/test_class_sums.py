"""Sums of rows by class: as a loop adds them, and the same every time on a GPU."""

import pytest
import torch
from support.devices import on_cuda

from headprof.compression.methods import class_sums
from headprof.compression.methods.class_sums import add_by_class


def drawn(sets, classes, rows, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(sets, rows, width, generator=generator, dtype=dtype)
    return (
        torch.ones(sets, classes, width, dtype=dtype),
        torch.randint(classes, (sets, rows), generator=generator),
        values,
    )


def looped(total, classes, values):
    expected = total.clone()
    for one, number in enumerate(classes.tolist()):
        for row, place in enumerate(number):
            expected[one, place] += values[one, row]
    return expected


SHAPES = [(1, 1, 1, 1), (2, 5, 40, 3), (3, 7, 0, 2), (1, 4, 100, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_is_added_to_its_class(shape):
    total, classes, values = drawn(*shape, torch.float64)
    expected = looped(total, classes, values)
    assert add_by_class(total, classes, values) is total
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("memberships", [1, 30, 1 << 25])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_come_to_the_same(shape, memberships, monkeypatch):
    monkeypatch.setattr(class_sums, "_MEMBERSHIPS", memberships)
    total, classes, values = drawn(*shape, torch.float64)
    expected = looped(total, classes, values)
    assert class_sums._by_products(total, classes, values) is total
    torch.testing.assert_close(total, expected)


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 40, 3000, 128)])
def test_on_cuda_it_is_the_same_every_time(shape, crowded):
    total, classes, values = (each.cuda() for each in drawn(*shape))
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (add_by_class(total.clone(), classes, values, crowded=crowded) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    cpu = add_by_class(total.cpu(), classes.cpu(), values.cpu())
    torch.testing.assert_close(first.cpu(), cpu, atol=1e-4, rtol=1e-4)
