"""Free memory, of systems that are made up."""

from types import SimpleNamespace

import psutil
import torch

from headprof.utils.memory import free_bytes


def test_on_a_cpu_it_is_what_the_system_has_left(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=700, free=300, total=5000))
    assert free_bytes("cpu") == 700


def test_on_a_gpu_what_is_held_for_reuse_is_free_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    assert free_bytes(torch.device("cuda:0")) == 1300
