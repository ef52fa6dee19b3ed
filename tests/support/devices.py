"""Marks of tests that need a device, or Triton."""

import importlib.util
import os

import pytest
import torch

has_triton = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not has_triton or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton, interpreting its kernels"
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
