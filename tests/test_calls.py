"""Counting what some work asks of a device: on a CPU, and on a GPU that is not there."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from headprof.bench.calls import Calls, OperatorCount, counted

CPU = torch.device("cpu")


def test_operators_are_counted_without_views():
    numbers = torch.arange(6)
    result, calls = counted(lambda: (numbers.view(2, 3).T[0] + 1).sum(), CPU)
    assert result == 5 and calls == Calls(2)


def reads(work, inferring):
    """How often the host waits for a GPU, of which only the shapes of tensors are there."""
    with FakeTensorMode(), torch.inference_mode(inferring):
        there, here = torch.ones(2, 3, device="cuda"), torch.zeros(2, 3)
        with OperatorCount(torch.device("cuda")) as count:
            try:
                work(there, here)
            except DataDependentOutputException:  # a fake has no number to give
                count.reads += 1
    return count.reads


WAITING = {
    "cpu": lambda there, here: there.cpu(),
    "copy to the host": lambda there, here: here.copy_(there),
    "item": lambda there, here: there.sum().item(),
    "if": lambda there, here: bool(there.sum()),
}
GOING_ON = {
    "arithmetic": lambda there, here: (there + 1).sum(),
    "other dtype": lambda there, here: there.half(),
    "copy there": lambda there, here: there.clone(),
    "of the host": lambda there, here: here.to(torch.float64) + here.clone(),
}


@pytest.mark.parametrize("inferring", [False, True])
@pytest.mark.parametrize("how", WAITING)
def test_reads_are_seen(how, inferring):
    assert reads(WAITING[how], inferring) == 1


@pytest.mark.parametrize("inferring", [False, True])
@pytest.mark.parametrize("how", GOING_ON)
def test_what_does_not_read_is_let_pass(how, inferring):
    assert reads(GOING_ON[how], inferring) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    numbers = torch.rand(1000, 1000, device="cuda")
    result, calls = counted(lambda: (numbers @ numbers).sum().item(), torch.device("cuda"))
    assert result > 0 and calls.reads == 1 and calls.launches >= 2 and calls.busy_seconds > 0
